"""Partitions that read the weights or the neurons' energy alone, and the shared expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ablation.method import Method, add
from ffn2moe.decompose.clustering import balanced_kmeans
from ffn2moe.decompose.partition import PARTITIONS, Partition
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN


def runs(ffn_width: int, num_experts: int) -> Tensor:
    """Return the expert of each neuron, [F]: equal runs of neurons in their order."""
    return torch.arange(ffn_width) * num_experts // ffn_width


def contiguous(ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Assign equal runs of neurons in their order, [F]: a control."""
    return runs(ffn.ffn_width, num_experts)


def random(ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Assign neurons at random, [F]: a control."""
    return in_blocks(torch.randperm(ffn.ffn_width, generator=torch.Generator().manual_seed(seed)), num_experts)


def in_blocks(order_F: Tensor, num_experts: int) -> Tensor:
    """Return the expert of each neuron, [F], where the neurons in this order fill the experts one after another."""
    expert_of_neuron_F = torch.empty(len(order_F), dtype=torch.int64)
    expert_of_neuron_F[order_F] = runs(len(order_F), num_experts)
    return expert_of_neuron_F


def weights(ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Assign neurons by balanced k-means on the direction of their input rows, [F].

    For a gated FFN the directions of the gate row and of the up row stand side by side.
    """
    rows = [F.normalize(w, dim=1) for w in (ffn.w_gate_FD, ffn.w_in_FD) if w is not None]
    return balanced_kmeans(torch.cat(rows, dim=1), num_experts, seed)


def nested(ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Assign neurons in blocks by falling output energy, [F]: any first n experts are a good FFN.

    These are the nested sub-networks of SortedNet (arXiv 2309.00255); Adaptive Computation Modules (arXiv 2312.10193)
    choose how many of them a token runs.
    """
    return in_blocks(statistics.energy(ffn).argsort(descending=True, stable=True), num_experts)


PARTITIONS.register("contiguous", Partition("FactorLLM, arXiv 2408.11855", contiguous))
PARTITIONS.register("random", Partition("LLaMA-MoE, arXiv 2406.16554", random))
PARTITIONS.register("weights", Partition("MoEfication, arXiv 2110.01786", weights))
PARTITIONS.register("nested", Partition("SortedNet, arXiv 2309.00255", nested, reads="sums"))

add(
    Method("contiguous", "contiguous", "partition", "arXiv 2408.11855", partition="contiguous"),
    Method("random", "random", "partition", "arXiv 2406.16554", partition="random"),
    Method("weights", "weights", "partition", "MoEfication, arXiv 2110.01786", partition="weights"),
    Method(
        "nested",
        "nested, a prefix per token",
        "partition",
        "SortedNet, arXiv 2309.00255",
        partition="nested",
        selection="prefix",
    ),
    Method("shared", "shared expert + coactivation", "partition", "CMoE, arXiv 2502.04416", shared=True),
)
