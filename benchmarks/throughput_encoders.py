"""Encode texts in one way, in a process of its own, for `benchmarks.throughput`.

    PYTHON -m benchmarks.throughput_encoders NAME SETTINGS

SETTINGS is a file of JSON. The first line on stdout is {} or {"left_out": reason}. Each line on
stdin holds texts, and each answer has the seconds. Needs only what the encoder NAME needs, so another environment's
Python can run it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

Encode = Callable[[Sequence[str]], Any]
BATCH_SIZES = (8, 32, 128)  # of the libraries that batch by the number of texts: the fastest for a set is taken
PARTIAL = ".partial"


class LeftOut(Exception):
    """This encoder cannot run here; the message has the reason."""


def plan(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return `encode` of a plan of the export; None opens what was chosen, as a user without a plan does."""
    from ffn2moe.runtime.export import open_export

    return {0: open_export(settings["export"], settings["plan"], settings["threads"]).encode}


def plan_in_order(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return a plan run on batches in the order of the texts, padded to the longest of each."""
    import numpy as np

    from ffn2moe.runtime.export import open_export

    export = open_export(settings["export"], settings["plan"], settings["threads"])

    def encode(texts: Sequence[str], size: int) -> Any:
        parts = (texts[start : start + size] for start in range(0, len(texts), size))
        return np.concatenate([export.run(*export.batch(part))[1] for part in parts])

    return {size: lambda texts, size=size: encode(texts, size) for size in BATCH_SIZES}


def torch_float32(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return sentence-transformers in PyTorch."""
    return _sizes(_sentence_transformer(settings["model"], settings))


def torch_bfloat16(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return sentence-transformers in PyTorch, with weights and arithmetic in bfloat16."""
    import torch

    return _sizes(_sentence_transformer(settings["model"], settings, model_kwargs={"torch_dtype": torch.bfloat16}))


def onnx_int8(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return sentence-transformers with its ONNX backend, quantised by its own function for this CPU."""
    ort = _require("onnxruntime", "onnx")
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kind = next((name for name in ("avx512_vnni", "avx512", "avx2") if name in flags), "arm64")

    def make(folder: Path) -> None:
        model = _onnx_model(settings, folder)
        export_dynamic_quantized_onnx_model(model, kind, str(folder))

    folder = _made(Path(settings["cache"]) / f"onnx-{kind}", make)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings["threads"], 1
    kwargs = {"provider": "CPUExecutionProvider", "session_options": options}
    kwargs["file_name"] = f"onnx/model_{'qint8' if kind != 'avx2' else 'quint8'}_{kind}.onnx"
    return _sizes(_sentence_transformer(folder, settings, backend="onnx", model_kwargs=kwargs))


def openvino_int8(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return sentence-transformers with its OpenVINO backend, statically quantised by its own function (NNCF).

    It is calibrated on texts of the same sets, which favours it, if anything.
    """
    _require("optimum.intel", "openvino")
    _require("nncf", "openvino")
    from sentence_transformers.backend import export_static_quantized_openvino_model

    def make(folder: Path) -> None:
        texts = folder / "calibration"
        texts.mkdir(parents=True)
        rows = "".join(json.dumps({"text": text}) + "\n" for text in settings["calibration"])
        (texts / "train.jsonl").write_text(rows, encoding="utf-8")
        model = _sentence_transformer(settings["model"], settings, backend="openvino", model_kwargs={"export": True})
        model.save_pretrained(str(folder))
        where = {"dataset_name": str(texts), "dataset_config_name": "default", "dataset_split": "train"}
        export_static_quantized_openvino_model(model, None, str(folder), **where, column_name="text")

    folder = _made(Path(settings["cache"]) / "openvino", make)
    kwargs = {"ov_config": {"INFERENCE_NUM_THREADS": settings["threads"], "NUM_STREAMS": 1}}
    kwargs["file_name"] = "openvino/openvino_model_qint8_quantized.xml"
    return _sizes(_sentence_transformer(folder, settings, backend="openvino", model_kwargs=kwargs))


def fastembed(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return fastembed on the float32 graph that sentence-transformers exports: no download is needed."""
    try:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType
    except ImportError as error:
        raise LeftOut("pip install fastembed") from error
    import numpy as np

    graph = Path(settings["cache"]) / "onnx-float32" / "onnx" / "model.onnx"
    if not graph.is_file():
        raise LeftOut('it reads a graph that is exported by: pip install "sentence-transformers[onnx]"')
    TextEmbedding.add_custom_model(
        model="local",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/local"),
        dim=settings["width"],
        model_file="onnx/model.onnx",
    )
    model = TextEmbedding("local", specific_model_path=str(graph.parent.parent), threads=settings["threads"])
    return {size: lambda texts, size=size: np.stack(list(model.embed(texts, batch_size=size))) for size in BATCH_SIZES}


def onnx_float32(settings: dict[str, Any]) -> dict[int, Encode]:
    """Return sentence-transformers with its ONNX backend in float32."""
    ort = _require("onnxruntime", "onnx")
    folder = _made(Path(settings["cache"]) / "onnx-float32", lambda folder: _onnx_model(settings, folder))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings["threads"], 1
    kwargs = {"provider": "CPUExecutionProvider", "session_options": options, "file_name": "onnx/model.onnx"}
    return _sizes(_sentence_transformer(folder, settings, backend="onnx", model_kwargs=kwargs))


# In the order in which they are started: fastembed reads the graph of ONNX float32.
ENCODERS: dict[str, Callable[[dict[str, Any]], dict[int, Encode]]] = {
    "torch float32": torch_float32,
    "torch bfloat16": torch_bfloat16,
    "onnx float32": onnx_float32,
    "onnx int8": onnx_int8,
    "openvino int8": openvino_int8,
    "fastembed": fastembed,
}


def _onnx_model(settings: dict[str, Any], folder: Path) -> Any:
    kwargs = {"export": True, "provider": "CPUExecutionProvider"}
    model = _sentence_transformer(settings["model"], settings, backend="onnx", model_kwargs=kwargs)
    model.save_pretrained(str(folder))
    return model


def _require(package: str, extra: str) -> Any:
    from importlib import import_module

    try:
        import_module("optimum." + ("onnxruntime" if extra == "onnx" else "intel"))
        return import_module(package)
    except ImportError as error:
        raise LeftOut(f'pip install "sentence-transformers[{extra}]"') from error


def _sentence_transformer(folder: str | Path, settings: dict[str, Any], **options: Any) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(settings["threads"])
    return SentenceTransformer(str(folder), device="cpu", **options)


def _sizes(model: Any) -> dict[int, Encode]:
    def encode(texts: Sequence[str], size: int) -> Any:
        return model.encode(list(texts), batch_size=size, show_progress_bar=False)

    return {size: lambda texts, size=size: encode(texts, size) for size in BATCH_SIZES}


def _made(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a folder of the cache, made beside its place and moved there when it is whole."""
    import shutil

    if not folder.is_dir():
        partial = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(folder)
    return folder


def main(name: str, file: str) -> None:
    """Answer the lines of stdin until it ends."""
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        with redirect_stdout(sys.stderr):
            encoders = (ENCODERS | {"plan": plan, "plan in order": plan_in_order})[name](settings)
    except LeftOut as error:
        return answer({"left_out": str(error)})
    except ImportError as error:
        return answer({"left_out": f"{error.name or error} is not installed"})
    except Exception as error:  # a library of another version: the others are still timed
        return answer({"left_out": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"})
    answer({})
    chosen: dict[str, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        texts, key = asked["texts"], asked["set"]
        if key not in chosen:  # it also compiles and allocates
            chosen[key] = min(encoders, key=lambda size: _seconds(encoders[size], texts)) if len(encoders) > 1 else 0
        encode = encoders[chosen[key]]
        start = time.perf_counter()
        for first in range(0, len(texts), asked["at_once"]):
            vectors = encode(texts[first : first + asked["at_once"]])
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "batch": chosen[key], "vectors": vectors.tolist() if asked["vectors"] else None})


def _seconds(encode: Encode, texts: Sequence[str]) -> float:
    encode(texts)
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
