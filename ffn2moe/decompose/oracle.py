"""The best experts for a token, from the Gram matrix of the experts' outputs.

With G_ij = <E_i(x), E_j(x)>, leaving out the experts not in S costs
``||y - a y_S||^2 = 1'G1 - 2a 1'G m + a^2 m'G m`` for the indicator m of S: one dense pass and an E x E matrix
per token rank every subset (derivation: docs/methods.md).

A selection whose number of experts differs from token to token is judged at the same mean number: each token gets as
many as are worth one price to it. Errors of a fixed subset add up over tokens and so do Gram matrices; where a text
has one choice for all of its tokens, the sum of their matrices is its matrix.

Letters beside those of `ffn2moe.spec`: R rows, tokens or texts; N numbers of experts, 1 to E.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import torch
from torch import Tensor

from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import low_precision

MAX_SUBSETS = 2000  # above this, greedy drop-one instead of enumeration
BISECTIONS = 60  # of a price
ROWS = 4096  # ranked at once


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

    chosen_TE: Tensor  # indicator of the best experts
    gain_TE: Tensor  # rise in squared error when an expert must be left out, minus when it must be kept


def oracle(gram_TEE: Tensor, num_active: int, scale: float = 1.0) -> OracleChoice:
    """The best K experts for each token, and how much each expert is worth to it.

    Exact by enumeration up to `MAX_SUBSETS` subsets; above, greedy: drop, one at a time, the expert whose loss
    raises the error least, and read the gains off the chosen subset.
    """
    E = gram_TEE.shape[-1]
    if comb(E, num_active) > MAX_SUBSETS:
        chosen_TE = (_drop_order(gram_TEE, scale) >= E - num_active).to(gram_TEE)
        return OracleChoice(chosen_TE, _toggle_gain(gram_TEE, chosen_TE, scale))
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
    """Rise in error when each expert is toggled, [T, E]: from G m, so it costs T x E x E."""
    own_TE = (gram_TEE @ chosen_TE.unsqueeze(2)).squeeze(2)  # <E_i, y_S>
    total_TE = gram_TEE.sum(1)  # <E_i, y>
    diagonal_TE = gram_TEE.diagonal(dim1=1, dim2=2)
    drop_TE = 2 * scale * total_TE + scale**2 * (diagonal_TE - 2 * own_TE)
    add_TE = -2 * scale * total_TE + scale**2 * (diagonal_TE + 2 * own_TE)
    return torch.where(chosen_TE.bool(), drop_TE, add_TE)


def _toggle_gain(gram_TEE: Tensor, chosen_TE: Tensor, scale: float = 1.0) -> Tensor:
    """What each expert is worth beside the chosen, or among them: minus what toggling it on raises, or plus off."""
    rise_TE = _rise(gram_TEE, chosen_TE, scale)
    return torch.where(chosen_TE.bool(), rise_TE, -rise_TE)


def _drop_order(gram_TEE: Tensor, scale: float) -> Tensor:
    """The step at which each expert is dropped, [T, E] from 0 to E - 1: each time the one that is missed least."""
    chosen_TE = torch.ones(gram_TEE.shape[:2]).to(gram_TEE)
    order_TE = torch.zeros(gram_TEE.shape[:2], dtype=torch.int64, device=gram_TEE.device)
    for step in range(gram_TEE.shape[-1]):
        rise_TE = _rise(gram_TEE, chosen_TE, scale).masked_fill(~chosen_TE.bool(), torch.inf)
        least_T1 = rise_TE.argmin(1, keepdim=True)
        order_TE.scatter_(1, least_T1, step)
        chosen_TE.scatter_(1, least_T1, 0.0)
    return order_TE


def best_of_each_size(gram_TEE: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """For n = 1 to `most` (E): the error of the best n experts, [T, N], and which they are, bool [T, N, E].

    By enumeration or greedily, as `oracle`.
    """
    E = gram_TEE.shape[-1]
    errors, chosen = [], []
    order_TE = None
    for n in range(1, (most or E) + 1):
        if comb(E, n) <= MAX_SUBSETS:
            indicator_CE = subsets(E, n).to(gram_TEE)
            error_T, best_T = subset_errors(gram_TEE, indicator_CE).min(1)
            chosen_TE = indicator_CE[best_T]
        else:
            order_TE = _drop_order(gram_TEE, 1.0) if order_TE is None else order_TE
            chosen_TE = (order_TE >= E - n).to(gram_TEE)
            left_TE = 1 - chosen_TE
            error_T = ((gram_TEE @ left_TE.unsqueeze(2)).squeeze(2) * left_TE).sum(1).clamp(min=0)
        errors.append(error_T)
        chosen.append(chosen_TE.bool())
    return torch.stack(errors, dim=1), torch.stack(chosen, dim=1)


def prefix_errors(gram_TEE: Tensor) -> Tensor:
    """Squared error of the first n experts for n = 1..E, [T, E]: the inner products among those left out, summed."""
    among_TEE = gram_TEE.flip(1, 2).cumsum(1).cumsum(2)  # [i, j]: of the last i + 1 with the last j + 1
    last_TE = among_TEE.diagonal(dim1=1, dim2=2)
    return torch.cat([last_TE[:, :-1].flip(1), torch.zeros_like(last_TE[:, :1])], dim=1).clamp(min=0)


def at_one_price(errors_TN: Tensor, mean: float, weight_T: Tensor | None = None) -> tuple[Tensor, float]:
    """How many experts each token should use, [T] from 1 to N, when they may use `mean` on average; and the price.

    Each token uses the number that minimises its error plus the price of its experts (a Lagrange multiplier), so that
    no other numbers that add up to as many, or fewer, have a smaller sum of errors. The price is the lowest that can
    be paid; tokens to which two numbers are worth the same have the larger as long as there is room. Rows may stand
    for several tokens each, `weight_T`.
    """
    errors_TN = errors_TN.double()
    T, N = errors_TN.shape
    weight_T = errors_TN.new_ones(T) if weight_T is None else weight_T.to(errors_TN)
    cost_TN = weight_T.unsqueeze(1) * torch.arange(1, N + 1, dtype=errors_TN.dtype, device=errors_TN.device)
    budget = mean * weight_T.sum() + 1e-6

    def at(price: float) -> Tensor:
        return (errors_TN + price * cost_TN).argmin(1) + 1

    def cost(count_T: Tensor) -> Tensor:
        return (weight_T * count_T).sum()

    # Above this price a second expert pays for no token.
    low, high = 0.0, ((errors_TN[:, 0] - errors_TN.amin(1)) / weight_T.clamp(min=1)).max().item() * 2 + 1e-30
    if cost(at(low)) <= budget:
        return at(low), low
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        low, high = (price, high) if cost(at(price)) > budget else (low, price)
    few_T, many_T = at(high), at(low)
    more_T = (many_T - few_T).clamp(min=0)
    affordable_T = (weight_T * more_T).cumsum(0) <= budget - cost(few_T)
    return few_T + more_T * affordable_T, high


def prefix_choice(gram_TEE: Tensor, mean: float, weight_T: Tensor | None = None) -> Tensor:
    """How many of the first experts each token should use, [T] int64, K = `mean` on average: the oracle of `prefix`."""
    return at_one_price(prefix_errors(gram_TEE), mean, weight_T)[0]


def budget_choice(
    gram_TEE: Tensor, mean: float, most: int | None = None, weight_T: Tensor | None = None
) -> tuple[Tensor, float]:
    """The oracle of `threshold`: the best experts, at most `most` a token and K = `mean` on average; and their price.

    Indicator [T, E].
    """
    parts = [best_of_each_size(part, most) for part in gram_TEE.split(ROWS)]
    count_T, price = at_one_price(torch.cat([errors_TN for errors_TN, _ in parts]), mean, weight_T)
    chosen_TNE = torch.cat([chosen_TNE for _, chosen_TNE in parts])
    return chosen_TNE[torch.arange(len(count_T)), count_T - 1].to(gram_TEE), price


@dataclass(frozen=True)
class Grams:
    """What a layer's experts give together on R tokens or texts."""

    gram_REE: Tensor
    tokens_R: Tensor  # int64; 1 where a row is a token
    whole: float  # energy of the layer's output, shared expert too


