"""Weight the chosen experts by the softmax over the chosen experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffn2moe.choices import Gate

if TYPE_CHECKING:
    from torch import Tensor


def softmax_of_chosen(scores_TE: Tensor, experts_TK: Tensor, used_TK: Tensor | None) -> Tensor:
    """Return ``softmax(s)`` over the experts that each token uses, [T, K]."""
    chosen_TK = scores_TE.gather(-1, experts_TK)
    if used_TK is not None:
        chosen_TK = chosen_TK.masked_fill(~used_TK, float("-inf"))
    return chosen_TK.softmax(-1)


ROW = Gate(
    "softmax_topk",
    "softmax(s) over the chosen K",
    "Mixtral, arXiv 2401.04088",
    softmax_of_chosen,
    lambda E, K: float(K),
    constant="for one expert",
)
