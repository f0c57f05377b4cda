"""Losses that the steps of a router's fit minimise: one file, one row of `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffn2moe.table import Table

if TYPE_CHECKING:
    from ffn2moe.decompose.evidence import Loss, RouterData


@dataclass(frozen=True)
class Phase:
    """A part of the fit: its share of the steps, and the loss that they minimise."""

    share: float
    loss: Loss


@dataclass(frozen=True)
class RouterObjective:
    """A loss for routers."""

    reference: str
    phases: Callable[[RouterData], list[Phase]]  # one phase after the other, on the rows of `data.survey`
    # Whether a score rates a single expert; such a loss does not fit a selection whose scores rate numbers of experts.
    single_experts: bool = True


OBJECTIVES: Table[RouterObjective] = Table("router objective", package="ffn2moe.decompose.objectives")