@torch.no_grad()
def grams(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096, text_T: Tensor | None = None) -> Grams:
    """The Gram matrices of a layer on tokens [T, D].

    A row is a token; with `text_T` [T] int64, the text of each token from 0 on, a row is a text: the sum of its
    tokens' matrices. 4 R E^2 bytes. The outputs of wide layers are taken in bfloat16 where the hardware computes it
    (ffn2moe.numerics.low_precision), their inner products in float32.
    """
    E, whole = moe.num_experts, 0.0
    tokens_R = torch.ones_like(x_TD[:, 0], dtype=torch.int64) if text_T is None else torch.bincount(text_T)
    gram_REE = torch.zeros(len(tokens_R), E, E, device=x_TD.device)
    for start in range(0, len(x_TD), chunk):
        x = x_TD[start : start + chunk]
        with low_precision(moe.neurons.numel(), x.device):
            outputs_TED, shared_TD = expert_outputs(moe, x).float(), moe.shared(x)
        gram_TEE = gram(outputs_TED)
        if shared_TD is None:
            whole += gram_TEE.sum(dtype=torch.float64).item()
        else:
            whole += (shared_TD + outputs_TED.sum(1)).square().sum(dtype=torch.float64).item()
        if text_T is None:
            gram_REE[start : start + chunk] = gram_TEE
        else:
            gram_REE.index_add_(0, text_T[start : start + chunk], gram_TEE)
    return Grams(gram_REE, tokens_R, whole)


