"""An export opens in other libraries; `python -m tests.acceptance.clients` runs the library itself on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ffn2moe.moe import checkpoint
from ffn2moe.onnx.sentence_transformers import sentence_transformers_folder
from ffn2moe.runtime.engines.onnxruntime import session
from ffn2moe.runtime.export import open_export
from tests.texts import make_texts


def test_sentence_transformers_finds_graph_tokenizer_and_pooling(exported: Path, tmp_path: Path):
    """What the library does with the folder: tokenize, run the graph, pool `last_hidden_state`, normalise."""
    models = pytest.importorskip("sentence_transformers.models")
    folder = sentence_transformers_folder(exported / "models/exported", tmp_path / "model", "sorted")
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["type"].rsplit(".", 1)[-1] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    pooling = models.Pooling.load(str(folder / modules[1]["path"]))
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(folder).hidden_size == 32
    texts = make_texts(6)
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    batch = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=limit, return_tensors="np"
    )
    names = ("input_ids", "attention_mask")
    hidden_BLD = session(folder / "onnx/model.onnx").run(["last_hidden_state"], {name: batch[name] for name in names})[
        0
    ]
    pooled_BD = pooling(
        {"token_embeddings": torch.from_numpy(hidden_BLD), "attention_mask": torch.from_numpy(batch["attention_mask"])}
    )["sentence_embedding"]
    expected_BD = torch.from_numpy(open_export(exported / "models/exported", "sorted").encode(texts))
    assert torch.allclose(torch.nn.functional.normalize(pooled_BD, dim=-1), expected_BD, atol=1e-5)
    assert checkpoint.load_spec(exported / "models/exported/checkpoint").max_length == limit


def test_a_folder_that_is_taken_and_an_unknown_plan_are_refused(exported: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        sentence_transformers_folder(exported / "models/exported", tmp_path / "taken")
    with pytest.raises(ValueError, match="no plan 'fast'; it has"):
        sentence_transformers_folder(exported / "models/exported", tmp_path / "new", "fast")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
