"""A tiny mixture, made on the spot: what the export and the runtime are tested on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ffn2moe import checkpoint
from ffn2moe.dense import family_of, ffn_layers, load_dense, read_ffn
from ffn2moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe import MoEFFN, install_moe
from ffn2moe.spec import MoESpec, Pooling
from tasks.corpus import write_jsonl
from tests.texts import make_texts, write_corpus


def carve(
    teacher: Path,
    *,
    num_experts: int = 4,
    num_active: int = 2,
    pooling: Pooling = "mean",
    output_scale: float = 1.25,
) -> tuple[Any, MoESpec]:
    """The teacher with its FFNs cut into experts that a random router chooses from, and the spec of that."""
    model, _ = load_dense(str(teacher))
    ffn = read_ffn(model, 0)
    spec = MoESpec(
        family=family_of(model).name,
        model_class=type(model).__name__,
        width=ffn.w_in_FD.shape[1],
        ffn_width=ffn.ffn_width,
        num_layers=len(ffn_layers(model)),
        num_experts=num_experts,
        expert_width=-(-ffn.ffn_width // num_experts),
        num_active=num_active,
        gated=False,
        activation=ffn.activation,
        partition="contiguous",
        teacher="tiny",
        pooling=pooling,
        max_length=32,
    )
    generator = torch.Generator().manual_seed(1)
    layers = []
    for index in range(spec.num_layers):
        expert_of_neuron_F = torch.arange(spec.ffn_width) * num_experts // spec.ffn_width
        neurons_EM = neurons_by_expert(expert_of_neuron_F, num_experts)
        moe = MoEFFN.from_experts(spec, slice_experts(read_ffn(model, index), neurons_EM), neurons_EM)
        with torch.no_grad():
            moe.router.weight.copy_(torch.randn(moe.router.weight.shape, generator=generator))
            moe.router.balance_bias.copy_(torch.linspace(-0.1, 0.1, num_experts))
            moe.output_scale.fill_(output_scale)
        layers.append(moe)
    install_moe(model, layers)
    return model.eval(), replace(spec, expert_width=layers[0].w_in.shape[1])


def make_workspace(root: Path, teacher: Path) -> Path:
    """What the stage `export` reads: a teacher, a student carved from it, texts and pairs."""
    model, spec = carve(teacher)
    _, tokenizer = load_dense(str(teacher))
    shutil.copytree(teacher, root / "data/teacher")
    checkpoint.save(model, tokenizer, spec, root / "models/distilled")
    write_corpus(root / "data/corpus/evaluation.jsonl", make_texts(40))
    pairs = [text.split("\n\n") for text in make_texts(30, seed=1)]
    write_jsonl(root / "data/benchmarks/retrieval.jsonl", ({"query": q, "document": d} for q, d in pairs))
    figures = {name: {"retrieval": {"ndcg_at_10": 0.5}} for name in ("teacher", "student")}
    (root / "metrics").mkdir()
    (root / "metrics/evaluate.json").write_text(json.dumps(figures))
    return root
