"""Fill the experts of a layer for clusters of tokens: a neuron stands in several experts, or in none.

A partition puts each neuron in one expert, so the few neurons that matter to every token are missing for most tokens.
Here the tokens are clustered instead, by the neurons that contribute to their outputs. The router learns the cluster of
a token, and each expert takes the neurons that its tokens need most (`most_needed`), whoever else has them. The output
matrices are then fitted to the dense FFN (`refit_outputs`). With one expert this is static pruning with a refit
(docs/decisions/0027-language-model-partition.md).

A token uses one expert. Letters beside those of `ffn2moe.spec`: P directions that tokens are clustered in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.decompose.elimination import most_needed
from ffn2moe.decompose.objectives import Phase
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.router_fit import train_router
from ffn2moe.decompose.starts.ridge import ridge
from ffn2moe.decompose.width_costs import weighed
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.experts import copy_experts
from ffn2moe.numerics import WIDEST_MOMENTS, chunk_of, low_precision

if TYPE_CHECKING:
    from ffn2moe.decompose.route import RouterSettings
    from ffn2moe.dense.ffn import DenseFFN
    from ffn2moe.moe.layer import MoEFFN

DIRECTIONS = 64  # P
CLUSTERED_TOKENS = 16384  # most tokens that the clusters are found on
BASIS_TOKENS = 4096  # most tokens that the directions are found on
SHRINKAGE = 0.25  # weight of all tokens beside those of an expert, where its neurons are chosen


@torch.no_grad()
def fill(
    moe: MoEFFN,
    ffn: DenseFFN,
    x_TD: Tensor,
    target_TD: Tensor,
    settings: RouterSettings,
    widths: tuple[int, int] | None = None,
    fisher_DD: Tensor | None = None,
) -> list[float]:
    """Fit router and experts of a layer in place to what `ffn` gives on tokens [T, D]; return the router's losses.

    `target_TD` is the output of `ffn`, the FFN that the layer was decomposed from. `widths` are M of the experts and S
    of the shared one; None keeps both. `fisher_DD` weighs the error that neurons are chosen by
    (`ffn2moe.decompose.gradients`). ValueError where a token uses more than one expert, and without a refit.
    """
    _require_fit(moe, settings)
    clusters_N = cluster_tokens(ffn, x_TD[:CLUSTERED_TOKENS], moe.num_experts, settings.seed)
    losses = _fit_router(moe, x_TD[:CLUSTERED_TOKENS], clusters_N, settings)
    scores_TE = moe.scores(x_TD)
    choice = moe.router.choose(scores_TE, 1)
    M, S = widths or (moe.neurons.shape[1], len(moe.shared_neurons))
    felt = ffn if fisher_DD is None else replace(ffn, w_out_DF=weighed(ffn, fisher_DD))
    neurons_EM, shared_S = _neurons(felt, x_TD, choice.experts_TK[:, 0], (moe.num_experts, M, S))
    moe.refill(copy_experts(ffn, neurons_EM, shared_S), neurons_EM, shared_S)
    moe.set_scale(1.0 / moe.router.weigh(scores_TE, choice).mean().item())
    refit_outputs(moe, x_TD, target_TD, penalty=settings.refit, chunk=chunk_of(moe.neurons.numel()))
    return losses


def _require_fit(moe: MoEFFN, settings: RouterSettings) -> None:
    if moe.budgets != (1,) or moe.router.selection != "topk":
        raise ValueError(
            "experts for clusters of tokens are made for tokens that use one expert each: set num_active to 1, "
            "selection to topk and leave elastic out, or choose another partition"
        )
    if not settings.refit:
        raise ValueError("experts for clusters of tokens need the refit of their outputs: set refit, such as 1e-2")


@torch.no_grad()
def cluster_tokens(ffn: DenseFFN, x_TD: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Return the cluster of each token, [T] int64, by k-means on the contributions of the neurons.

    The contribution of a neuron is ``|h_j| ||w_out,j||``. Tokens are compared by direction, in the P leading
    directions of their contributions.
    """
    from sklearn.cluster import KMeans
    from sklearn.utils.extmath import randomized_svd

    def given(some_TD: Tensor) -> Tensor:
        return ffn.neurons(some_TD).abs() * norm_F

    norm_F = ffn.w_out_DF.norm(dim=0)
    some_NF = given(x_TD[:BASIS_TOKENS])
    wanted = min(DIRECTIONS, *some_NF.shape)
    basis_PF = randomized_svd((some_NF - some_NF.mean(0)).numpy(), wanted, n_iter=2, random_state=seed)[2]
    basis_FP = torch.from_numpy(basis_PF).float().T
    points_TP = torch.cat([F.normalize(given(x) @ basis_FP, dim=1) for x in x_TD.split(chunk_of(ffn.ffn_width))])
    found = KMeans(num_clusters, n_init=2, random_state=seed).fit_predict(points_TP.numpy())
    return torch.from_numpy(found).long()


