"""Weight the chosen experts by the softmax over all experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffn2moe.choices import Gate

if TYPE_CHECKING:
    from torch import Tensor


def softmax(scores_TE: Tensor, experts_TK: Tensor, used_TK: Tensor | None) -> Tensor:
    """Return ``softmax(s)`` over all E experts, at the chosen ones, [T, K]."""
    return scores_TE.softmax(-1).gather(-1, experts_TK)


ROW = Gate("softmax", "softmax(s) over all E", "Qwen2-MoE", softmax, lambda E, K: float(E))
