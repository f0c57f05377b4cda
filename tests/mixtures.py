"""A tiny mixture, made on the spot: what the export and the runtime are tested on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.sentence import attach
from ffn2moe.literals import Pooling
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import FFNShape, Head, MoESpec
from tasks.corpus import write_jsonl
from tests.texts import make_texts, write_corpus


def carve(
    teacher: Path,
    *,
    head: Head = "embedding",
    num_experts: int = 4,
    num_active: int = 2,
    pooling: Pooling = "mean",
    output_scale: float = 1.25,
    **options: Any,
) -> tuple[Any, MoESpec]:
    """The teacher with its FFNs cut into experts that a random router chooses from, and the spec of that.

    `options` go to `spec_of`. Where tokens use a number of experts of their own, it is `num_active` on average over
    random tokens.
    """
    model, _ = load_dense(str(teacher))
    if head == "embedding":
        attach(model, SentenceModules(pooling=(pooling,)))
    spec = spec_of(
        model,
        head=head,
        num_experts=num_experts,
        num_active=num_active,
        partition="contiguous",
        teacher="tiny",
        max_length=32,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    layers = []
    for index in range(spec.num_layers):
        expert_of_neuron_F = torch.arange(spec.ffn_width) * num_experts // spec.ffn_width
        neurons_EM = neurons_by_expert(expert_of_neuron_F, num_experts)
        moe = MoEFFN.from_experts(spec, slice_experts(read_ffn(model, index), neurons_EM), neurons_EM, index)
        with torch.no_grad():
            moe.router.weight.copy_(torch.randn(moe.router.weight.shape, generator=generator))
            moe.router.balance_bias.copy_(torch.linspace(-0.1, 0.1, num_experts))
            moe.output_scale.fill_(output_scale)
            moe.router.calibrate(moe.router(torch.randn(512, spec.width, generator=generator)), moe.num_active)
        layers.append(moe)
    install_moe(model, layers)
    return model.eval(), spec


def make_workspace(root: Path, teacher: Path, **options: Any) -> Path:
    """What the stage `export` reads: a teacher, a student carved from it (`carve`), texts and pairs."""
    model, spec = carve(teacher, **options)
    _, tokenizer = load_dense(str(teacher))
    shutil.copytree(teacher, root / "data/teacher")
    checkpoint.save(model, tokenizer, spec, root / "models/distilled")
    write_corpus(root / "data/corpus/evaluation.jsonl", make_texts(40))
    write_corpus(root / "data/corpus/calibration.jsonl", make_texts(40, seed=2))
    pairs = [text.split("\n\n") for text in make_texts(30, seed=1)]
    write_jsonl(root / "data/benchmarks/retrieval.jsonl", ({"query": q, "document": d} for q, d in pairs))
    figures = {name: {"retrieval": {"ndcg_at_10": 0.5}} for name in ("teacher", "student")}
    (root / "metrics").mkdir()
    (root / "metrics/evaluate.json").write_text(json.dumps(figures))
    return root


def flat_spec(**values: Any) -> MoESpec:
    """A spec of one stack, with the values of the stack beside the others."""
    stack = {
        "layers": "encoder.layer",
        "num_layers": 2,
        "width": 32,
        "ffn_width": 64,
        "expert_width": 16,
        "shared_width": 0,
        "gated": False,
        "activation": "gelu",
    }
    whole = {
        "family": "bert",
        "model_class": "BertModel",
        "head": "embedding",
        "num_experts": 4,
        "num_active": 2,
        "gate": "unit",
        "router_bias": True,
        "container": None,
        "partition": "contiguous",
        "teacher": "tiny",
        "sentence": SentenceModules(),
        "max_length": 32,
    }
    stack |= {name: value for name, value in values.items() if name in stack}
    whole |= {name: value for name, value in values.items() if name not in stack}
    return MoESpec(**whole, stacks=(FFNShape(**stack),))
