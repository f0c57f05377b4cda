"""The guard: neurons with massive activations always belong to the shared expert (Super Experts, arXiv 2507.23279)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.ablation.method import Method, add
from benchmarks.ablation.recipes import RECIPES, Guard, Recipe, train_ours
from ffn2moe.decompose.layer import neuron_statistics
from ffn2moe.decompose.partition import Partition
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.numerics import chunk_of, low_precision

QUANTILE, SHARE = 0.999, 0.1  # of the largest contributions of all neurons, and of the largest of these


@torch.no_grad()
def largest_contributions(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Return the most that each neuron adds to the output on tokens [T, D], ``max |h_j| ||w_out[:, j]||``, [F]."""
    largest_F = torch.zeros(ffn.ffn_width)
    with low_precision(ffn.ffn_width, x_TD.device):
        for x in x_TD.split(chunk_of(ffn.ffn_width)):
            largest_F = torch.maximum(largest_F, ffn.neurons(x).abs().amax(0).float().cpu())
    return largest_F * ffn.w_out_DF.norm(dim=0)


def super_neurons(largest: Sequence[Tensor]) -> list[Tensor]:
    """Return the neurons of each layer that make massive activations, in order, from the contributions [F] of each.

    Their contribution is above the 99.9th percentile over the model, and above a tenth of the largest, as arXiv
    2507.23279 defines super experts: few neurons, without which the model fails.
    """
    every = torch.cat(list(largest)).double()
    above = max(torch.quantile(every, QUANTILE).item(), SHARE * every.max().item())
    return [torch.nonzero(largest_F.double() > above).flatten() for largest_F in largest]


def guarded_neurons(ffns: Sequence[DenseFFN], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the super neurons of every layer of a dense model, from the inputs [T, D] of its FFNs."""
    return super_neurons([largest_contributions(ffn, x_TD) for ffn, x_TD in zip(ffns, inputs, strict=True)])


@torch.no_grad()
def shared_with_guard(ffn: DenseFFN, x_TD: Tensor, partition: Partition, width: int, guarded: Tensor) -> Tensor:
    """Return the neurons of a shared expert, [width] in order: the guarded ones, then those with most energy.

    ValueError where the shared expert is too narrow for the guarded neurons.
    """
    if len(guarded) > width:
        raise ValueError(f"{len(guarded)} neurons are guarded and the shared expert holds {width}: make it as wide")
    reads = "sums" if partition.reads == "weights" else partition.reads
    energy_F = neuron_statistics(ffn, x_TD, reads).energy(ffn)
    energy_F[guarded] = torch.inf
    return energy_F.topk(width).indices.sort().values


RECIPES.register("guard", Recipe(train_ours, guard=Guard(guarded_neurons, shared_with_guard)))
add(
    Method(
        "guard",
        "shared expert + coactivation + guard",
        "partition",
        "Super Experts, arXiv 2507.23279",
        shared=True,
        recipe="guard",
    )
)
