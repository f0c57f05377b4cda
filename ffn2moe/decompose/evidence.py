"""Data about one layer's experts on calibration tokens: routers are fitted on it, and judged by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ffn2moe.moe.layer import MoEFFN


Loss = Callable[[Tensor, Tensor], Tensor]  # (scores [B, E] of some rows, their numbers [B]) -> mean over these rows


@dataclass(frozen=True)
class Grams:
    """Hold the Gram matrices of a layer's experts on R rows: tokens, or sums over tokens that share a choice."""

    gram_REE: Tensor
    tokens_R: Tensor  # int64; 1 where a row is a token
    whole: float  # energy of the layer's output, shared expert too
    routed_TD: Tensor | None = None  # the experts' sum, without scale, shared expert and output bias; where it was kept


@dataclass(frozen=True)
class Survey:
    """Hold what a router is fitted to: norms, gains and best choice of a layer's experts on R tokens or texts."""

    norm_TE: Tensor  # ||E_i(x)||; of a text, the root of the sum of its tokens' squares
    gain_TE: Tensor  # the scores should rank by it; over the mean energy of the layer's output
    chosen_TE: Tensor  # indicator of the best choice that the layer's selection allows
    grams: Grams


@dataclass(frozen=True)
class RouterData:
    """Hold what a router is fitted on: R rows, which are the T tokens, or groups of tokens that share a choice."""

    moe: MoEFFN
    x_TD: Tensor  # the layer's inputs
    read_RD: Tensor  # the rows that the router reads
    survey: Survey  # norms, gains and best choice of every expert on the rows
    chunk: int  # tokens to work on at once
