"""Fit the few numbers of a layer that follow from its router: calibration, the gates' spread, scale and mean."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.choices import GATES
from ffn2moe.moe.layer import MoEFFN


@torch.no_grad()
def calibrate(moe: MoEFFN, x_TD: Tensor) -> None:
    """Make the router choose K experts on average on tokens [T, D], where the selection is not fixed."""
    moe.router.calibrate(moe.scores(x_TD), moe.num_active)


@torch.no_grad()
def fit_router_scale(moe: MoEFFN, x_TD: Tensor) -> None:
    """Set how far the gates are apart, so that the routed sum fits the dense one on tokens [T, D]; the choice stays.

    It tries powers of two from 2^-8 to 2^4, which no dtype rounds. A small scale gives gates that are nearly equal, so
    that the result is never worse than unit gates. It does nothing where the gates are constant.
    """
    if GATES[moe.gate].constant == "always" or moe.router.balance_bias.any():
        return
    outputs_TED = torch.stack([moe.expert(index, x_TD) for index in range(moe.num_experts)], dim=1)
    y_TD = outputs_TED.sum(1)
    moe.router.rescale(1.0)
    scores_TE = moe.scores(x_TD)
    choice = moe.router.choose(scores_TE, moe.num_active)
    chosen_TKD = outputs_TED.gather(1, choice.experts_TK.unsqueeze(-1).expand(-1, -1, y_TD.shape[-1]))
    best_left, best_scale = float("inf"), 1.0
    for exponent in range(-8, 5):
        gate_TK = GATES[moe.gate].weights(scores_TE * 2.0**exponent, choice.experts_TK, choice.used_TK, training=False)
        y_S_TD = torch.einsum("tk,tkd->td", gate_TK, chosen_TKD)
        left = -(y_TD * y_S_TD).sum().square() / y_S_TD.square().sum()  # ||y - a y_S||^2 at the best a, less ||y||^2
        if left.item() < best_left:
            best_left, best_scale = left.item(), 2.0**exponent
    moe.router.rescale(best_scale)


@torch.no_grad()
def fit_scale_and_mean(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096, *, whole_TD: Tensor | None = None) -> None:
    """Set the scale and shift the output bias in closed form, so that the routed output fits the dense one.

    On tokens [T, D]: the scale a minimises ``||y - a y_S||^2`` about the means, and the bias takes
    ``mean(y - a y_S)`` (methods: identity 3). In a layer without output bias the scale alone is fitted. The other
    budgets get their own scale and share the bias. `whole_TD` is the sum of all experts, without shared expert and
    output bias, where it is known; else it is computed.
    """
    y_TD = _all_routed(moe, x_TD, chunk) if whole_TD is None else whole_TD
    y_S_TD = _routed(moe, x_TD, chunk)
    if moe.b_out is not None:
        y_mean, y_S_mean = y_TD.mean(0), y_S_TD.mean(0)
        y_TD, y_S_TD = y_TD - y_mean, y_S_TD - y_S_mean
    moe.set_scale(_best_scale(y_TD, y_S_TD))
    if moe.b_out is not None:
        shift_D = y_mean - moe.scale * y_S_mean
        moe.b_out += shift_D
        y_TD = y_TD + y_mean - shift_D  # what is left for the scales of the other budgets
    in_use = moe.num_active
    for other in set(moe.budgets) - {in_use}:
        moe.num_active = other
        moe.set_scale(_best_scale(y_TD, _routed(moe, x_TD, chunk)))
    moe.num_active = in_use


def _best_scale(y_TD: Tensor, y_S_TD: Tensor) -> float:
    """Return the a that minimises ``||y - a y_S||^2``."""
    scale = (y_S_TD * y_TD).sum(dtype=torch.float64) / y_S_TD.square().sum(dtype=torch.float64)
    return scale.item()


def _all_routed(moe: MoEFFN, x_TD: Tensor, chunk: int) -> Tensor:
    """Return the sum of all experts, without scale, shared expert and output bias, [T, D]."""
    found = []
    for x in x_TD.split(chunk):
        whole, shared = moe.all_experts(x), moe.shared(x)
        whole = whole if shared is None else whole - shared
        found.append(whole if moe.b_out is None else whole - moe.b_out)
    return torch.cat(found)


def _routed(moe: MoEFFN, x_TD: Tensor, chunk: int) -> Tensor:
    """Return the sum of the used experts, without scale, shared expert and output bias, [T, D]."""
    found = []
    for x in x_TD.split(chunk):
        scores_TE = moe.scores(x)
        found.append(moe.grouped(x, scores_TE, moe.router.choose(scores_TE, moe.num_active)))
    return torch.cat(found)
