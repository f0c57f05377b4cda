"""Measure how much the texts of a task use each expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffn2moe.choices import ROUTINGS
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import chunk_of, layer_inputs, texts_of
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.moe.texts import text_means
from ffn2moe.spec import MoESpec


@dataclass(frozen=True)
class Tokens:
    """The inputs [T, D] of a model's layers on some texts, and what their routers read."""

    inputs: Sequence[Tensor]
    route_TD: Tensor | None = None  # with routing `sequence`: the means of the tokens' texts


def see(model: Any, spec: MoESpec, batches: Sequence[Batch], max_tokens: int, device: str = "cpu") -> Tokens:
    """Run texts through a model and return the inputs of its mixtures, at most `max_tokens` tokens."""
    inputs = layer_inputs(model, batches, max_tokens=max_tokens, device=device)
    model.to("cpu")
    if ROUTINGS[spec.routing].own_input:
        return Tokens(inputs)
    return Tokens(inputs, text_means(inputs[0], texts_of(batches, max_tokens)))


@torch.no_grad()
def usage(moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None = None) -> Tensor:
    """Return how much tokens [T, D] use each expert: the sum of its gates, float64 [E]; unit gates count the tokens."""
    use_E = torch.zeros(moe.num_experts, dtype=torch.float64)
    for x, route in chunks(moe, x_TD, route_TD):
        scores_TE = moe.scores(x, route)
        choice = moe.router.choose(scores_TE, moe.num_active)
        gate_TK = moe.router.weigh(scores_TE, choice).double()
        use_E.index_add_(0, choice.experts_TK.flatten(), gate_TK.flatten())
    return use_E


def most_used(use_E: Tensor, keep: int) -> Tensor:
    """Return the experts to keep, in order, [K]; of two that are used equally the first."""
    return use_E.argsort(descending=True, stable=True)[:keep].sort().values


def chunks(moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Yield tokens [T, D], and what the router reads, a part at a time."""
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    for start in range(0, len(x_TD), chunk):
        rows = slice(start, start + chunk)
        yield x_TD[rows], None if route_TD is None else route_TD[rows]
