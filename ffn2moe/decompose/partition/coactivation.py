"""Put neurons that are active on the same tokens into the same expert."""

from __future__ import annotations

from torch import Tensor

from ffn2moe.decompose.clustering import balanced_kmeans
from ffn2moe.decompose.partition import Partition
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN

PROFILE_DIRECTIONS = 64  # principal directions of a neuron's profile that the clustering reads


def coactivation(ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Return the expert of each neuron, [F], by balanced k-means on activation profiles.

    A neuron's profile is its centred, normalised activation over the calibration tokens. Distances between profiles
    follow from their correlation matrix, whose leading eigenvectors give the coordinates.
    """
    return balanced_kmeans(statistics.profiles(PROFILE_DIRECTIONS, seed), num_experts, seed)


ROW = Partition("docs/methods.md", coactivation, reads="profiles")
