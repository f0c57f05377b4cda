"""The best K experts for a token, from the Gram matrix of the experts' outputs.

With G_ij = <E_i(x), E_j(x)>, leaving out the experts not in S costs
``||y - a y_S||^2 = 1'G1 - 2a 1'G m + a^2 m'G m`` for the indicator m of S: one dense pass and an E x E matrix
per token rank every subset (derivation: docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from ffn2moe.moe import MoEFFN

MAX_SUBSETS = 2000  # above this, greedy drop-one instead of enumeration


@torch.no_grad()
def expert_outputs(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """Every expert's output for every token, [T, E, D], without scale and output bias."""
    return torch.stack([moe.expert(index, x_TD) for index in range(moe.num_experts)], dim=1)


def gram(outputs_TED: Tensor) -> Tensor:
    """Inner products of the experts' outputs, [T, E, E]."""
    return outputs_TED @ outputs_TED.transpose(1, 2)


def subsets(num_experts: int, num_active: int) -> Tensor:
    """Indicators of all subsets of K of the E experts, [C, E] float32, in lexicographic order."""
    chosen = torch.tensor(list(combinations(range(num_experts), num_active)))
    return torch.zeros(len(chosen), num_experts).scatter_(1, chosen, 1.0)


def subset_errors(gram_TEE: Tensor, indicator_CE: Tensor, scale: float = 1.0) -> Tensor:
    """Squared error ``||y - scale y_S||^2`` of each subset for each token, [T, C]."""
    T, E, _ = gram_TEE.shape
    pairs_CEE = indicator_CE.unsqueeze(2) * indicator_CE.unsqueeze(1)
    energy_T1 = gram_TEE.sum((1, 2)).unsqueeze(1)
    cross_TC = gram_TEE.sum(1) @ indicator_CE.T
    own_TC = gram_TEE.reshape(T, E * E) @ pairs_CEE.reshape(-1, E * E).T
    return (energy_T1 - 2 * scale * cross_TC + scale * scale * own_TC).clamp(min=0)


@dataclass(frozen=True)
class OracleChoice:
    """What the oracle says of T tokens."""

    chosen_TE: Tensor  # K-hot indicator of the best subset
    gain_TE: Tensor  # rise in squared error when an expert must be left out, minus when it must be kept


def oracle(gram_TEE: Tensor, num_active: int, scale: float = 1.0) -> OracleChoice:
    """The best K experts for each token, and how much each expert is worth to it.

    Exact by enumeration up to `MAX_SUBSETS` subsets; above, greedy: drop, one at a time, the expert whose loss
    raises the error least, and read the gains off the chosen subset.
    """
    E = gram_TEE.shape[-1]
    if comb(E, num_active) > MAX_SUBSETS:
        return _greedy(gram_TEE, num_active, scale)
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


def _greedy(gram_TEE: Tensor, num_active: int, scale: float) -> OracleChoice:
    """Drop-one: the error of S minus {i} follows from G m, so a step costs T x E x E."""
    T, E, _ = gram_TEE.shape
    chosen_TE = gram_TEE.new_ones(T, E)
    total_TE = gram_TEE.sum(1)  # <E_i, y>
    diagonal_TE = gram_TEE.diagonal(dim1=1, dim2=2)

    def change(chosen: Tensor) -> Tensor:
        """Rise in error when each expert is toggled, [T, E]."""
        own_TE = (gram_TEE @ chosen.unsqueeze(2)).squeeze(2)  # <E_i, y_S>
        drop = 2 * scale * total_TE + scale**2 * (diagonal_TE - 2 * own_TE)
        add = -2 * scale * total_TE + scale**2 * (diagonal_TE + 2 * own_TE)
        return torch.where(chosen.bool(), drop, add)

    for _ in range(E - num_active):
        rise_TE = change(chosen_TE).masked_fill(~chosen_TE.bool(), torch.inf)
        chosen_TE = chosen_TE.scatter(1, rise_TE.argmin(1, keepdim=True), 0.0)
    rise_TE = change(chosen_TE)
    return OracleChoice(chosen_TE, torch.where(chosen_TE.bool(), rise_TE, -rise_TE))


@dataclass(frozen=True)
class Survey:
    """What a layer's experts are to T tokens: all that a router is fitted to."""

    norm_TE: Tensor  # ||E_i(x)||
    gain_TE: Tensor  # the oracle's gains, over the mean energy of the layer's output


