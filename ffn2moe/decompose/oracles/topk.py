"""The oracle of top-K: the best K experts for each token."""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffn2moe.decompose import oracle
from ffn2moe.decompose.evidence import Grams, Loss, Survey
from ffn2moe.decompose.oracles import SelectionOracle
from ffn2moe.decompose.regret import enumerated_regret, independent_regret

if TYPE_CHECKING:
    from ffn2moe.moe.layer import MoEFFN

MAX_ENUMERATED = 512  # subsets whose errors are kept for every row; above, experts are drawn independently


class TopK(SelectionOracle):
    """Exact by enumeration up to `oracle.MAX_SUBSETS` subsets, greedy above."""

    def choose(self, found: Grams, mean: float, most: int | None) -> Tensor:
        """Return the best ``round(mean)`` experts, [R, E]."""
        parts = found.gram_REE.split(oracle.ROWS)
        return torch.cat([oracle.oracle(part, round(mean)).chosen_TE for part in parts])

    def gains(self, found: Grams, num_active: int, most: int | None) -> tuple[Tensor, Tensor]:
        """Return the best K experts and how much the error rises without each, [R, E] each."""
        parts = [oracle.oracle(part, num_active) for part in found.gram_REE.split(oracle.ROWS)]
        return torch.cat([part.chosen_TE for part in parts]), torch.cat([part.gain_TE for part in parts])

    def regret(self, moe: MoEFFN, survey: Survey) -> Loss:
        """Return the exact regret of subsets with ``softmax over subsets of sum of s_i``, or that of single draws.

        Up to `MAX_ENUMERATED` subsets it is exact. The scale is the best one for the best choice.
        """
        gram_REE, E, K = survey.grams.gram_REE, moe.num_experts, moe.num_active
        if comb(E, K) > MAX_ENUMERATED:
            return independent_regret(moe, survey)
        scale = oracle.fit_scale(survey.grams, survey.chosen_TE).scale
        indicator_CE = oracle.subsets(E, K).to(gram_REE)
        parts = [oracle.subset_errors(part, indicator_CE, scale) for part in gram_REE.split(oracle.ROWS)]
        return enumerated_regret(torch.cat(parts), indicator_CE)


ROW = TopK()
