"""The experts' output matrices, fitted to the dense FFN under the router's choice: least squares, nothing trained.

A routed layer is linear in its output matrices. With h_TP the activations of all its neurons, each times the gate of
its expert and the layer's scale (0 where the expert is not used), and a column of ones for the output bias, it gives
``h_TP W_PD``, and the W nearest to the wanted output Y and to the weights W_0 that are there is

    W = W_0 + (H'H + penalty I)^-1 H'(Y - H W_0).

So the neurons that a token uses learn to stand in for those that it does not, as the scale and the mean do with one
number and one vector (docs/methods.md, identity 3); at run time it is free. Pruning is followed by such a
reconstruction since Hassibi & Stork (1993); here what is missing depends on the token.

H is 0 where a token does not use an expert, so nothing is computed there: the block of H'H that belongs to two experts
is summed over the tokens that use both, and costs K^2 of the E^2 products that all of H would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.grouped import Layout
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import low_precision


@torch.no_grad()
def refit_outputs(
    moe: MoEFFN,
    x_TD: Tensor,
    target_TD: Tensor,
    *,
    penalty: float,
    chunk: int = 4096,
) -> None:
    """Fit a mixture's output matrices, its shared expert's and its output bias to what it is to give on tokens [T, D].

    `target_TD` is the dense FFN's output. `penalty` is relative to the mean energy of an activation and keeps what the
    tokens do not determine as it was; ValueError unless it is positive. Every budget of the layer counts alike, as they
    share the matrices. Takes O(F^2) memory and
    O(T (F K / E)^2 + F^3) time; the activations of wide layers are taken in bfloat16 where the hardware computes it
    (ffn2moe.numerics.low_precision), what is summed and solved is not. With all experts active the mixture is not
    the dense FFN any more.
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
            parts = _inputs(moe, x_TD[rows])
            _add(parts, target_TD[rows], weights_PD, gram_PP, cross_PD)
    moe.set_active(in_use)
    gram_PP.diagonal().add_(penalty * gram_PP.diagonal().mean())
    torch.linalg.cholesky(gram_PP, out=gram_PP)  # in their places: of a wide layer these are most of the memory
    torch.cholesky_solve(cross_PD, gram_PP, out=cross_PD)
    _set_outputs(moe, weights_PD + cross_PD.float())


@torch.no_grad()
def relative_error(moe: MoEFFN, x_TD: Tensor, target_TD: Tensor, chunk: int = 4096) -> float:
    """How far a layer as it stands is from what it is to give on tokens [T, D]: ``||moe(x) - y|| / ||y||``."""
    error = energy = 0.0
    for start in range(0, len(x_TD), chunk):
        rows = slice(start, start + chunk)
        routed_TD = moe(x_TD[rows])
        error += (routed_TD - target_TD[rows]).square().sum(dtype=torch.float64).item()
        energy += target_TD[rows].square().sum(dtype=torch.float64).item()
    return float((error / energy) ** 0.5) if energy else 0.0


@dataclass(frozen=True)
class _Part:
    """The columns of H that belong to one expert: the rows of the N tokens that use it; the others are 0."""

    columns: slice
    tokens_N: Tensor  # int64, ascending
    h_NM: Tensor


