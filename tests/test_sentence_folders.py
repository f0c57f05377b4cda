"""At K = E, every kind of sentence-transformers folder gives the embeddings that the library gives.

`python -m pytest -s tests/test_sentence_folders.py` prints the largest difference of each way for each folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ffn2moe
from ffn2moe.clients import sentence_transformers_folder
from ffn2moe.convert import Settings, convert
from ffn2moe.data.encode import encode
from ffn2moe.dense.load import load_dense
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.runtime.engines.onnxruntime import session
from tests.sentence_folders import FOLDERS, TEXTS, save
from tests.texts import make_texts

TOLERANCE = 1e-5
PLANS = ("dense", "sorted")


class Graph:
    """What optimum gives sentence-transformers for the backend onnx: a graph that answers like a model."""

    def __init__(self, model_name_or_path: str, config: Any, **_: Any) -> None:
        self.config = config
        self.run = session(Path(model_name_or_path) / "onnx/model.onnx").run

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.run(["last_hidden_state"], inputs)[0]))


def opened(folder: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, **options)


def converted(folder: Path, out: Path) -> Path:
    """Convert a folder at K = E and export it; return the export."""
    texts = out.with_name("texts.txt")
    texts.write_text("\n".join(text.replace("\n", " ") for text in make_texts(40)))
    settings = Settings(num_experts=4, num_active=4, distill_steps=0, corpus=str(texts), device="cpu", onnx=False)
    convert(str(folder), out, settings)
    teacher, tokenizer = load_dense(str(folder))
    student, spec = ffn2moe.load(out / "checkpoint"), ffn2moe.MoESpec.from_dict(_manifest(out)["spec"])
    export = out.with_name("export")
    write_manifest(export, export_model(student, teacher, tokenizer, spec, export, plans=PLANS))
    return export


def _manifest(path: Path) -> dict[str, Any]:
    from ffn2moe.runtime.files import read_manifest

    return read_manifest(path)


@pytest.mark.parametrize("name", FOLDERS)
def test_embeddings_are_those_of_the_library(name, tmp_path, monkeypatch):
    folder = save(name, tmp_path)
    theirs = opened(folder)
    export_folder = converted(folder, tmp_path / "converted")
    spec = ffn2moe.MoESpec.from_dict(_manifest(export_folder)["spec"])
    assert spec.sentence is not None and spec.max_length == theirs.max_seq_length
    prompts = [None, *(prompt for prompt, text in theirs.prompts.items() if text)]

    student, (_, tokenizer) = ffn2moe.load(export_folder / "checkpoint"), load_dense(str(folder))
    ways = {"torch": lambda prompt_name: _in_torch(student, tokenizer, spec, prompt_name)}
    for plan in PLANS:
        ways[plan] = partial(_in_onnx, ffn2moe.open_export(export_folder, plan))
    monkeypatch.setattr("sentence_transformers.base.modules.transformer.load_onnx_model", Graph)
    ours = sentence_transformers_folder(export_folder, tmp_path / "folder", "sorted")
    both = sentence_transformers_folder(export_folder, tmp_path / "both", "sorted", torch=True)
    ways["folder, onnx"] = partial(_in_library, opened(ours, backend="onnx"))
    ways["folder, torch"] = partial(_in_library, opened(both, trust_remote_code=True))
    ways["both, onnx"] = partial(_in_library, opened(both, backend="onnx", trust_remote_code=True))

    found = {}
    for way, encoded in ways.items():
        differences = []
        for prompt_name in prompts:
            expected = theirs.encode(TEXTS, prompt_name=prompt_name)
            answer = encoded(prompt_name)
            assert answer.shape == expected.shape
            differences.append(np.abs(answer - expected).max() / max(1, expected.std()))
        found[way] = max(differences)
    print(f"\n{name}: " + ", ".join(f"{way} {difference:.1e}" for way, difference in found.items()))
    assert max(found.values()) <= TOLERANCE, found


def _in_torch(student: Any, tokenizer: Any, spec: Any, prompt_name: str | None) -> np.ndarray:
    prompt = spec.sentence.prompt(prompt_name=prompt_name)
    found: np.ndarray = encode(student, tokenizer, TEXTS, max_length=spec.max_length, prompt=prompt).numpy()
    return found


def _in_onnx(export: Any, prompt_name: str | None) -> np.ndarray:
    found: np.ndarray = export.encode(TEXTS, prompt_name=prompt_name)
    assert found.shape[1] == export.width
    return found


def _in_library(model: Any, prompt_name: str | None) -> np.ndarray:
    found: np.ndarray = model.encode(TEXTS, prompt_name=prompt_name)
    return found
