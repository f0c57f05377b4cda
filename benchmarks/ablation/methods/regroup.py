"""Give the neurons of dropped experts to the kept ones (DERN, arXiv 2509.10377), each to where its tokens go now.

Neurons keep their identity, so none are merged, as DERN does to keep the width: experts get wider, and all neurons
stay. It keeps less quality than a mixture with as many active neurons and all its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.ablation.method import Method, add
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.fit import calibrate
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.shrinking import SHRINK_METHODS, Layer, ShrinkMethod
from ffn2moe.shrinking.neurons import gather, places, take_router
from ffn2moe.shrinking.usage import chunks


def make(layer: Layer) -> MoEFFN:
    """Return the layer whose kept experts hold all neurons.

    A dropped expert's neuron joins the expert in which its output energy is largest over the tokens that used it: the
    best assignment under experts of equal width (`scipy.optimize.linear_sum_assignment`).
    """
    from scipy.optimize import linear_sum_assignment

    moe, kept_K, width, places_EM = layer.moe, layer.kept_K, layer.spec.expert_width, places(layer.moe)
    dropped = sorted(set(range(moe.num_experts)) - set(kept_K.tolist()))
    adopted = places_EM[dropped].flatten()
    real = adopted >= 0
    own_K = (places_EM[kept_K] >= 0).sum(1)
    slot_expert = torch.repeat_interleave(torch.arange(len(kept_K)), width - own_K)
    worth_NS = _energy(layer, dropped).flatten(0, 1)[real][:, slot_expert]
    row_N, slot_N = (torch.from_numpy(one) for one in linear_sum_assignment(worth_NS.numpy(), maximize=True))
    places_KM = torch.full((len(kept_K), width), -1)
    for index, expert in enumerate(kept_K.tolist()):
        own = places_EM[expert][places_EM[expert] >= 0]
        new = adopted[real][row_N[slot_expert[slot_N] == index]]
        places_KM[index, : len(own) + len(new)] = torch.cat([own, new])
    made = gather(moe, layer.spec, layer.index, places_KM)
    take_router(made, moe, kept_K)
    calibrate(made, layer.x_TD)
    return made


def _energy(layer: Layer, dropped: Sequence[int]) -> Tensor:
    """Return the output energy of each neuron of the dropped experts on the tokens of each kept one, [E', M, K]."""
    moe = layer.moe
    # A layer with the kept experts alone shows where the tokens go then.
    narrow = replace(layer.spec.stacks[0], expert_width=moe.w_in.shape[1])
    reduced = SHRINK_METHODS["drop"].make(replace(layer, spec=replace(layer.spec, stacks=(narrow,), shrunk="drop")))
    energy_EMK = torch.zeros(len(dropped), moe.neurons.shape[1], len(layer.kept_K), dtype=torch.float64)
    for x in chunks(moe, layer.x_TD):
        before_TE = _used(moe, x)
        after_TK = _used(reduced, x)
        for index, expert in enumerate(dropped):
            both_TK = before_TE[:, expert].unsqueeze(1) * after_TK
            energy_EMK[index] += (_neurons(moe, expert, x).square().T @ both_TK).double()
    energy_EMK *= moe.w_out[list(dropped)].square().sum(1).unsqueeze(-1)
    return energy_EMK


def _used(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """Return 1 where a token uses an expert, [T, E]."""
    return moe.router.choose(moe.scores(x_TD), moe.num_active).indicator_TE(moe.num_experts)


def _neurons(moe: MoEFFN, expert: int, x_TD: Tensor) -> Tensor:
    """Return the activations of an expert's neurons, [T, M]."""

    def part(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked[expert]

    ffn = DenseFFN(
        moe.w_in[expert],
        moe.w_out[expert],
        moe.activation,
        b_in_F=part(moe.b_in),
        w_gate_FD=part(moe.w_gate),
        b_gate_F=part(moe.b_gate),
    )
    return ffn.neurons(x_TD)


def width(layers: Sequence[MoEFFN], keep: int) -> int:
    """Return the width of `keep` experts that hold all neurons."""
    return max(-(-int((moe.neurons >= 0).sum()) // keep) for moe in layers)


SHRINK_METHODS.register("regroup", ShrinkMethod(make, "DERN, arXiv 2509.10377", width=width, keeps_order=False))
add(Method("regroup", "dropped, neurons regrouped", "after conversion", "DERN, arXiv 2509.10377", after="regroup"))