def _inputs(moe: MoEFFN, x_TD: Tensor) -> list[_Part]:
    """What the output matrices are multiplied by: of each expert, of the shared one, and 1 for the output bias."""
    E, M, _ = moe.w_in.shape

    def part(stacked: Tensor | None, index: int) -> Tensor | None:
        return None if stacked is None else stacked[index]

    scores_TE = moe.scores(x_TD)
    choice = moe.router.choose(scores_TE, moe.num_active)
    gate_TK = moe.scale * moe.router.weigh(scores_TE, choice)
    layout = Layout.of(choice, E)
    gate_S = layout.spread(gate_TK.flatten() if choice.used_TK is None else gate_TK[choice.used_TK])
    parts = []
    with low_precision(E * M, x_TD.device):
        runs = zip(layout.token_S.split(layout.counts), gate_S.split(layout.counts), strict=True)
        for index, (tokens_N, gate_N) in enumerate(runs):
            expert = DenseFFN(
                w_in_FD=moe.w_in[index],
                w_out_DF=moe.w_out[index],
                activation=moe.activation,
                b_in_F=part(moe.b_in, index),
                w_gate_FD=part(moe.w_gate, index),
                b_gate_F=part(moe.b_gate, index),
            )
            h_NM = expert.neurons(x_TD[tokens_N]).float() * gate_N.unsqueeze(1)
            parts.append(_Part(slice(index * M, (index + 1) * M), tokens_N, h_NM))
        everyone_T = torch.arange(len(x_TD), device=x_TD.device)
        end = E * M
        if moe.shared_in is not None and moe.shared_out is not None:
            shared = DenseFFN(
                w_in_FD=moe.shared_in,
                w_out_DF=moe.shared_out,
                activation=moe.activation,
                b_in_F=moe.shared_b_in,
                w_gate_FD=moe.shared_gate,
                b_gate_F=moe.shared_b_gate,
            )
            parts.append(_Part(slice(end, end + len(moe.shared_in)), everyone_T, shared.neurons(x_TD).float()))
            end += len(moe.shared_in)
    if moe.b_out is not None:
        parts.append(_Part(slice(end, end + 1), everyone_T, x_TD.new_ones(len(x_TD), 1)))
    return parts


def _add(parts: list[_Part], target_TD: Tensor, weights_PD: Tensor, gram_PP: Tensor, cross_PD: Tensor) -> None:
    """Add the lower half of the H'H of some tokens, and their H'(Y - H W_0)."""
    left_TD = target_TD.clone()
    for part in parts:
        left_TD.index_add_(0, part.tokens_N, part.h_NM @ weights_PD[part.columns], alpha=-1)
    for first, part in enumerate(parts):
        cross_PD[part.columns] += (part.h_NM.T @ left_TD[part.tokens_N]).double()
        place_T = torch.full((len(target_TD),), -1, device=target_TD.device)
        place_T[part.tokens_N] = torch.arange(len(part.tokens_N), device=target_TD.device)
        for other in parts[first:]:
            place_N = place_T[other.tokens_N]
            both = (place_N >= 0).nonzero().flatten()
            block = _rows(other.h_NM, both).T @ _rows(part.h_NM, place_N[both])
            gram_PP[other.columns, part.columns] += block.double()


def _rows(h_NM: Tensor, wanted: Tensor) -> Tensor:
    """Return some of the rows, in ascending order; do not copy them if they are all."""
    return h_NM if len(wanted) == len(h_NM) else h_NM[wanted]


def _outputs(moe: MoEFFN) -> Tensor:
    """Return the output matrices as one, [P, D], in the order of `_inputs`."""
    parts = [moe.w_out.transpose(1, 2).flatten(0, 1)]
    if moe.shared_out is not None:
        parts.append(moe.shared_out.T)
    if moe.b_out is not None:
        parts.append(moe.b_out.unsqueeze(0))
    return torch.cat(parts)


def _set_outputs(moe: MoEFFN, weights_PD: Tensor) -> None:
    """Set the output matrices from one matrix: the inverse of `_outputs`."""
    E, _, M = moe.w_out.shape
    shared = 0 if moe.shared_out is None else moe.shared_out.shape[1]
    routed_PD, shared_SD, bias_1D = weights_PD.split([E * M, shared, len(weights_PD) - E * M - shared])
    moe.w_out.copy_(routed_PD.unflatten(0, (E, M)).transpose(1, 2))
    if moe.shared_out is not None:
        moe.shared_out.copy_(shared_SD.T)
    if moe.b_out is not None:
        moe.b_out.copy_(bias_1D[0])
