"""The table of divergences: how far the student's distribution over tokens or classes is from the teacher's.

Each file of this folder holds one row. Importing the package imports no row, and so no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffn2moe.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.data.ranks import Ranks


@dataclass(frozen=True)
class Divergence:
    """One divergence.

    `loss` takes the logits of student and teacher at the same positions, [T, V] float32, and the share of the training
    that is done, 0 to 1. It returns the mean over the positions in nats. If several processes (`Ranks`) share the
    positions, it returns this process's part of that mean.

    `of_tokens` takes the same logits and share, and returns the divergence of each position, [T], in nats. None where
    positions are compared with each other: then the logits of a batch must be in memory together.
    """

    loss: Callable[[Tensor, Tensor, float, Ranks], Tensor]
    reference: str  # the paper, or where it is described
    of_tokens: Callable[[Tensor, Tensor, float], Tensor] | None = None
    # The heads whose logits it can compare.
    heads: tuple[str, ...] = ("causal", "seq2seq", "classification", "token_classification")


DIVERGENCES: Table[Divergence] = Table("divergence", package=__name__)
