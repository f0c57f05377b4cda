"""Make a dense FFN narrower: some neurons stay, for every token, and the output matrix is fitted again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ffn2moe.decompose.elimination import most_needed
from ffn2moe.decompose.layer import dense_ffn, outputs
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.width_costs import weighed
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.reduction import with_ffns
from ffn2moe.moe.variants import whole
from ffn2moe.numerics import chunk_of, low_precision
from ffn2moe.progress import Track, untracked

PENALTY = 1e-2  # of the refit, relative to the mean energy of an activation


@torch.no_grad()
def narrowed(ffn: DenseFFN, x_TD: Tensor, width: int, fisher_DD: Tensor | None = None) -> DenseFFN:
    """Return an FFN of `width` of the neurons, whose output matrix and bias are fitted to `ffn` on tokens [T, D].

    Those stay that can stand in for the others (`most_needed`), as in ZipLM (arXiv 2302.04089); `fisher_DD` weighs the
    error by what it costs the model (`ffn2moe.decompose.gradients`).
    """
    if width >= ffn.ffn_width:
        return ffn
    gram_FF = torch.zeros(ffn.ffn_width, ffn.ffn_width)
    with low_precision(ffn.ffn_width, x_TD.device):
        for x in x_TD.split(chunk_of(ffn.ffn_width)):
            h_TF = ffn.neurons(x).float()
            gram_FF += h_TF.T @ h_TF
    kept_S = most_needed(gram_FF, ffn.w_out_DF if fisher_DD is None else weighed(ffn, fisher_DD), width)
    moe = whole(replace(ffn.narrow(kept_S), b_out_D=ffn.b_out_D))
    refit_outputs(moe, x_TD, outputs(ffn, x_TD), penalty=PENALTY, chunk=chunk_of(width))
    return dense_ffn(moe)


@torch.no_grad()
def relative_error(narrow: DenseFFN, ffn: DenseFFN, x_TD: Tensor) -> float:
    """Return how far a narrow FFN is from the one that it was made of, on tokens [T, D]: ``||y' - y|| / ||y||``."""
    wanted_TD = outputs(ffn, x_TD)
    return float((outputs(narrow, x_TD) - wanted_TD).norm() / wanted_TD.norm())


def with_narrow_ffns(
    model: Any,
    inputs: Sequence[Tensor],
    widths: Sequence[int],
    head: str,
    track: Track = untracked,
    fishers: Sequence[Tensor] | None = None,
) -> tuple[Any, list[float]]:
    """Return a new model whose FFNs are `narrowed` to `widths` on their inputs, [T, D] each, and the error of each."""
    ffns, errors = [], []
    for index, x_TD in track(enumerate(inputs), len(inputs), "narrowing FFNs"):
        ffn = read_ffn(model, index)
        ffns.append(narrowed(ffn, x_TD, widths[index], fishers[index] if fishers else None))
        errors.append(relative_error(ffns[-1], ffn, x_TD))
    return with_ffns(model, ffns, head), errors
