"""The experts' output matrices, fitted to the dense FFN under the router's choice: least squares, nothing trained.

A routed layer is linear in its output matrices. With h_TP the activations of all its neurons, each times the gate of
its expert and the layer's scale (0 where the expert is not used), and a column of ones for the output bias, it gives
``h_TP W_PD``, and the W nearest to the wanted output Y and to the weights W_0 that are there is

    W = W_0 + (H'H + penalty I)^-1 H'(Y - H W_0).

So the neurons that a token uses learn to stand in for those that it does not, as the scale and the mean do with one
number and one vector (docs/methods.md, identity 3); at run time it is free. Pruning is followed by such a
reconstruction since Hassibi & Stork (1993); here what is missing depends on the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.dense import DenseFFN
from ffn2moe.moe import MoEFFN


@torch.no_grad()
def refit_outputs(
    moe: MoEFFN,
    x_TD: Tensor,
    target_TD: Tensor,
    *,
    penalty: float,
    route_TD: Tensor | None = None,
    chunk: int = 4096,
) -> None:
    """Fit a mixture's output matrices, its shared expert's and its output bias to what it is to give on tokens [T, D].

    `target_TD` is the dense FFN's output. `penalty` is relative to the mean energy of an activation and keeps what the
    tokens do not determine as it was; ValueError unless it is positive. Every budget of the layer counts alike, as they
    share the matrices. `route_TD` is for routing `sequence` (ffn2moe.texts.text_means). Takes O(F^2) memory and
    O(T F^2 + F^3) time. With all experts active the mixture is not the dense FFN any more.
    """
    if not penalty > 0:
        raise ValueError(f"penalty = {penalty} must be positive: tokens may not determine every weight")
    weights_PD = _outputs(moe)
    gram_PP = torch.zeros(len(weights_PD), len(weights_PD), dtype=torch.float64)
    cross_PD = torch.zeros(weights_PD.shape, dtype=torch.float64)
    in_use = moe.num_active
    for start in range(0, len(x_TD), chunk):
        rows = slice(start, start + chunk)
        for budget in moe.budgets:
            moe.set_active(budget)
            h_TP = _inputs(moe, x_TD[rows], None if route_TD is None else route_TD[rows])
            gram_PP += (h_TP.T @ h_TP).double()
            cross_PD += (h_TP.T @ (target_TD[rows] - h_TP @ weights_PD)).double()
    moe.set_active(in_use)
    gram_PP.diagonal().add_(penalty * gram_PP.diagonal().mean())
    change_PD = torch.cholesky_solve(cross_PD, torch.linalg.cholesky(gram_PP))
    _set_outputs(moe, weights_PD + change_PD.float())


@torch.no_grad()
def relative_error(
    moe: MoEFFN, x_TD: Tensor, target_TD: Tensor, route_TD: Tensor | None = None, chunk: int = 4096
) -> float:
    """How far a layer as it stands is from what it is to give on tokens [T, D]: ``||moe(x) - y|| / ||y||``."""
    error = energy = 0.0
    for start in range(0, len(x_TD), chunk):
        rows = slice(start, start + chunk)
        routed_TD = moe(x_TD[rows], None if route_TD is None else route_TD[rows])
        error += (routed_TD - target_TD[rows]).square().sum(dtype=torch.float64).item()
        energy += target_TD[rows].square().sum(dtype=torch.float64).item()
    return float((error / energy) ** 0.5) if energy else 0.0


def _inputs(moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None) -> Tensor:
    """What the output matrices are multiplied by, [T, P]: routed neurons, shared neurons, and 1 for the output bias."""
    E, M, D = moe.w_in.shape

    def rows(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked.flatten(0, 1)

    routed = DenseFFN(
        w_in_FD=moe.w_in.reshape(E * M, D),
        w_out_DF=moe.w_out,
        activation=moe.activation,
        b_in_F=rows(moe.b_in),
        w_gate_FD=rows(moe.w_gate),
        b_gate_F=rows(moe.b_gate),
    )
    scores_TE = moe.scores(x_TD, route_TD)
    choice = moe.router.choose(scores_TE, moe.num_active)
    gate_TE = torch.zeros_like(scores_TE).scatter(1, choice.experts_TK, moe.router.weigh(scores_TE, choice))
    parts = [(routed.neurons(x_TD).unflatten(1, (E, M)) * (moe.scale * gate_TE).unsqueeze(2)).flatten(1)]
    if moe.shared_in is not None and moe.shared_out is not None:
        shared = DenseFFN(
            w_in_FD=moe.shared_in,
            w_out_DF=moe.shared_out,
            activation=moe.activation,
            b_in_F=moe.shared_b_in,
            w_gate_FD=moe.shared_gate,
            b_gate_F=moe.shared_b_gate,
        )
        parts.append(shared.neurons(x_TD))
    if moe.b_out is not None:
        parts.append(x_TD.new_ones(len(x_TD), 1))
    return torch.cat(parts, dim=1)


def _outputs(moe: MoEFFN) -> Tensor:
    """The output matrices as one, [P, D], in the order of `_inputs`."""
    parts = [moe.w_out.transpose(1, 2).flatten(0, 1)]
    if moe.shared_out is not None:
        parts.append(moe.shared_out.T)
    if moe.b_out is not None:
        parts.append(moe.b_out.unsqueeze(0))
    return torch.cat(parts)


def _set_outputs(moe: MoEFFN, weights_PD: Tensor) -> None:
    """The inverse of `_outputs`."""
    E, _, M = moe.w_out.shape
    shared = 0 if moe.shared_out is None else moe.shared_out.shape[1]
    routed_PD, shared_SD, bias_1D = weights_PD.split([E * M, shared, len(weights_PD) - E * M - shared])
    moe.w_out.copy_(routed_PD.unflatten(0, (E, M)).transpose(1, 2))
    if moe.shared_out is not None:
        moe.shared_out.copy_(shared_SD.T)
    if moe.b_out is not None:
        moe.b_out.copy_(bias_1D[0])
