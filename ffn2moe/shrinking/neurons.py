"""Make a layer of other experts from the neurons of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.experts import ExpertWeights
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec


def gather(moe: MoEFFN, spec: MoESpec, layer: int, places_KM: Tensor) -> MoEFFN:
    """Return a layer of other experts: each place holds the neuron e * M + m of the old one, or none for -1."""
    present_KM = places_KM >= 0

    def taken(stacked_EM: Tensor | None) -> Tensor | None:  # [E, M, ...] -> [K, M', ...]
        if stacked_EM is None:
            return None
        found = stacked_EM.flatten(0, 1)[places_KM.clamp(min=0)]
        found[~present_KM] = 0
        return found

    w_in_KMD, w_out_KMD = taken(moe.w_in), taken(moe.w_out.transpose(1, 2))
    assert w_in_KMD is not None and w_out_KMD is not None
    weights = ExpertWeights(
        w_in_KMD,
        w_out_KMD.transpose(1, 2).contiguous(),
        taken(moe.b_in),
        moe.b_out,
        taken(moe.w_gate),
        taken(moe.b_gate),
        _shared(moe),
    )
    neurons_KM = moe.neurons.flatten()[places_KM.clamp(min=0)].masked_fill(~present_KM, -1)
    return MoEFFN.from_experts(spec, weights, neurons_KM, layer, moe.shared_neurons)


def _shared(moe: MoEFFN) -> DenseFFN | None:
    """Return the shared expert, where there is one."""
    if moe.shared_in is None or moe.shared_out is None:
        return None
    return DenseFFN(
        moe.shared_in,
        moe.shared_out,
        moe.activation,
        b_in_F=moe.shared_b_in,
        w_gate_FD=moe.shared_gate,
        b_gate_F=moe.shared_b_gate,
    )


def take_router(made: MoEFFN, moe: MoEFFN, kept_K: Tensor) -> None:
    """Copy the router's rows of the kept experts, the rest of the router, and the scales as a start."""
    made.router.weight.copy_(moe.router.weight[kept_K])
    made.router.bias.copy_(moe.router.bias[kept_K])
    made.router.balance_bias.copy_(moe.router.balance_bias[kept_K])
    made.router.scale.copy_(moe.router.scale)
    for name in moe.router.rule.buffers:
        made.router.get_buffer(name).copy_(moe.router.get_buffer(name))
    made.output_scale.copy_(moe.output_scale)
    for active, scale in made.elastic_scale.items():
        scale.copy_(moe.elastic_scale[active])


def places(moe: MoEFFN) -> Tensor:
    """Return the number e * M + m of every neuron, [E, M]; -1 for padding."""
    return torch.arange(moe.neurons.numel()).view_as(moe.neurons).masked_fill(moe.neurons < 0, -1)
