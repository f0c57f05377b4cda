"""FactorLLM's recipe on a language model: the released code never trains its router, the published loss does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.ablation.methods import factorllm
from benchmarks.causal import Bench
from ffn2moe.moe.layer import MoEFFN, moe_layers
from tests.conftest import make_tiny_llama


@pytest.mark.parametrize("train_router", [False, True], ids=["released", "published"])
def test_the_router_learns_from_the_published_loss_alone(tmp_path: Path, monkeypatch, train_router: bool):
    bench = Bench(
        model=str(make_tiny_llama(tmp_path / "llama")),
        sample=tmp_path / "none",
        experts=4,
        texts=torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0)).tolist(),
        steps=2,
        batch_tokens=48,
        learning_rate=1e-2,
        length=12,
        container=None,
        seed=0,
    )
    starts: list[torch.Tensor] = []
    set_router = factorllm.set_router

    def watched(moe: MoEFFN) -> None:
        set_router(moe)
        starts.append(moe.router.weight.detach().clone())

    monkeypatch.setattr(factorllm, "set_router", watched)
    student, _ = bench.factorllm(2, Console(quiet=True), train_router=train_router)
    after = [moe.router.weight for moe in moe_layers(student)]
    assert all(torch.equal(one, start) != train_router for one, start in zip(after, starts, strict=True))
