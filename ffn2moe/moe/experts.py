"""Slice the weights of a dense FFN into experts by a partition, and merge them again.

A partition is stored as `neurons_EM` [E, M]: the neuron at each place of each expert, -1 where an expert is
shorter than the widest. Padding is a zero neuron: act(0) * 0 = 0 for every activation here, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.literals import Activation


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of E experts, stacked; `b_out_D` belongs to no expert and is added once.

    `shared` holds the neurons that every token uses, without an output bias.
    """

    w_in_EMD: Tensor
    w_out_EDM: Tensor
    b_in_EM: Tensor | None
    b_out_D: Tensor | None
    w_gate_EMD: Tensor | None
    b_gate_EM: Tensor | None
    shared: DenseFFN | None = None


def neurons_by_expert(expert_of_neuron_F: Tensor, num_experts: int, multiple: int = 1) -> Tensor:
    """Return the index matrix [E, M] of an assignment [F] of neurons to experts; neurons stay in order.

    M is the width of the widest expert, rounded up to a `multiple` that a kernel needs. A neuron assigned to -1
    is in no expert: it belongs to the shared one. ValueError if an expert is empty or an index is out of range.
    """
    if expert_of_neuron_F.min() < -1 or expert_of_neuron_F.max() >= num_experts:
        raise ValueError(f"the assignment names experts outside 0..{num_experts - 1}")
    groups = [torch.nonzero(expert_of_neuron_F == expert).flatten() for expert in range(num_experts)]
    widths = [len(group) for group in groups]
    if min(widths) == 0:
        raise ValueError(f"expert {widths.index(0)} has no neuron: use fewer experts")
    neurons_EM = torch.full((num_experts, -(-max(widths) // multiple) * multiple), -1, dtype=torch.int64)
    for expert, group in enumerate(groups):
        neurons_EM[expert, : len(group)] = group
    return neurons_EM


def shared_neurons(expert_of_neuron_F: Tensor) -> Tensor:
    """Return the neurons [S] that an assignment leaves to the shared expert; neurons stay in order."""
    return torch.nonzero(expert_of_neuron_F == -1).flatten()


def slice_experts(ffn: DenseFFN, neurons_EM: Tensor, shared_S: Tensor | None = None) -> ExpertWeights:
    """Return the experts of `ffn` under a partition: each neuron's rows and column, copied to its place.

    ValueError unless the partition holds each neuron once.
    """
    shared_S = torch.empty(0, dtype=torch.int64) if shared_S is None else shared_S
    covered = torch.cat([neurons_EM[neurons_EM >= 0], shared_S]).sort().values
    if not torch.equal(covered, torch.arange(ffn.ffn_width)):
        raise ValueError(f"the partition must hold each of the {ffn.ffn_width} neurons exactly once")
    return copy_experts(ffn, neurons_EM, shared_S)


def copy_experts(ffn: DenseFFN, neurons_EM: Tensor, shared_S: Tensor) -> ExpertWeights:
    """Return experts of any neurons of `ffn`: one may stand in several experts, or in none."""
    present_EM = neurons_EM >= 0

    def rows(tensor: Tensor | None) -> Tensor | None:  # [F, ...] -> [E, M, ...]
        if tensor is None:
            return None
        taken = tensor[neurons_EM.clamp(min=0)]
        taken[~present_EM] = 0
        return taken

    w_in_EMD, w_out_EMD = rows(ffn.w_in_FD), rows(ffn.w_out_DF.T)
    assert w_in_EMD is not None and w_out_EMD is not None
    return ExpertWeights(
        w_in_EMD=w_in_EMD,
        w_out_EDM=w_out_EMD.transpose(1, 2).contiguous(),
        b_in_EM=rows(ffn.b_in_F),
        b_out_D=None if ffn.b_out_D is None else ffn.b_out_D.clone(),
        w_gate_EMD=rows(ffn.w_gate_FD),
        b_gate_EM=rows(ffn.b_gate_F),
        shared=ffn.narrow(shared_S) if len(shared_S) else None,
    )


def merge_experts(
    weights: ExpertWeights, neurons_EM: Tensor, activation: Activation, shared_S: Tensor | None = None
) -> DenseFFN:
    """Return the dense FFN that the experts were sliced from: the exact inverse of `slice_experts`."""
    present_EM = neurons_EM >= 0
    neurons = neurons_EM[present_EM]
    order = (neurons if shared_S is None else torch.cat([neurons, shared_S])).argsort()

    def flat(tensor: Tensor | None, shared: Tensor | None) -> Tensor | None:  # [E, M, ...] and [S, ...] -> [F, ...]
        if tensor is None:
            return None
        rows = tensor[present_EM]
        return (rows if shared is None else torch.cat([rows, shared]))[order]

    shared = weights.shared
    w_in_FD = flat(weights.w_in_EMD, shared and shared.w_in_FD)
    w_out_FD = flat(weights.w_out_EDM.transpose(1, 2), shared and shared.w_out_DF.T)
    assert w_in_FD is not None and w_out_FD is not None
    return DenseFFN(
        w_in_FD=w_in_FD,
        w_out_DF=w_out_FD.T.contiguous(),
        activation=activation,
        b_in_F=flat(weights.b_in_EM, shared and shared.b_in_F),
        b_out_D=weights.b_out_D,
        w_gate_FD=flat(weights.w_gate_EMD, shared and shared.w_gate_FD),
        b_gate_F=flat(weights.b_gate_EM, shared and shared.b_gate_F),
    )