@torch.no_grad()
def survey(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> Survey:
    """Norms and gains of every expert on tokens [T, D], from one pass over the experts."""
    norms, gains, energy = [], [], 0.0
    for x in x_TD.split(chunk):
        gram_TEE = gram(expert_outputs(moe, x))
        norms.append(gram_TEE.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt())
        gains.append(oracle(gram_TEE, moe.num_active).gain_TE)
        energy += gram_TEE.sum(dtype=torch.float64).item()
    return Survey(torch.cat(norms), torch.cat(gains) / (energy / len(x_TD)))


@dataclass(frozen=True)
class BestScale:
    """The scale that brings a choice of experts closest to the whole FFN, and what is left."""

    scale: float  # a = sum <y_S, y> / sum ||y_S||^2
    error: float  # ||y - a y_S|| / ||y|| over all tokens


class _Fit:
    """Sums over tokens from which the best scale of a choice, and its error, follow in closed form."""

    def __init__(self) -> None:
        self.cross = self.own = self.routed = self.whole = 0.0

    def add(self, gram_TEE: Tensor, chosen_TE: Tensor, whole: float | None = None) -> None:
        """Tokens whose routed experts have these inner products; `whole` is the energy of the whole FFN."""
        routed = gram_TEE.sum((1, 2), dtype=torch.float64).sum().item()
        self.routed += routed
        self.whole += routed if whole is None else whole
        self.cross += (gram_TEE.sum(1) * chosen_TE).sum(dtype=torch.float64).item()
        own_T = ((gram_TEE @ chosen_TE.unsqueeze(2)).squeeze(2) * chosen_TE).sum(1)
        self.own += own_T.sum(dtype=torch.float64).item()

    def best(self) -> BestScale:
        if self.own == 0 or self.whole == 0:
            return BestScale(1.0, 0.0 if self.whole == 0 else (self.routed / self.whole) ** 0.5)
        return BestScale(self.cross / self.own, (max(0.0, self.routed - self.cross**2 / self.own) / self.whole) ** 0.5)


def _whole_energy(moe: MoEFFN, x_TD: Tensor, outputs_TED: Tensor) -> float | None:
    """Energy of shared and routed experts together; None where there is no shared expert."""
    shared_TD = moe.shared(x_TD)
    if shared_TD is None:
        return None
    return (shared_TD + outputs_TED.sum(1)).square().sum(dtype=torch.float64).item()


@torch.no_grad()
def best_scale(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> BestScale:
    """The best single scale of a layer under the oracle's choice, on tokens [T, D]."""
    fit = _Fit()
    for x in x_TD.split(chunk):
        outputs_TED = expert_outputs(moe, x)
        gram_TEE = gram(outputs_TED)
        fit.add(gram_TEE, oracle(gram_TEE, moe.num_active).chosen_TE, _whole_energy(moe, x, outputs_TED))
    return fit.best()


@torch.no_grad()
def diagnose(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> dict[str, float]:
    """How far a layer is from the sum of all its experts, on tokens [T, D].

    Errors are relative, ``||y - a y_S|| / ||y||`` over all tokens, each choice with its own best scale a and every
    chosen expert counted alike, whatever its gate (a shared expert is part of y and of y_S): `oracle_error` under the
    best choice (what the partition costs), `router_error` under the learned one, `gap` their difference (what the
    router costs), `router_recall` the share of the oracle's K that the router finds.
    """
    oracle_fit, router_fit = _Fit(), _Fit()
    found = wanted = 0.0
    for x in x_TD.split(chunk):
        outputs_TED = expert_outputs(moe, x)
        gram_TEE = gram(outputs_TED)
        whole = _whole_energy(moe, x, outputs_TED)
        scores_TE = moe.router(x)
        chosen_TE = moe.router.choose(scores_TE, moe.num_active).indicator_TE(moe.num_experts)
        best_TE = oracle(gram_TEE, moe.num_active).chosen_TE
        oracle_fit.add(gram_TEE, best_TE, whole)
        router_fit.add(gram_TEE, chosen_TE, whole)
        found += (chosen_TE * best_TE).sum().item()
        wanted += best_TE.sum().item()
    oracle_error, router_error = oracle_fit.best().error, router_fit.best().error
    return {
        "oracle_error": oracle_error,
        "router_error": router_error,
        "gap": router_error - oracle_error,
        "router_recall": found / wanted,
    }
