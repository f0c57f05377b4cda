"""Decompose one dense FFN into the experts of a mixture, and put the experts together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import chunk_of
from ffn2moe.decompose.partition import PartitionMethod, partition_with_shared, token_groups
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.experts import ExpertWeights, merge_experts, neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import low_precision
from ffn2moe.spec import MoESpec


@torch.no_grad()
def decompose_layer(
    ffn: DenseFFN,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
    *,
    seed: int,
    gradient_TD: Tensor | None = None,
    guarded: Tensor | None = None,
) -> MoEFFN:
    """Return the mixture of one layer: the FFN's neurons in experts, by their activations on tokens [T, D].

    `spec` gives the number of experts, their width and the partition. Nothing is trained: the router scores all experts
    alike. `gradient_TD` is the gradient of the loss at the FFN's output (`output_gradients`), which the partition
    `gradient` needs. The neurons `guarded` always belong to the shared expert.
    """
    shape = spec.shape_of(layer)
    method: PartitionMethod = spec.partition  # type: ignore[assignment]
    statistics = neuron_statistics(ffn, x_TD, method, spec.num_experts, shape.shared_width, seed, gradient_TD)
    expert_of_neuron_F = partition_with_shared(
        method, ffn, statistics, spec.num_experts, seed, shape.shared_width, guarded
    )
    neurons_EM = neurons_by_expert(expert_of_neuron_F, spec.num_experts, shape.expert_width)
    return mixture(ffn, neurons_EM, shared_neurons(expert_of_neuron_F), spec, layer)


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
def largest_contributions(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Return the most that each neuron adds to the FFN's output on tokens [T, D], [F], for `super_neurons`."""
    return neuron_statistics(ffn, x_TD, "nested", 1, 0, 0).largest_contribution(ffn)


@torch.no_grad()
def outputs(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Return the output of a dense FFN on tokens [T, D], in chunks, as a target to fit to (`low_precision`)."""
    found_TD = torch.empty_like(x_TD)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk := chunk_of(ffn.ffn_width)):
            found_TD[start : start + chunk] = ffn(x_TD[start : start + chunk])
    return found_TD


def neuron_statistics(
    ffn: DenseFFN,
    x_TD: Tensor,
    method: PartitionMethod,
    num_experts: int,
    shared_width: int,
    seed: int,
    gradient_TD: Tensor | None = None,
) -> NeuronStatistics:
    """Return the statistics on tokens [T, D] that a partition needs, and the choice of S shared neurons."""
    weighed = method == "gradient" and gradient_TD is not None
    statistics = NeuronStatistics(ffn.ffn_width, num_experts if weighed else 0, profiles=method == "coactivation")
    if method not in ("coactivation", "gradient", "nested") and shared_width == 0:
        return statistics
    group_T = token_groups(x_TD, num_experts, seed) if weighed else None
    chunk = chunk_of(ffn.ffn_width)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, start + chunk)
            h_TF = ffn.neurons(x_TD[rows])
            statistics.update(h_TF)
            if gradient_TD is not None and group_T is not None:
                statistics.update_importance(h_TF, gradient_TD[rows] @ ffn.w_out_DF, group_T[rows])
    return statistics


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
def output_of(model: Any, batch: Batch) -> Tensor:
    """Return a model's logits for a batch, else its last hidden state, at positions that are no padding. [N, ...]"""
    found = model(**batch.inputs)
    output = found.logits if getattr(found, "logits", None) is not None else found[0]
    if batch.mask is not None and output.shape[:2] == batch.mask.shape:
        return output[batch.mask.bool()]
    return output
