"""Start from ridge regression on the norms of the experts' outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.decompose.evidence import RouterData
from ffn2moe.decompose.oracles import ORACLES
from ffn2moe.decompose.starts import RouterStart


def start(data: RouterData, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the weight [E, D] and bias [E] of ridge regression from the rows to the norms of the experts' outputs.

    Where scores rate numbers of experts, the target is the gain of each number instead.
    """
    router = data.moe.router
    target_RE = data.survey.gain_TE if ORACLES[router.selection].rates_numbers else data.survey.norm_TE
    return ridge(data.read_RD, target_RE, penalty, intercept=router.has_bias)


def ridge(x_TD: Tensor, target_TE: Tensor, penalty: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Return the weight [E, D] and bias [E] of ridge regression from tokens to target scores, in closed form.

    ``W = (X'X + n penalty s I)^-1 X'U`` on centred data, s the mean variance of X, so that `penalty` has no unit.
    Without an intercept the bias is 0, and each token's targets are taken about their mean, which changes no choice.
    """
    x = x_TD.double()
    u = target_TE.double()
    if not intercept:
        gram = x.T @ x
        gram.diagonal().add_(penalty * gram.diagonal().mean())
        weight_DE = torch.linalg.solve(gram, x.T @ (u - u.mean(1, keepdim=True)))
        return weight_DE.T.float().contiguous(), torch.zeros(u.shape[1])
    x_mean, u_mean = x.mean(0), u.mean(0)
    x, u = x - x_mean, u - u_mean
    gram = x.T @ x
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight_DE = torch.linalg.solve(gram, x.T @ u)
    bias_E = u_mean - x_mean @ weight_DE
    return weight_DE.T.float().contiguous(), bias_E.float()


ROW = RouterStart("docs/methods.md", start, single_experts=False)
