"""Neurons -> experts: which neurons of a dense FFN belong together.

Every partition is balanced: the widths of two experts differ by one neuron at most.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.activations import WIDEST_MOMENTS, NeuronStatistics
from ffn2moe.dense import DenseFFN

PartitionMethod = Literal["coactivation", "weights", "random", "contiguous"]
PROFILE_DIRECTIONS = 64  # principal directions of a neuron's profile that the clustering sees


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


def balanced_kmeans(points_FP: Tensor, num_experts: int, seed: int) -> Tensor:
    """K-means whose clusters differ in size by one at most; clusters are named by their first neuron. [F]

    Assignment under capacity is a minimum-cost flow (Bradley, Bennett & Demiriz 2000; `k-means-constrained`).
    """
    from k_means_constrained import KMeansConstrained

    count = len(points_FP)
    wide = count > WIDEST_MOMENTS  # then a run takes seconds, and what its last steps gain is slight
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


def shared_by_energy(ffn: DenseFFN, statistics: NeuronStatistics, shared_width: int) -> Tensor:
    """The S neurons that carry most of the FFN's output, for the shared expert, [S] in order.

    By expected output energy (CMoE, arXiv 2502.04416), as DeepSeekMoE (arXiv 2401.06066) isolates shared experts.
    """
    return statistics.energy(ffn).topk(shared_width).indices.sort().values


def partition_with_shared(
    method: PartitionMethod,
    ffn: DenseFFN,
    statistics: NeuronStatistics,
    num_experts: int,
    seed: int,
    shared_width: int,
) -> Tensor:
    """The expert of each neuron, [F] int64, -1 for those of the shared expert; the rest by the named method."""
    if shared_width == 0:
        return partition(method, ffn, statistics, num_experts, seed)
    routed_F = torch.ones(ffn.ffn_width, dtype=torch.bool)
    routed_F[shared_by_energy(ffn, statistics, shared_width)] = False
    rest_R = routed_F.nonzero().flatten()
    expert_of_neuron_F = torch.full((ffn.ffn_width,), -1, dtype=torch.int64)
    expert_of_neuron_F[rest_R] = partition(method, ffn.narrow(rest_R), statistics.narrow(rest_R), num_experts, seed)
    return expert_of_neuron_F


def partition(
    method: PartitionMethod, ffn: DenseFFN, statistics: NeuronStatistics | None, num_experts: int, seed: int
) -> Tensor:
    """The expert of each neuron, [F] int64, by the named method; `coactivation` needs statistics."""
    if method == "contiguous":
        return contiguous(ffn.ffn_width, num_experts)
    if method == "random":
        return random(ffn.ffn_width, num_experts, seed)
    if method == "weights":
        return weights(ffn, num_experts, seed)
    if statistics is None or statistics.tokens == 0:
        raise ValueError("the coactivation partition needs activation statistics: give it calibration text")
    return coactivation(statistics, num_experts, seed)