def best_choice(selection: str, found: Grams, mean: float, most: int | None = None) -> Tensor:
    """Indicator [R, E] of the best choice that a selection allows, K = `mean` experts a token on average."""
    gram_REE = found.gram_REE
    if selection == "prefix":
        count_R1 = prefix_choice(gram_REE, mean, found.tokens_R).unsqueeze(1)
        return (torch.arange(gram_REE.shape[-1], device=gram_REE.device) < count_R1).to(gram_REE)
    if selection == "threshold":
        return budget_choice(gram_REE, mean, most, found.tokens_R)[0]
    return torch.cat([oracle(part, round(mean)).chosen_TE for part in gram_REE.split(ROWS)])


@dataclass(frozen=True)
class Survey:
    """What a layer's experts are to R tokens or texts: all that a router is fitted to."""

    norm_TE: Tensor  # ||E_i(x)||; of a text, the root of the sum of its tokens' squares
    gain_TE: Tensor  # what the scores should rank by, over the mean energy of the layer's output; see `survey`
    chosen_TE: Tensor  # indicator of the best choice that the layer's selection allows
    grams: Grams


@torch.no_grad()
def survey(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096, text_T: Tensor | None = None) -> Survey:
    """Norms, gains and best choice of every expert on tokens [T, D], or on their texts [T], from one pass.

    The gain is, for `topk`, the oracle's. For `threshold`, by how much more than its price an expert lowers the error:
    above 0 for the chosen. For `prefix`, whose score n says that n experts are enough, minus the error and the price
    of the first n: highest at the best n.
    """
    found = grams(moe, x_TD, chunk, text_T)
    gram_REE, selection, K = found.gram_REE, moe.router.selection, moe.num_active
    if selection == "prefix":
        errors_RE = prefix_errors(gram_REE)
        count_R, price = at_one_price(errors_RE, K, found.tokens_R)
        number_E = torch.arange(1, moe.num_experts + 1, device=gram_REE.device)
        chosen_RE = (number_E <= count_R.unsqueeze(1)).to(gram_REE)
        gain_RE = -(errors_RE + price * number_E * found.tokens_R.unsqueeze(1))
    elif selection == "threshold":
        chosen_RE, price = budget_choice(gram_REE, K, moe.router.max_active, found.tokens_R)
        gain_RE = _toggle_gain(gram_REE, chosen_RE) - price * found.tokens_R.unsqueeze(1)
    else:
        parts = [oracle(part, K) for part in gram_REE.split(ROWS)]
        chosen_RE, gain_RE = torch.cat([p.chosen_TE for p in parts]), torch.cat([p.gain_TE for p in parts])
    energy = gram_REE.sum(dtype=torch.float64).item() / len(gram_REE)
    norm_RE = gram_REE.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    return Survey(norm_RE, gain_RE / energy, chosen_RE, found)


@dataclass(frozen=True)
class BestScale:
    """The scale that brings a choice of experts closest to the whole FFN, and what is left."""

    scale: float  # a = sum <y_S, y> / sum ||y_S||^2
    error: float  # ||y - a y_S|| / ||y|| over all tokens


def fit_scale(found: Grams, chosen_RE: Tensor) -> BestScale:
    """The best scale of a choice [R, E], and its error relative to the energy of the whole FFN, in closed form."""
    gram_REE, whole = found.gram_REE, found.whole
    routed = gram_REE.sum(dtype=torch.float64).item()
    cross = (gram_REE.sum(1) * chosen_RE).sum(dtype=torch.float64).item()
    own = ((gram_REE @ chosen_RE.unsqueeze(2)).squeeze(2) * chosen_RE).sum(dtype=torch.float64).item()
    if own == 0 or whole == 0:
        return BestScale(1.0, 0.0 if whole == 0 else (routed / whole) ** 0.5)
    return BestScale(cross / own, (max(0.0, routed - cross**2 / own) / whole) ** 0.5)


@torch.no_grad()
def best_scale(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096, text_T: Tensor | None = None) -> BestScale:
    """The best single scale of a layer under the oracle's choice, on tokens [T, D]."""
    found = grams(moe, x_TD, chunk, text_T)
    return fit_scale(found, best_choice(moe.router.selection, found, moe.num_active, moe.router.max_active))


