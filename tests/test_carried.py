"""Kinds of rotary embedding and sliding windows are carried through every form of a model, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ffn2moe.containers import write
from ffn2moe.containers.checks import compare, same_logits
from ffn2moe.containers.gguf.write import write_gguf
from ffn2moe.moe import checkpoint
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.runtime.export import open_export
from tests.gguf_students import VOCABULARY, byte_level
from tests.test_containers import LLAMA3, THETA, student_of

LENGTH = 100  # beyond the original positions of the scaled kinds, and beyond the windows
ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.5, 4.0]}
GROWING = "positions are computed anew once a text has grown"
# Settings -> why no ONNX graph, and why no GGUF file can be made of them; None: it is made.
KINDS: dict[str, tuple[str, dict[str, Any], str | None, str | None]] = {
    "default": ("llama", {"rope_type": "default"}, None, None),
    "linear": ("llama", {"rope_type": "linear", "factor": 3.0}, None, None),
    "llama3": ("llama", {"rope_type": "llama3", **LLAMA3}, None, None),
    "yarn": ("llama", {"rope_type": "yarn", **ORIGINAL}, None, None),
    "dynamic": (
        "llama",
        {"rope_type": "dynamic", "factor": 2.0},
        GROWING,
        "of the kind 'dynamic'",
    ),
    "longrope": ("llama", {"rope_type": "longrope", **ORIGINAL, **FACTORS}, GROWING, None),
    "window": ("mistral with window", {"rope_type": "default"}, None, None),
    "windows of some layers": ("qwen2 with windows", {"rope_type": "default"}, None, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_carried_or_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    source, rope, no_graph, no_file = KINDS[kind]
    name = "qwen2_moe" if source.startswith("qwen2") else "mixtral"
    positions = 64 if kind == "dynamic" else 128  # which scales once a text is longer than the model's positions
    values = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_theta": THETA, **rope},
    }
    student, spec = student_of(name, source, bos_token_id=1, eos_token_id=2, **values)
    plain, _ = student_of(
        name, source.split(" with")[0], **values | {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}
    )
    tokenizer, ids = byte_level(), torch.arange(4, 4 + LENGTH).unsqueeze(0)
    with torch.no_grad():
        known = student(ids).logits
        if kind != "default":  # it matters
            assert compare(plain(ids).logits, known).largest > 1e-2
        checkpoint.save(student, tokenizer, spec, tmp_path / "checkpoint")
        torch.testing.assert_close(checkpoint.load(tmp_path / "checkpoint")(ids).logits, known)
    write.save(student, spec, tmp_path / "container", tokenizer=tokenizer)
    assert same_logits(student, tmp_path / "container", ids).mean < 1e-5
    if no_graph is None:
        manifest = export_model(student, None, tokenizer, spec, tmp_path / "export", plans=("sorted",))
        write_manifest(tmp_path / "export", manifest)
        found = open_export(tmp_path / "export", threads=1).logits(ids[0].tolist())
        np.testing.assert_allclose(found, known[0].numpy(), atol=2e-4 * float(known.abs().max()))
    else:
        with pytest.raises(ValueError, match=no_graph):
            export_model(student, None, tokenizer, spec, tmp_path / "export", plans=("sorted",))
    if no_file is None:
        write_gguf(tmp_path / "container", tmp_path / "out.gguf", "f32")
    else:
        with pytest.raises(ValueError, match=no_file):
            write_gguf(tmp_path / "container", tmp_path / "out.gguf", "f32")
