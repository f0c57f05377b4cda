"""Decompose one dense FFN into the experts of a mixture, and put the experts together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.partition import PARTITIONS, Partition
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.experts import ExpertWeights, merge_experts, neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import chunk_of, low_precision
from ffn2moe.spec import MoESpec

IDENTITY_TOLERANCE = 1e-5  # largest difference between the dense output and that of all experts


@torch.no_grad()
def decompose_layer(
    ffn: DenseFFN,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
    *,
    seed: int,
    partition: Partition | None = None,
    shared_S: Tensor | None = None,
) -> MoEFFN:
    """Return the mixture of one layer: the FFN's neurons in experts, by their activations on tokens [T, D].

    `spec` gives the number of experts, their width and the partition. Nothing is trained: the router scores all experts
    alike. `partition` replaces the row that the spec names, and `shared_S` the neurons of the shared expert, which are
    else those with most energy (`most_energetic`), or the first ones where the fit of the router fills it anew.
    ValueError where the partition reads statistics and there are no tokens.
    """
    partition = PARTITIONS[spec.partition] if partition is None else partition
    shared_width = spec.shape_of(layer).shared_width if shared_S is None else len(shared_S)
    if partition.refilled and shared_S is None:  # nothing that is measured would last
        shared_S = torch.arange(shared_width)
    reads = "sums" if partition.reads == "weights" and shared_width and shared_S is None else partition.reads
    statistics = neuron_statistics(ffn, x_TD, reads)
    if shared_S is None:
        shared_S = most_energetic(ffn, statistics, shared_width)
    expert_of_neuron_F = assign_neurons(partition, ffn, statistics, spec.num_experts, seed, shared_S)
    neurons_EM = neurons_by_expert(expert_of_neuron_F, spec.num_experts, spec.shape_of(layer).expert_width)
    return mixture(ffn, neurons_EM, shared_neurons(expert_of_neuron_F), spec, layer)


def neuron_statistics(ffn: DenseFFN, x_TD: Tensor, reads: Literal["weights", "sums", "profiles"]) -> NeuronStatistics:
    """Return the statistics on tokens [T, D] that a partition reads; empty ones where it reads the weights alone."""
    statistics = NeuronStatistics(ffn.ffn_width, profiles=reads == "profiles")
    if reads == "weights":
        return statistics
    with low_precision(ffn.ffn_width, x_TD.device):
        for x in x_TD.split(chunk_of(ffn.ffn_width)):
            statistics.update(ffn.neurons(x))
    return statistics


def most_energetic(ffn: DenseFFN, statistics: NeuronStatistics, count: int) -> Tensor:
    """Return the neurons with the highest expected output energy, [count] in order: those of the shared expert.

    The measure is that of CMoE (arXiv 2502.04416); DeepSeekMoE (arXiv 2401.06066) isolates shared experts.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    return statistics.energy(ffn).topk(count).indices.sort().values


def assign_neurons(
    partition: Partition,
    ffn: DenseFFN,
    statistics: NeuronStatistics,
    num_experts: int,
    seed: int,
    shared_S: Tensor,
) -> Tensor:
    """Return the expert of each neuron, [F] int64; -1 for the neurons `shared_S` of the shared expert."""
    if partition.reads != "weights" and statistics.tokens == 0:
        raise ValueError("the partition reads the neurons' activations, and there are none: give it calibration text")
    if len(shared_S) == 0:
        return partition.assign(ffn, statistics, num_experts, seed)
    routed_F = torch.ones(ffn.ffn_width, dtype=torch.bool)
    routed_F[shared_S] = False
    rest_R = routed_F.nonzero().flatten()
    expert_of_neuron_F = torch.full((ffn.ffn_width,), -1, dtype=torch.int64)
    expert_of_neuron_F[rest_R] = partition.assign(ffn.narrow(rest_R), statistics.narrow(rest_R), num_experts, seed)
    return expert_of_neuron_F


def mixture(ffn: DenseFFN, neurons_EM: Tensor, shared_S: Tensor, spec: MoESpec, layer: int) -> MoEFFN:
    """Return the mixture of one layer with a given partition: `neurons_EM` in experts, `shared_S` in the shared one."""
    return MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM, shared_S), neurons_EM, layer, shared_S).eval()


@torch.no_grad()
def dense_ffn(moe: MoEFFN) -> DenseFFN:
    """Return the dense FFN whose slices the experts of a mixture are: the inverse of `mixture`, to the bit."""
    shared = None
    if moe.shared_in is not None and moe.shared_out is not None:
        shared = DenseFFN(
            w_in_FD=moe.shared_in.detach(),
            w_out_DF=moe.shared_out.detach(),
            activation=moe.activation,
            b_in_F=_detached(moe.shared_b_in),
            w_gate_FD=_detached(moe.shared_gate),
            b_gate_F=_detached(moe.shared_b_gate),
        )
    b_out_D = _detached(moe.b_out)
    weights = ExpertWeights(
        w_in_EMD=moe.w_in.detach(),
        w_out_EDM=moe.w_out.detach(),
        b_in_EM=_detached(moe.b_in),
        b_out_D=None if b_out_D is None else b_out_D.clone(),
        w_gate_EMD=_detached(moe.w_gate),
        b_gate_EM=_detached(moe.b_gate),
        shared=shared,
    )
    return merge_experts(weights, moe.neurons, moe.activation, moe.shared_neurons)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@torch.no_grad()
def outputs(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Return the output of a dense FFN on tokens [T, D], in chunks, as a target to fit to (`low_precision`)."""
    found_TD = torch.empty_like(x_TD)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk := chunk_of(ffn.ffn_width)):
            found_TD[start : start + chunk] = ffn(x_TD[start : start + chunk])
    return found_TD


@contextmanager
def every_expert(layers: Sequence[MoEFFN]) -> Iterator[None]:
    """Make each layer the dense FFN that it was decomposed from while the context lasts: K = E and equal scores."""
    changed = ("router.", "output_scale", "elastic_scale.")
    kept = [
        (moe.num_active, {k: v.clone() for k, v in moe.state_dict().items() if k.startswith(changed)}) for moe in layers
    ]
    for moe in layers:
        moe.use_all_experts()
    try:
        yield
    finally:
        for moe, (num_active, tensors) in zip(layers, kept, strict=True):
            moe.num_active = num_active
            moe.load_state_dict(tensors, strict=False)


@torch.no_grad()
def require_identity(
    layers: Sequence[MoEFFN], dense: Tensor, run: Callable[[], Tensor], *, name: str, family: str
) -> float:
    """Return the largest difference between the output `dense` and that of `run` while all experts are active.

    ValueError where it is above `IDENTITY_TOLERANCE`, relative to the largest output; `name` is the model, or a layer.
    """
    with every_expert(layers):
        difference = (run() - dense).abs().max().item()
    tolerance = IDENTITY_TOLERANCE * max(1.0, dense.abs().max().item())  # logits may be large
    if not difference <= tolerance:
        raise ValueError(
            f"with all experts active the mixture differs from the dense model by {difference:.1e}, more than "
            f"{tolerance:.0e}: {name} computes its FFNs in another way than the family {family!r} says, so its experts "
            "would be wrong"
        )
    return float(difference)


@torch.no_grad()
def output_of(model: Any, batch: Batch) -> Tensor:
    """Return a model's logits for a batch, else its last hidden state, at positions that are no padding. [N, ...]"""
    found = model(**batch.inputs)
    output = found.logits if getattr(found, "logits", None) is not None else found[0]
    if batch.mask is not None and output.shape[:2] == batch.mask.shape:
        return output[batch.mask.bool()]
    return output
