"""The selection `threshold`: the experts whose score is near the best, K on average (D2DMoE, arXiv 2310.04361)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.ablation.method import Method, add
from ffn2moe.choices import SELECTIONS, Selection
from ffn2moe.spec import MoESpec


class Threshold(Selection):
    """Experts with ``s_i >= max s - margin``, at least one and at most `max_active`; s includes the balance bias.

    With p = softmax(s) that is D2DMoE's ``p_i >= (1 - tau) max p`` for ``margin = -log(1 - tau)``. The margin is the
    same for all tokens and such that they use K experts on average.
    """

    name = "threshold"
    reference = "D2DMoE, arXiv 2310.04361"
    calibrated = "margin"
    buffers = ("margin",)
    limited = True

    def describe(self, spec: MoESpec) -> str:
        """Return how many of the experts are chosen, in words."""
        return f"{spec.num_active} on average" + (f" and at most {spec.max_active}" if spec.max_active else "")

    def choose(self, router: Any, ranked_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor | None]:
        """Return the `max_active` best experts, int64 [T, max_active], and which are within the margin, bool."""
        if num_active == ranked_TE.shape[1]:
            return ranked_TE.topk(num_active, dim=-1).indices, None
        best_TK, experts_TK = ranked_TE.topk(router.max_active, dim=-1)
        return experts_TK, best_TK >= best_TK[:, :1] - router.margin

    def calibration(self, router: Any, scores_TE: Tensor, num_active: int) -> Tensor:
        """Return the margin in closed form, a scalar.

        Of the T (max_active - 1) gaps to the best score, T (K - 1) are within the margin.
        """
        best_TK = self.ranked(router, scores_TE).topk(router.max_active, dim=-1).values
        gaps = (best_TK[:, :1] - best_TK[:, 1:]).flatten().sort().values
        wanted = len(scores_TE) * (num_active - 1)
        if wanted == 0:
            return gaps.new_zeros(())
        # Half-way to the next gap, so that rounding decides for no token.
        return gaps[wanted - 1 : wanted + 1].mean()

    def rescale(self, router: Any, ratio: Tensor) -> None:
        """Scale the margin with the scores."""
        router.margin *= ratio


SELECTIONS.register("threshold", Threshold())
add(
    Method(
        "threshold",
        "threshold, K on average",
        "selection",
        "D2DMoE, arXiv 2310.04361",
        selection="threshold",
    )
)
