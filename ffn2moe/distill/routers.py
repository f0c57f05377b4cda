"""Move the state of the routers that no gradient moves: the balance bias, and how many experts a token uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ffn2moe.data.batches import Batch, BatchSource
from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.steps import FOLLOW_RATE, FOLLOWED_TOKENS
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.layer import MoEFFN

SETTLING_BATCHES = 8  # batches on which `settle` sets the mean number of experts


class RouterState:
    """The routers of a model in training, and what they chose in the last forward pass."""

    def __init__(self, layers: Sequence[MoEFFN], balance_step: float, ranks: Ranks) -> None:
        self.layers = layers
        self.balance_step = balance_step
        self.ranks = ranks
        self._routed: list[tuple[Tensor, Choice]] = []  # scores and choice of each layer in this step

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Let the layers report each choice while the block runs."""
        for layer in self.layers:
            layer.observer = self._observe
        try:
            yield
        finally:
            for layer in self.layers:
                layer.observer = None

    def _observe(self, scores_TE: Tensor, choice: Choice) -> None:
        self._routed.append((scores_TE.detach(), choice))

    def forget(self) -> None:
        """Drop the choices of the last pass, before the next one."""
        self._routed = []

    @torch.no_grad()
    def move(self, batch: Batch) -> list[Tensor]:
        """Balance the load and follow the batch; return how many tokens use each expert, [E] a layer."""
        if not self.layers:
            return []
        routed = list(zip(self.layers, self._routed, strict=True))
        mine = [_of_real_tokens(choice.indicator_TE(layer.num_experts), batch).sum(0) for layer, (_, choice) in routed]
        loads = self.ranks.sum(torch.stack(mine)).unbind()
        for (layer, (scores_TE, _)), load_E in zip(routed, loads, strict=True):
            if self.balance_step:
                layer.router.balance(load_E, self.balance_step)
            if not _fixed(layer):  # a fixed K follows nothing, so no process need gather the scores
                scores_TE = self.ranks.gather(_of_real_tokens(scores_TE, batch)[:FOLLOWED_TOKENS])
                layer.router.follow(scores_TE[:FOLLOWED_TOKENS], layer.num_active, FOLLOW_RATE)
        return list(loads)

    @torch.no_grad()
    def settle(self, student: Any, batches: BatchSource, step: int, device: torch.device) -> None:
        """Set the mean number of experts to K on the batches from `step` on, where it is not fixed.

        It runs twice, because the choice of a layer changes the input of later layers.
        """
        if all(map(_fixed, self.layers)):
            return
        for _ in range(2):
            seen: list[list[Tensor]] = [[] for _ in self.layers]
            for batch in islice(batches.from_step(step), SETTLING_BATCHES):
                self.forget()
                batch = batch.part(self.ranks).to(device)
                student(**batch.inputs)
                for parts, (scores_TE, _) in zip(seen, self._routed, strict=True):
                    parts.append(self.ranks.gather(_of_real_tokens(scores_TE, batch)))
            for layer, parts in zip(self.layers, seen, strict=True):
                layer.router.calibrate(torch.cat(parts), layer.num_active)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that `move` changes, by name."""
        routers = enumerate(layer.router for layer in self.layers)
        return {
            f"{name}.{index}": router.get_buffer(name)
            for index, router in routers
            for name in ("balance_bias", *router.rule.buffers)
        }


def _fixed(layer: MoEFFN) -> bool:
    """Return whether every token uses exactly K experts."""
    return layer.router.rule.fixed


def _of_real_tokens(rows_TE: Tensor, batch: Batch) -> Tensor:
    """Return the rows of the tokens that are not padding; none of a text that stands in for an empty part."""
    if batch.stands_in:
        return rows_TE[:0]
    for mask in (batch.mask, batch.inputs.get("attention_mask")):
        if mask is not None and mask.numel() == len(rows_TE):
            return rows_TE[mask.flatten().bool()]
    return rows_TE
