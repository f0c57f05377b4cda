"""Closed-form weights that a router's fit starts from: one file, one row of `STARTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffn2moe.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.decompose.evidence import RouterData


@dataclass(frozen=True)
class RouterStart:
    """A way to start a router."""

    reference: str
    # (data, penalty of a ridge regression) -> weight [E, D] and bias [E]
    weights: Callable[[RouterData, float], tuple[Tensor, Tensor]]
    # Whether a score rates a single expert; such a start does not fit a selection whose scores rate numbers of experts.
    single_experts: bool = True


STARTS: Table[RouterStart] = Table("router start", package="ffn2moe.decompose.starts")