def _fit_router(moe: MoEFFN, x_TD: Tensor, clusters_T: Tensor, settings: RouterSettings) -> list[float]:
    """Fit the router to the cluster of each token: from ridge regression on, by cross-entropy."""
    target_TE = F.one_hot(clusters_T, moe.num_experts).float()
    moe.router.balance_bias.zero_()
    moe.router.set(*ridge(x_TD, target_TE, settings.ridge, intercept=moe.router.has_bias))
    with torch.enable_grad():
        return list(
            train_router(
                moe.router,
                x_TD,
                [Phase(1.0, lambda scores_BE, rows: F.cross_entropy(scores_BE, clusters_T[rows]))],
                steps=settings.steps,
                batch_rows=settings.batch_tokens,
                learning_rate=settings.learning_rate,
                seed=settings.seed,
                temperature=settings.temperature,
            )
        )


@torch.no_grad()
def _neurons(ffn: DenseFFN, x_TD: Tensor, expert_T: Tensor, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return the neurons of each expert, [E, M], and those of the shared one, [S], for the `sizes` E, M and S.

    FFNs wider than `WIDEST_MOMENTS` neurons take those with most output energy, as F x F moments cost too much.
    """
    E, M, S = sizes
    wide = ffn.ffn_width > WIDEST_MOMENTS
    shape = (E, ffn.ffn_width) if wide else (E, ffn.ffn_width, ffn.ffn_width)
    moments = torch.zeros(shape)
    with low_precision(ffn.ffn_width, x_TD.device):
        for x, expert in zip(*(one.split(chunk_of(ffn.ffn_width)) for one in (x_TD, expert_T)), strict=True):
            h_TF = ffn.neurons(x).float()
            for index in range(E):
                h_NF = h_TF[expert == index]
                moments[index] += h_NF.square().sum(0) if wide else h_NF.T @ h_NF
    whole = moments.sum(0) / len(x_TD)
    shared_S = _best(whole, ffn, S, None) if S else torch.empty(0, dtype=torch.int64)
    neurons_EM = torch.full((E, M), -1)
    for index in range(E):
        own = moments[index] / max(1, int((expert_T == index).sum())) + SHRINKAGE * whole
        best_N = _best(own, ffn, min(S + M, ffn.ffn_width), shared_S)
        own_N = best_N[~torch.isin(best_N, shared_S)]
        neurons_EM[index, : len(own_N)] = own_N
    return neurons_EM, shared_S


def _best(moments: Tensor, ffn: DenseFFN, count: int, always_S: Tensor | None) -> Tensor:
    """Return `count` neurons, among them `always_S`, by second moments [F, F] or mean squares [F]; ascending."""
    if moments.dim() == 2:
        return most_needed(moments, ffn.w_out_DF, count, always_S)
    energy_F = moments * ffn.w_out_DF.square().sum(0)
    if always_S is not None:
        energy_F[always_S] = torch.inf
    return energy_F.topk(count).indices.sort().values


@torch.no_grad()
def judge(moe: MoEFFN, x_TD: Tensor, target_TD: Tensor) -> dict[str, float]:
    """Return how far a filled layer is from the dense FFN's output [T, D] on tokens: the figures of `oracle.compare`.

    The oracle chooses the expert with the least error for each token; experts are as fitted, not slices.
    """
    errors, chosen = [], []
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    for x, wanted in zip(x_TD.split(chunk), target_TD.split(chunk), strict=True):
        scores_TE = moe.scores(x)
        chosen.append(moe.router.choose(scores_TE, 1).experts_TK[:, 0])
        for_each = []
        for index in range(moe.num_experts):
            alone = Choice(torch.full((len(x), 1), index), None)
            routed_TD = moe.router.weigh(scores_TE, alone) * moe.expert(index, x)
            for_each.append((moe.finish(x, routed_TD) - wanted).square().sum(1))
        errors.append(torch.stack(for_each, dim=1))
    error_TE, expert_T1 = torch.cat(errors).double(), torch.cat(chosen).unsqueeze(1)
    energy = target_TD.square().sum(dtype=torch.float64)
    oracle_error = (error_TE.amin(1).sum() / energy).sqrt().item()
    router_error = (error_TE.gather(1, expert_T1).sum() / energy).sqrt().item()
    return {
        "oracle_error": oracle_error,
        "router_error": router_error,
        "gap": router_error - oracle_error,
        "router_recall": (error_TE.argmin(1, keepdim=True) == expert_T1).float().mean().item(),
        "captured_energy": 1 - router_error**2,
        "mean_active": 1.0,
        "scale": moe.output_scale.item(),
        "refit_error": router_error,
    }
