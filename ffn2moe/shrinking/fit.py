"""Fit a smaller layer to what the layer before it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import WIDEST_MOMENTS
from ffn2moe.shrinking.usage import chunks

PENALTY = 0.1  # of the output matrices' fit: best at 500, 2,000 and 9,000 tokens of MiniLM (of 0.01, 0.1 and 1)


@torch.no_grad()
def imitate(made: MoEFFN, moe: MoEFFN, x_TD: Tensor) -> None:
    """Fit `made` in place, in closed form, to the output of `moe` on tokens [T, D].

    First scale and output bias, as `fit_scale_and_mean` fits them to the sum of all experts. Then the output matrices
    (ffn2moe.decompose.reconstruct), if the layer has one budget, since budgets share them, and at most
    `WIDEST_MOMENTS` neurons. No step increases the error on these tokens.
    """
    for active in made.budgets:
        made.set_active(active)
        moe.set_active(active)
        wanted, routed = [], []
        for x in chunks(moe, x_TD):
            scores_TE = made.scores(x)
            routed.append(made.grouped(x, scores_TE, made.router.choose(scores_TE, active)))
            wanted.append(moe(x) - made.finish(x, torch.zeros_like(x)))
        y_TD, y_S_TD = torch.cat(wanted), torch.cat(routed)
        moves_bias = made.b_out is not None and active == made.budgets[0]
        y_mean = y_TD.mean(0) if moves_bias else torch.zeros_like(y_TD[0])
        y_S_mean = y_S_TD.mean(0) if moves_bias else torch.zeros_like(y_TD[0])
        own = (y_S_TD - y_S_mean).square().sum(dtype=torch.float64)
        if own > 0:
            cross = ((y_S_TD - y_S_mean) * (y_TD - y_mean)).sum(dtype=torch.float64)
            made.set_scale((cross / own).item())
        if moves_bias:
            made.b_out += y_mean - made.scale * y_S_mean
    made.set_active(made.budgets[0])
    moe.set_active(moe.budgets[0])
    if len(made.budgets) == 1 and made.w_in.shape[:2].numel() <= WIDEST_MOMENTS:
        target_TD = torch.cat([moe(x) for x in chunks(moe, x_TD)])
        refit_outputs(made, x_TD, target_TD, penalty=PENALTY)
