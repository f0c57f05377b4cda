"""Measure how much the texts of a task use each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import chunk_of


@dataclass(frozen=True)
class Tokens:
    """The inputs [T, D] of a model's layers on some texts."""

    inputs: Sequence[Tensor]


def see(model: Any, batches: Sequence[Batch], max_tokens: int, device: str = "cpu") -> Tokens:
    """Run texts through a model and return the inputs of its mixtures, at most `max_tokens` tokens."""
    inputs = layer_inputs(model, batches, max_tokens=max_tokens, device=device)
    model.to("cpu")
    return Tokens(inputs)


@torch.no_grad()
def usage(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """Return how much tokens [T, D] use each expert: the sum of its gates, float64 [E]; unit gates count the tokens."""
    use_E = torch.zeros(moe.num_experts, dtype=torch.float64)
    for x in chunks(moe, x_TD):
        scores_TE = moe.scores(x)
        choice = moe.router.choose(scores_TE, moe.num_active)
        gate_TK = moe.router.weigh(scores_TE, choice).double()
        use_E.index_add_(0, choice.experts_TK.flatten(), gate_TK.flatten())
    return use_E


def most_used(use_E: Tensor, keep: int) -> Tensor:
    """Return the experts to keep, in order, [K]; of two that are used equally the first."""
    return use_E.argsort(descending=True, stable=True)[:keep].sort().values


def chunks(moe: MoEFFN, x_TD: Tensor) -> Sequence[Tensor]:
    """Return tokens [T, D] in parts whose outputs of all experts fit in memory."""
    return x_TD.split(chunk_of(moe.num_experts * x_TD.shape[1]))
