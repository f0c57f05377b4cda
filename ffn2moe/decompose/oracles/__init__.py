"""The best choice of experts that each selection allows: one file, one row of `ORACLES`, named as the selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ffn2moe.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.decompose.evidence import Grams, Loss, Survey
    from ffn2moe.moe.layer import MoEFFN


class SelectionOracle(ABC):
    """The oracle of one selection, on R tokens or texts whose Gram matrices are known."""

    rates_numbers = False  # whether score n rates the choice of n experts, not expert n

    @abstractmethod
    def choose(self, found: Grams, mean: float, most: int | None) -> Tensor:
        """Return the indicator [R, E] of the best choice: `mean` experts a token on average, at most `most`."""

    @abstractmethod
    def gains(self, found: Grams, num_active: int, most: int | None) -> tuple[Tensor, Tensor]:
        """Return the indicator of the best choice and the gains that scores should rank by, [R, E] each."""

    @abstractmethod
    def regret(self, moe: MoEFFN, survey: Survey) -> Loss:
        """Return the error to expect when scores draw the experts: 0 for the best choice, 1 for a blind one."""


ORACLES: Table[SelectionOracle] = Table("selection", package="ffn2moe.decompose.oracles")
