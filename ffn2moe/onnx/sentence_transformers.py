"""Write an export as a folder that sentence-transformers opens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, get_args

from ffn2moe.literals import Pooling
from ffn2moe.runtime.files import checked_files, no_such_plan, read_manifest
from ffn2moe.runtime.plans import default_plan
from ffn2moe.sentence import Dense, LayerNorm, Module, SentenceModules

# Names of classes that the library knows since 2.0. The other one opens a mixture in PyTorch, by this package.
_LIBRARY, _OURS = "sentence_transformers.models", "ffn2moe.mixture_transformer.MixtureTransformer"
# The flag of each pooling; the library reads it in every version, and joins vectors in this order.
_FLAGS: dict[Pooling, str] = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
assert tuple(_FLAGS) == get_args(Pooling)


def sentence_transformers_folder(
    export: str | Path, out: str | Path, plan: str | None = None, *, torch: bool = False
) -> Path:
    """Write a folder that ``SentenceTransformer(out, backend="onnx")`` opens without this package, and return it.

    It holds one plan's graph (by default the portable one of an export by `make run`) as ``onnx/model.onnx``, the
    tokenizer, and the modules that make embeddings of hidden states, with prompts and similarity; the library runs
    those modules itself on the graph's output `last_hidden_state`. With `torch` it also holds the checkpoint, and opens
    as ``SentenceTransformer(out, trust_remote_code=True)``, with either backend, where this package is installed.

    Written beside `out` and renamed at the end. ValueError for an export that makes no embeddings, an unknown plan, or
    a folder that is taken; a damaged graph is refused.
    """
    export, out = Path(export), Path(out)
    manifest = read_manifest(export)
    spec = manifest["spec"]
    if spec["head"] != "embedding":
        raise ValueError(f"{export} is a {spec['head']} model: sentence-transformers opens embedding models only")
    chosen = plan or manifest.get("portable") or default_plan(export, manifest["plans"])
    if chosen not in manifest["plans"]:
        raise ValueError(no_such_plan(export, manifest, chosen))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: remove it, or name another folder")
    graph, *_ = checked_files(export, manifest["plans"][chosen])

    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(export / "tokenizer", partial)
        (partial / "onnx").mkdir()
        shutil.copyfile(graph, partial / "onnx" / "model.onnx")
        for name in manifest["plans"][chosen].get("more", ()):  # the graph's weights, which it names
            shutil.copyfile(export / name, partial / "onnx" / Path(name).name)
        for file in sorted((export / "checkpoint").iterdir()):
            if torch or file.name == "config.json":
                shutil.copyfile(file, partial / file.name)
        _write_modules(export, partial, spec, _OURS if torch else f"{_LIBRARY}.Transformer")
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write_modules(export: Path, folder: Path, spec: dict[str, Any], transformer: str) -> None:
    """Write the list of modules, and the settings and weights of each."""
    sentence = SentenceModules.of_spec(spec)
    types = [transformer, f"{_LIBRARY}.Pooling", *(f"{_LIBRARY}.{type(one).__name__}" for one in sentence.modules)]
    paths = ["", *(f"{index}_{name.rsplit('.', 1)[1]}" for index, name in enumerate(types[1:], 1))]
    chain = [
        {"idx": index, "name": str(index), "path": path, "type": kind}
        for index, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    _write_json(folder / "modules.json", chain)
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": spec["max_length"], "do_lower_case": sentence.do_lower_case},
    )
    settings: dict[str, Any] = {
        "prompts": dict(sentence.prompts),
        "default_prompt_name": sentence.default_prompt_name,
        "similarity_fn_name": sentence.similarity,
    }
    if sentence.truncate_dim is not None:
        settings["truncate_dim"] = sentence.truncate_dim
    _write_json(folder / "config_sentence_transformers.json", settings)
    _write_json(folder / paths[1] / "config.json", _pooling(sentence, spec["stacks"][0]["width"]))
    for index, (module, path) in enumerate(zip(sentence.modules, paths[2:], strict=True)):
        _write_module(export, folder / path, module, index)


def _pooling(sentence: SentenceModules, width: int) -> dict[str, Any]:
    found: dict[str, Any] = {"word_embedding_dimension": width}
    if list(sentence.pooling) == [mode for mode in _FLAGS if mode in sentence.pooling]:
        return found | {flag: mode in sentence.pooling for mode, flag in _FLAGS.items()}
    return found | {"pooling_mode": list(sentence.pooling)}  # another order, which only newer versions know


def _write_module(export: Path, folder: Path, module: Module, index: int) -> None:
    if isinstance(module, Dense):
        settings: dict[str, Any] = {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias,
            "activation_function": f"torch.nn.{module.activation}",
        }
        if module.use_residual:
            settings["use_residual"] = True
        _write_json(folder / "config.json", settings)
        _write_weights(export, folder, index, prefix="")
    elif isinstance(module, LayerNorm):
        _write_json(folder / "config.json", {"dimension": module.dimension})
        _write_weights(export, folder, index, prefix="norm.")


def _write_weights(export: Path, folder: Path, index: int, *, prefix: str) -> None:
    """Copy the weights of a module from the checkpoint, with `prefix` before their names."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    tensors = {}
    before = f"sentence.chain.{index}."
    for path in sorted((export / "checkpoint").glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(before):
                    tensors[prefix + name.removeprefix(before)] = file.get_tensor(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