@torch.no_grad()
def fit_scales(moe: MoEFFN, found: Grams, read_RD: Tensor) -> None:
    """Set the scale of each budget of a layer without output bias: the best for what its router chooses and weighs.

    `found` is what the experts give on the rows [R, D] that the router reads. The same as
    `ffn2moe.moe.fit.fit_scale_and_mean`, from inner products that are known instead of outputs computed again.
    """
    scores_RE = moe.scores(read_RD, read_RD)
    in_use = moe.num_active
    for budget in moe.budgets:
        moe.set_active(budget)
        choice = moe.router.choose(scores_RE, budget)
        weight_RE = torch.zeros_like(scores_RE).scatter(1, choice.experts_TK, moe.router.weigh(scores_RE, choice))
        moe.set_scale(fit_scale(found, weight_RE).scale)
    moe.set_active(in_use)


@torch.no_grad()
def errors_by_active(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096, text_T: Tensor | None = None) -> Tensor:
    """What a layer loses with K = 1 to E experts, [E] float64: ``||y - a y_S||^2 / ||y||^2`` on tokens [T, D].

    Each K with the best choice that the layer's selection allows and the best scale a.
    """
    found = grams(moe, x_TD, chunk, text_T)
    errors = []
    for K in range(1, moe.num_experts + 1):
        chosen_RE = best_choice(moe.router.selection, found, K, max(K, moe.router.max_active))
        errors.append(fit_scale(found, chosen_RE).error ** 2)
    return torch.tensor(errors, dtype=torch.float64)


def allocate(errors_LE: Tensor, num_active: int) -> tuple[int, ...]:
    """K of each layer, from 1 to E and on average `num_active` at most, with the least sum of the layers' errors.

    `errors_LE` is what each layer loses with 1 to E experts. Exact, by dynamic programming over the layers; where
    errors fall by less with each expert, that is what adding the most useful expert one at a time gives.
    """
    L, E = errors_LE.shape
    budget = num_active * L
    best_B = np.zeros(budget + 1)  # least error of the layers so far with at most b experts
    taken = []
    for error_E in errors_LE.double().numpy():
        options_EB = np.full((E, budget + 1), np.inf)
        for K in range(1, min(E, budget) + 1):
            options_EB[K - 1, K:] = best_B[: budget + 1 - K] + error_E[K - 1]
        taken.append(options_EB.argmin(0) + 1)
        best_B = options_EB.min(0)
    active = []
    for taken_B in reversed(taken):
        active.append(int(taken_B[budget]))
        budget -= active[-1]
    return tuple(reversed(active))


@torch.no_grad()
def diagnose(
    moe: MoEFFN,
    x_TD: Tensor,
    chunk: int = 4096,
    *,
    text_T: Tensor | None = None,
    route_TD: Tensor | None = None,
) -> dict[str, float]:
    """How far a layer is from the sum of all its experts, on tokens [T, D].

    Errors are relative, ``||y - a y_S|| / ||y||`` over all tokens, each choice with its own best scale a and every
    chosen expert counted alike, whatever its gate (a shared expert is part of y and of y_S): `oracle_error` under the
    best choice that the layer's selection allows with as many experts on average (what the partition costs),
    `router_error` under the learned one, `gap` their difference (what the router costs), `router_recall` the share of
    the oracle's experts that the router finds, `captured_energy` what is left of the output's energy,
    ``1 - router_error^2``, and `mean_active` how many experts a token uses.

    With routing `sequence`, `text_T` names the text of each token and `route_TD` is what the router reads for it, the
    mean of its text (ffn2moe.moe.texts.text_means); the best choice is then the best for each text.
    """
    found = grams(moe, x_TD, chunk, text_T)
    read_RD = x_TD
    if text_T is not None and route_TD is not None:
        read_RD = x_TD.new_zeros(len(found.tokens_R), x_TD.shape[1])
        read_RD[text_T] = route_TD
    parts = read_RD.split(chunk)
    scores_RE = torch.cat([moe.scores(part, None if route_TD is None else part) for part in parts])
    chosen_RE = moe.router.choose(scores_RE, moe.num_active).indicator_TE(moe.num_experts)
    mean_active = (chosen_RE.sum(1) * found.tokens_R).sum().item() / len(x_TD)
    best_RE = best_choice(moe.router.selection, found, mean_active, moe.router.max_active)
    oracle_error, router_error = fit_scale(found, best_RE).error, fit_scale(found, chosen_RE).error
    return {
        "oracle_error": oracle_error,
        "router_error": router_error,
        "gap": router_error - oracle_error,
        "router_recall": ((chosen_RE * best_RE).sum() / best_RE.sum()).item(),
        "captured_energy": 1 - router_error**2,
        "mean_active": mean_active,
    }
