"""FLAP (arXiv 2312.11983): static pruning by the fluctuation of neurons, with the output bias as compensation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.ablation.compressors import keep
from benchmarks.ablation.linear_maps import CompressedFFN, Dense
from ffn2moe.dense.ffn import DenseFFN


def fluctuation(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Return the weighted variance of each neuron, [F]: ``var(h_j) ||w_out[:, j]||^2`` (WIFV in its code)."""
    return ffn.neurons(x_TD).var(0) * ffn.w_out_DF.square().sum(0)


def pruned(ffn: DenseFFN, x_TD: Tensor, kept_F: Tensor) -> CompressedFFN:
    """Return the neurons that a mask [F] keeps; the output bias gets the mean of what the others gave."""
    mean_F = ffn.neurons(x_TD).mean(0)
    bias_D = ffn.w_out_DF[:, ~kept_F] @ mean_F[~kept_F]
    if ffn.b_out_D is not None:
        bias_D = bias_D + ffn.b_out_D
    neurons_S = kept_F.nonzero().flatten()
    return keep(ffn, neurons_S, Dense(ffn.w_out_DF[:, neurons_S], bias_D))


def masks(scores_LF: Sequence[Tensor], share: float, *, same: bool) -> list[Tensor]:
    """Return which neurons of each layer stay, a share of all: as many in each layer, or over all layers at once.

    Over all layers the scores are standardised in each layer first (AL in its code).
    """
    if same:
        return [_highest(scores_F, round(share * len(scores_F))) for scores_F in scores_LF]
    standard = [(scores_F - scores_F.mean()) / scores_F.std() for scores_F in scores_LF]
    together = torch.cat(standard)
    return list(_highest(together, round(share * len(together))).split([len(scores_F) for scores_F in scores_LF]))


def _highest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask
