"""Find the best experts for a token from the Gram matrix of the experts' outputs, and judge a router by them.

With G_ij = <E_i(x), E_j(x)>, leaving out the experts not in S costs
``||y - a y_S||^2 = 1'G1 - 2a 1'G m + a^2 m'G m`` for the indicator m of S: one dense pass and an E x E matrix
per token rank every subset (derivation: docs/methods.md). `ORACLES` has the best choice that each selection allows.

Errors of a fixed subset add up over tokens, and so do Gram matrices. Where a text has one choice for all of its tokens,
its matrix is the sum of their matrices.

Letters beside those of `ffn2moe.spec`: R rows, tokens or texts; N numbers of experts, 1 to E.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffn2moe.decompose.evidence import Grams, Survey
from ffn2moe.decompose.oracles import ORACLES
from ffn2moe.numerics import low_precision

if TYPE_CHECKING:
    from ffn2moe.moe.layer import MoEFFN

MAX_SUBSETS = 2000  # above this, greedy drop-one instead of enumeration
ROWS = 4096  # rows ranked at once


@torch.no_grad()
def expert_outputs(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """Return every expert's output for every token, [T, E, D], without scale and output bias."""
    return torch.stack([moe.expert(index, x_TD) for index in range(moe.num_experts)], dim=1)


def gram(outputs_TED: Tensor) -> Tensor:
    """Return the inner products of the experts' outputs, [T, E, E]."""
    return outputs_TED @ outputs_TED.transpose(1, 2)


def subsets(num_experts: int, num_active: int) -> Tensor:
    """Return the indicators of all subsets of K of the E experts, [C, E] float32, in lexicographic order."""
    chosen = torch.tensor(list(combinations(range(num_experts), num_active)))
    return torch.zeros(len(chosen), num_experts).scatter_(1, chosen, 1.0)


def subset_errors(gram_TEE: Tensor, indicator_CE: Tensor, scale: float = 1.0) -> Tensor:
    """Return the squared error ``||y - scale y_S||^2`` of each subset for each token, [T, C]."""
    T, E, _ = gram_TEE.shape
    pairs_CEE = indicator_CE.unsqueeze(2) * indicator_CE.unsqueeze(1)
    energy_T1 = gram_TEE.sum((1, 2)).unsqueeze(1)
    cross_TC = gram_TEE.sum(1) @ indicator_CE.T
    own_TC = gram_TEE.reshape(T, E * E) @ pairs_CEE.reshape(-1, E * E).T
    return (energy_T1 - 2 * scale * cross_TC + scale * scale * own_TC).clamp(min=0)


@dataclass(frozen=True)
class OracleChoice:
    """Hold the best experts of T tokens."""

    chosen_TE: Tensor  # indicator of the best experts
    gain_TE: Tensor  # rise in squared error when an expert must be left out, minus when it must be kept


def oracle(gram_TEE: Tensor, num_active: int, scale: float = 1.0) -> OracleChoice:
    """Return the best K experts for each token, and how much each expert is worth to it.

    Up to `MAX_SUBSETS` subsets this is exact, by enumeration. Above, it is greedy: it drops, one at a time, the expert
    whose loss raises the error least, and takes the gains from the chosen subset.
    """
    E = gram_TEE.shape[-1]
    if comb(E, num_active) > MAX_SUBSETS:
        chosen_TE = (drop_order(gram_TEE, scale) >= E - num_active).to(gram_TEE)
        return OracleChoice(chosen_TE, toggle_gain(gram_TEE, chosen_TE, scale))
    indicator_CE = subsets(E, num_active).to(gram_TEE)
    errors_TC = subset_errors(gram_TEE, indicator_CE, scale)
    chosen_TE = indicator_CE[errors_TC.argmin(1)]
    if num_active == E:
        return OracleChoice(chosen_TE, torch.zeros_like(chosen_TE))
    inside_CE = indicator_CE.bool()
    gains = []
    for expert in range(E):
        with_it = errors_TC[:, inside_CE[:, expert]].amin(1)
        without_it = errors_TC[:, ~inside_CE[:, expert]].amin(1)
        gains.append(without_it - with_it)
    return OracleChoice(chosen_TE, torch.stack(gains, dim=1))


def _rise(gram_TEE: Tensor, chosen_TE: Tensor, scale: float) -> Tensor:
    """Return the rise in error when each expert is toggled, [T, E]: from G m, so it costs T x E x E."""
    own_TE = (gram_TEE @ chosen_TE.unsqueeze(2)).squeeze(2)  # <E_i, y_S>
    total_TE = gram_TEE.sum(1)  # <E_i, y>
    diagonal_TE = gram_TEE.diagonal(dim1=1, dim2=2)
    drop_TE = 2 * scale * total_TE + scale**2 * (diagonal_TE - 2 * own_TE)
    add_TE = -2 * scale * total_TE + scale**2 * (diagonal_TE + 2 * own_TE)
    return torch.where(chosen_TE.bool(), drop_TE, add_TE)


def toggle_gain(gram_TEE: Tensor, chosen_TE: Tensor, scale: float = 1.0) -> Tensor:
    """Return how much each expert lowers the error, [T, E]: beside the chosen experts, or among them."""
    rise_TE = _rise(gram_TEE, chosen_TE, scale)
    return torch.where(chosen_TE.bool(), rise_TE, -rise_TE)


def drop_order(gram_TEE: Tensor, scale: float) -> Tensor:
    """Return the step at which each expert is dropped, [T, E] from 0: each time the one that is missed least."""
    chosen_TE = torch.ones(gram_TEE.shape[:2]).to(gram_TEE)
    order_TE = torch.zeros(gram_TEE.shape[:2], dtype=torch.int64, device=gram_TEE.device)
    for step in range(gram_TEE.shape[-1]):
        rise_TE = _rise(gram_TEE, chosen_TE, scale).masked_fill(~chosen_TE.bool(), torch.inf)
        least_T1 = rise_TE.argmin(1, keepdim=True)
        order_TE.scatter_(1, least_T1, step)
        chosen_TE.scatter_(1, least_T1, 0.0)
    return order_TE


@torch.no_grad()
def grams(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096, *, keep_sum: bool = False) -> Grams:
    """Return the Gram matrices of a layer on tokens [T, D]; they take 4 R E^2 bytes, the kept sum 4 T D.

    A row is a token. The outputs of wide layers are computed in bfloat16 where the hardware has it
    (ffn2moe.numerics.low_precision), their inner products in float32.
    """
    E, whole = moe.num_experts, 0.0
    tokens_R = torch.ones_like(x_TD[:, 0], dtype=torch.int64)
    gram_REE = torch.zeros(len(tokens_R), E, E, device=x_TD.device)
    routed_TD = torch.empty_like(x_TD) if keep_sum else None
    for start in range(0, len(x_TD), chunk):
        x = x_TD[start : start + chunk]
        with low_precision(moe.neurons.numel(), x.device):
            outputs_TED, shared_TD = expert_outputs(moe, x).float(), moe.shared(x)
        gram_TEE = gram(outputs_TED)
        if shared_TD is None:
            whole += gram_TEE.sum(dtype=torch.float64).item()
        else:
            whole += (shared_TD + outputs_TED.sum(1)).square().sum(dtype=torch.float64).item()
        gram_REE[start : start + chunk] = gram_TEE
        if routed_TD is not None:
            routed_TD[start : start + chunk] = outputs_TED.sum(1)
    return Grams(gram_REE, tokens_R, whole, routed_TD)


