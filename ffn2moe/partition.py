"""Neurons -> experts: which neurons of a dense FFN belong together.

Every partition is balanced: the widths of two experts differ by one neuron at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.activations import WIDEST_MOMENTS, NeuronStatistics
from ffn2moe.dense import DenseFFN

PartitionMethod = Literal["coactivation", "weights", "gradient", "nested", "random", "contiguous"]
PROFILE_DIRECTIONS = 64  # principal directions of a neuron's profile that the clustering sees
MOST_DIMENSIONS = 256  # of the points that the clustering of a wide FFN sees
SUPER_QUANTILE, SUPER_SHARE = 0.999, 0.1  # of the largest contributions of all neurons, and of the largest of these


def contiguous(ffn_width: int, num_experts: int) -> Tensor:
    """Equal runs of neurons in their order (FactorLLM, arXiv 2408.11855): a control. [F]"""
    return torch.arange(ffn_width) * num_experts // ffn_width


def random(ffn_width: int, num_experts: int, seed: int) -> Tensor:
    """Neurons dealt at random (LLaMA-MoE, arXiv 2406.16554): a control. [F]"""
    order = torch.randperm(ffn_width, generator=torch.Generator().manual_seed(seed))
    expert_of_neuron_F = torch.empty(ffn_width, dtype=torch.int64)
    expert_of_neuron_F[order] = contiguous(ffn_width, num_experts)
    return expert_of_neuron_F


def weights(ffn: DenseFFN, num_experts: int, seed: int) -> Tensor:
    """Balanced k-means on the direction of each neuron's input row (MoEfication, arXiv 2110.01786). [F]

    For a gated FFN the directions of the gate row and of the up row stand side by side.
    """
    rows = [F.normalize(w, dim=1) for w in (ffn.w_gate_FD, ffn.w_in_FD) if w is not None]
    return balanced_kmeans(torch.cat(rows, dim=1), num_experts, seed)


def coactivation(statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Balanced k-means on activation profiles: neurons that fire together go together. [F]

    A neuron's profile is its centred, normalised activation over the calibration tokens. Distances between
    profiles are known from their correlation matrix, whose leading eigenvectors give the coordinates.
    """
    return balanced_kmeans(statistics.profiles(PROFILE_DIRECTIONS, seed), num_experts, seed)


def gradient(importance_EF: Tensor) -> Tensor:
    """Neurons to the experts that need them, by their importance to E groups of tokens. [F]

    LLaMA-MoE (arXiv 2406.16554; its experts without neurons in common): of all pairs of expert and neuron the most
    important comes first; it is made if the neuron is free and the expert not full. The groups are clusters of tokens
    at the layer's input, as in LLaMA-MoE v2 (arXiv 2411.15708): see `token_groups`.
    """
    E, width = importance_EF.shape
    least, wider = divmod(width, E)  # `wider` of the experts hold one neuron more
    expert_of_neuron = [-1] * width
    held = [0] * E
    for pair in importance_EF.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(pair, width)
        if expert_of_neuron[neuron] >= 0 or held[expert] > least or (held[expert] == least and not wider):
            continue
        wider -= held[expert] == least
        expert_of_neuron[neuron] = expert
        held[expert] += 1
    return torch.tensor(expert_of_neuron)


