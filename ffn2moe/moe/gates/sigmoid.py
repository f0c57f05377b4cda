"""Weight each chosen expert by the sigmoid of its own score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffn2moe.choices import Gate

if TYPE_CHECKING:
    from torch import Tensor


def sigmoid(scores_TE: Tensor, experts_TK: Tensor, used_TK: Tensor | None) -> Tensor:
    """Return ``sigmoid(s)`` of the chosen experts, [T, K]."""
    return scores_TE.gather(-1, experts_TK).sigmoid()


# DeepSeek-V3 and GLM4-MoE without renormalisation; they rank experts by the gates plus the balance bias.
ROW = Gate("sigmoid", "sigmoid(s)", "DeepSeek-V3, arXiv 2412.19437", sigmoid, lambda E, K: 2.0, ranks=True)