@torch.no_grad()
def survey(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> Survey:
    """Return norms, gains and best choice of every expert on tokens [T, D], from one pass; its sum is kept."""
    return survey_of(moe, grams(moe, x_TD, chunk, keep_sum=True))


@torch.no_grad()
def survey_of(moe: MoEFFN, found: Grams) -> Survey:
    """Return norms, gains and best choice of every expert on rows whose Gram matrices are known."""
    gram_REE = found.gram_REE
    chosen_RE, gain_RE = ORACLES[moe.router.selection].gains(found, moe.num_active, moe.router.max_active)
    energy = gram_REE.sum(dtype=torch.float64).item() / len(gram_REE)
    norm_RE = gram_REE.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    return Survey(norm_RE, gain_RE / energy, chosen_RE, found)


@dataclass(frozen=True)
class BestScale:
    """Hold the scale that brings a choice of experts closest to the whole FFN, and the error left."""

    scale: float  # a = sum <y_S, y> / sum ||y_S||^2
    error: float  # ||y - a y_S|| / ||y|| over all tokens


def fit_scale(found: Grams, chosen_RE: Tensor) -> BestScale:
    """Return the best scale of a choice [R, E] in closed form, and its error relative to the whole FFN's energy."""
    gram_REE, whole = found.gram_REE, found.whole
    routed = gram_REE.sum(dtype=torch.float64).item()
    cross = (gram_REE.sum(1) * chosen_RE).sum(dtype=torch.float64).item()
    own = ((gram_REE @ chosen_RE.unsqueeze(2)).squeeze(2) * chosen_RE).sum(dtype=torch.float64).item()
    if own == 0 or whole == 0:
        return BestScale(1.0, 0.0 if whole == 0 else (routed / whole) ** 0.5)
    return BestScale(cross / own, (max(0.0, routed - cross**2 / own) / whole) ** 0.5)


@torch.no_grad()
def best_scale(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> BestScale:
    """Return the best single scale of a layer under the oracle's choice, on tokens [T, D]."""
    found = grams(moe, x_TD, chunk)
    return fit_scale(found, ORACLES[moe.router.selection].choose(found, moe.num_active, moe.router.max_active))


@torch.no_grad()
def fit_scales(moe: MoEFFN, found: Grams, read_RD: Tensor) -> None:
    """Set the scale of each budget of a layer without output bias: the best for what its router chooses and weighs.

    `found` belongs to the rows [R, D] that the router reads. The result equals that of
    `ffn2moe.moe.fit.fit_scale_and_mean`, from known inner products instead of outputs computed again.
    """
    scores_RE = moe.router(read_RD)
    in_use = moe.num_active
    for budget in moe.budgets:
        moe.set_active(budget)
        choice = moe.router.choose(scores_RE, budget)
        weight_RE = torch.zeros_like(scores_RE).scatter(1, choice.experts_TK, moe.router.weigh(scores_RE, choice))
        moe.set_scale(fit_scale(found, weight_RE).scale)
    moe.set_active(in_use)


@torch.no_grad()
def diagnose(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> dict[str, float]:
    """Return how far a layer is from the sum of all its experts, on tokens [T, D]; see `compare`."""
    return diagnose_by(moe, grams(moe, x_TD, chunk), x_TD, chunk)


@torch.no_grad()
def diagnose_by(moe: MoEFFN, found: Grams, x_TD: Tensor, chunk: int = 4096) -> dict[str, float]:
    """Return what `diagnose` does, from the known Gram matrices of the tokens [T, D]."""
    return compare(moe, found, torch.cat([moe.scores(x) for x in x_TD.split(chunk)]))


def compare(moe: MoEFFN, found: Grams, scores_RE: Tensor) -> dict[str, float]:
    """Return how far the choice by the router's scores [R, E] is from the sum of all experts, and from the best choice.

    Errors are relative, ``||y - a y_S|| / ||y||`` over all tokens. Each choice has its own best scale a, and every
    chosen expert counts once, whatever its gate; a shared expert is part of y and of y_S.

    - `oracle_error`: under the best choice that the layer's selection allows with as many experts on average. This is
      the cost of the partition.
    - `router_error`: under the learned choice. `gap` is the difference, the cost of the router.
    - `router_recall`: the share of the oracle's experts that the router finds.
    - `captured_energy`: ``1 - router_error^2``, a share of the output's energy.
    - `mean_active`: the experts that a token uses.
    """
    chosen_RE = moe.router.choose(scores_RE, moe.num_active).indicator_TE(moe.num_experts)
    mean_active = (chosen_RE.sum(1) * found.tokens_R).sum().item() / int(found.tokens_R.sum())
    best_RE = ORACLES[moe.router.selection].choose(found, mean_active, moe.router.max_active)
    oracle_error, router_error = fit_scale(found, best_RE).error, fit_scale(found, chosen_RE).error
    return {
        "oracle_error": oracle_error,
        "router_error": router_error,
        "gap": router_error - oracle_error,
        "router_recall": ((chosen_RE * best_RE).sum() / best_RE.sum()).item(),
        "captured_energy": 1 - router_error**2,
        "mean_active": mean_active,
    }