def token_groups(x_TD: Tensor, num_groups: int, seed: int) -> Tensor:
    """Tokens [T, D] in groups of about equal size: balanced k-means on their leading directions. [T] int64

    ValueError if there are fewer tokens than groups.
    """
    if len(x_TD) < num_groups:
        raise ValueError(
            f"{len(x_TD)} calibration tokens do not make {num_groups} groups, which the gradient partition needs: "
            "give it more text"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        directions = min(PROFILE_DIRECTIONS, *x_TD.shape)
        points_TP = torch.pca_lowrank(x_TD, directions)[0]
    return balanced_kmeans(points_TP, num_groups, seed)


def nested(energy_F: Tensor, num_experts: int) -> Tensor:
    """Neurons in blocks by their output energy, expert 0 that of the highest, so that any first n are a good FFN. [F]

    Nested sub-networks as in SortedNet (arXiv 2309.00255), of which Adaptive Computation Modules (arXiv 2312.10193)
    choose how many a token runs.
    """
    expert_of_neuron_F = torch.empty(len(energy_F), dtype=torch.int64)
    expert_of_neuron_F[energy_F.argsort(descending=True, stable=True)] = contiguous(len(energy_F), num_experts)
    return expert_of_neuron_F


def balanced_kmeans(points_FP: Tensor, num_experts: int, seed: int) -> Tensor:
    """K-means whose clusters differ in size by one at most; clusters are named by their first neuron. [F]

    Assignment under capacity is a minimum-cost flow (Bradley, Bennett & Demiriz 2000; `k-means-constrained`).
    """
    from k_means_constrained import KMeansConstrained

    count = len(points_FP)
    wide = count > WIDEST_MOMENTS  # then a run takes seconds, and what its last steps gain is slight
    if wide and points_FP.shape[1] > MOST_DIMENSIONS:
        # A random projection keeps the distances, and so the cost of every clustering (Johnson & Lindenstrauss 1984).
        generator = torch.Generator().manual_seed(seed)
        points_FP = points_FP @ torch.randn(points_FP.shape[1], MOST_DIMENSIONS, generator=generator).to(points_FP)
    clustering = KMeansConstrained(
        n_clusters=num_experts,
        size_min=count // num_experts,
        size_max=-(-count // num_experts),
        n_init=1 if wide else 4,
        max_iter=50 if wide else 300,
        random_state=seed,
        n_jobs=1,
    )
    labels = clustering.fit_predict(points_FP.double().numpy().astype(np.float64))
    _, first = np.unique(labels, return_index=True)
    rank = np.empty(num_experts, dtype=np.int64)
    rank[labels[np.sort(first)]] = np.arange(num_experts)
    return torch.from_numpy(rank[labels])


def super_neurons(largest: Sequence[Tensor]) -> list[Tensor]:
    """The neurons of each layer that make massive activations, in order, from the largest contributions [F] of each.

    Those above the 99.9th percentile of all the model's neurons, and above a tenth of the largest, as Super Experts
    are told from others (arXiv 2507.23279): few, and without them a model says nothing of use.
    """
    every = torch.cat(list(largest)).double()
    above = max(torch.quantile(every, SUPER_QUANTILE).item(), SUPER_SHARE * every.max().item())
    return [torch.nonzero(largest_F.double() > above).flatten() for largest_F in largest]


def shared_by_energy(
    ffn: DenseFFN, statistics: NeuronStatistics, shared_width: int, guarded: Tensor | None = None
) -> Tensor:
    """The S neurons that carry most of the FFN's output, for the shared expert, [S] in order; `guarded` are among them.

    By expected output energy (CMoE, arXiv 2502.04416), as DeepSeekMoE (arXiv 2401.06066) isolates shared experts.
    ValueError if S are too few for the guarded.
    """
    energy_F = statistics.energy(ffn)
    if guarded is not None:
        if len(guarded) > shared_width:
            raise ValueError(
                f"{len(guarded)} neurons are guarded and the shared expert holds {shared_width}: make it as wide"
            )
        energy_F[guarded] = torch.inf
    return energy_F.topk(shared_width).indices.sort().values


def partition_with_shared(
    method: PartitionMethod,
    ffn: DenseFFN,
    statistics: NeuronStatistics,
    num_experts: int,
    seed: int,
    shared_width: int,
    guarded: Tensor | None = None,
) -> Tensor:
    """The expert of each neuron, [F] int64, -1 for those of the shared expert; the rest by the named method.

    The neurons `guarded` always belong to the shared expert.
    """
    if shared_width == 0 and (guarded is None or len(guarded) == 0):
        return partition(method, ffn, statistics, num_experts, seed)
    routed_F = torch.ones(ffn.ffn_width, dtype=torch.bool)
    routed_F[shared_by_energy(ffn, statistics, shared_width, guarded)] = False
    rest_R = routed_F.nonzero().flatten()
    expert_of_neuron_F = torch.full((ffn.ffn_width,), -1, dtype=torch.int64)
    expert_of_neuron_F[rest_R] = partition(method, ffn.narrow(rest_R), statistics.narrow(rest_R), num_experts, seed)
    return expert_of_neuron_F


def partition(
    method: PartitionMethod, ffn: DenseFFN, statistics: NeuronStatistics | None, num_experts: int, seed: int
) -> Tensor:
    """The expert of each neuron, [F] int64, by the named method.

    `coactivation` and `nested` need statistics, `gradient` those of importance to E groups; ValueError without.
    """
    if method == "contiguous":
        return contiguous(ffn.ffn_width, num_experts)
    if method == "random":
        return random(ffn.ffn_width, num_experts, seed)
    if method == "weights":
        return weights(ffn, num_experts, seed)
    if method not in get_args(PartitionMethod):
        raise ValueError(f"partition {method!r} is not one of {', '.join(get_args(PartitionMethod))}")
    if statistics is None or statistics.tokens == 0:
        raise ValueError(f"the {method} partition needs activation statistics: give it calibration text")
    if method == "coactivation":
        return coactivation(statistics, num_experts, seed)
    if method == "nested":
        return nested(statistics.energy(ffn), num_experts)
    if len(statistics.members_G) != num_experts:
        raise ValueError(
            f"the gradient partition into {num_experts} experts needs the neurons' importance to as many groups of "
            "tokens, from a backward pass through the whole model; where there is none, use coactivation"
        )
    return gradient(statistics.importance())
