"""The selection `prefix`: the first n experts in order of importance, n by the router, K on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffn2moe.choices import SELECTIONS, Selection
from ffn2moe.spec import MoESpec

BISECTIONS = 60  # for the price of an expert: to the last bit of a float32


class Prefix(Selection):
    """The first n experts: the score s_n says that n are enough, and n is the highest.

    `balance_bias` holds the price ``-lambda n`` at which n is K on average; balancing leaves it alone, as the first
    experts are used more by definition. Gates are 1.
    """

    name = "prefix"
    reference = "SortedNet, arXiv 2309.00255"
    calibrated = "balance_bias"
    ordered = True

    def check(self, spec: MoESpec) -> None:
        """Raise ValueError where a spec asks for another gate than unit, or leaves the router nothing to choose."""
        super().check(spec)
        if spec.gate != "unit":
            raise ValueError(
                f"the gate {spec.gate} weighs experts by scores of their own, and with selection prefix a score is "
                "that of a number of experts: use the gate unit"
            )
        if spec.num_active == 1 < spec.num_experts:
            raise ValueError(
                "with selection prefix and num_active = 1 every token uses the first expert and the router has "
                "nothing to choose: use more and narrower experts, such as twice as many of which 2 are active"
            )

    def describe(self, spec: MoESpec) -> str:
        """Return how many of the experts are chosen, in words."""
        return f"the first {spec.num_active} on average"

    def choose(self, router: Any, ranked_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor | None]:
        """Return all experts in order, int64 [T, E], and which of them the prefix reaches, bool."""
        E = ranked_TE.shape[1]
        experts_TE = torch.arange(E, device=ranked_TE.device).expand(len(ranked_TE), E)
        return experts_TE, None if num_active == E else experts_TE <= ranked_TE.argmax(1, keepdim=True)

    def weigh(self, router: Any, scores_TE: Tensor, choice: Any, training: bool) -> Tensor:
        """Return 1 for each used expert, [T, E].

        Training passes the gradient of the probability that the prefix reaches expert j,
        ``sum over n > j of softmax(s)_n``, straight through.
        """
        gate_TE: Tensor = choice.indicator_TE(scores_TE.shape[1])
        if not training:
            return gate_TE
        reached_TE = self.ranked(router, scores_TE).softmax(-1).flip(1).cumsum(1).flip(1)
        return gate_TE * (1 + reached_TE - reached_TE.detach())

    def calibration(self, router: Any, scores_TE: Tensor, num_active: int) -> Tensor:
        """Return ``-lambda n`` for n from 1 to E, [E], by bisection: the mean length falls with the price lambda."""
        length_E = _lengths(scores_TE)
        high = (scores_TE.amax(1) - scores_TE.amin(1)).max().item() + 1.0  # here each token has one expert
        low = -high  # and here all
        for _ in range(BISECTIONS):
            price = (low + high) / 2
            mean = ((scores_TE - price * length_E).argmax(1) + 1.0).mean().item()
            low, high = (price, high) if mean > num_active else (low, price)
        return -((low + high) / 2) * _lengths(router.balance_bias)


def _lengths(like: Tensor) -> Tensor:
    """Return 1, 2, ..., E: the lengths of the prefixes."""
    return torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=like.dtype)


SELECTIONS.register("prefix", Prefix())
