"""Other FFN compressors at the active FLOPs of a mixture: the baselines that show what routing is worth.

A compressed FFN spends the same on every token. Each is built in closed form from a dense FFN and its inputs on
calibration text, in the strongest form known to us. The input matrices are fitted to the pre-activations, with each
neuron weighted by what an error in it does to the output. Then least squares fits the output matrix and bias to the
dense FFN's output on the activations that are left. The error on calibration tokens decides what a method leaves open
(block counts, the size of a basis, how the matrices share the FLOPs). Compressed FFNs can be trained like mixtures.
They exist for comparison: no checkpoint, container or export holds one. Each registers itself from a file of
`benchmarks.ablation.methods`.

Letters as in `ffn2moe.spec`; in addition, I inputs and O outputs of a linear map, and R its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ablation.least_squares import Moments
from benchmarks.ablation.linear_maps import CompressedFFN, Dense, LinearMap
from ffn2moe.dense.ffn import ACTIVATIONS, DenseFFN
from ffn2moe.dense.locate import ffn_layers, install, read_ffn
from ffn2moe.metrics import ffn_flops
from ffn2moe.table import Table

SEARCH_TOKENS = 4096  # tokens that decide what a method leaves open
SPLITS = (-0.15, 0.0, 0.15)  # tried shares of the input matrices, about that of their number

Compressor = Callable[[DenseFFN, Tensor, int], CompressedFFN]  # an FFN, its inputs [T, D], the FLOPs of a token
COMPRESSORS: Table[Compressor] = Table("compressor")


def mixture_flops(width: int, ffn_width: int, *, gated: bool, active_share: float, num_experts: int) -> int:
    """Return the FLOPs of one token in one FFN of a mixture: the active share of the neurons, and the router."""
    return int(active_share * ffn_flops(width, ffn_width, gated=gated)) + 2 * width * num_experts


@torch.no_grad()
def build(name: str, ffn: DenseFFN, x_TD: Tensor, active_share: float, *, num_experts: int = 8) -> CompressedFFN:
    """Compress an FFN, from its inputs [T, D], to the FLOPs of a mixture of `num_experts` with this active share.

    The FLOPs are as near to the mixture's, router included, as the structure allows, and never above. At an active
    share of 1 the result is the dense FFN. ValueError for an unknown name, a share outside (0, 1], or one that is too
    small for the method.
    """
    compressor = COMPRESSORS[name]
    if not 0 < active_share <= 1:
        raise ValueError(f"active_share = {active_share} must be above 0 and at most 1: it is a share of the FFN")
    D = ffn.w_in_FD.shape[1]
    if len(x_TD) < 2:
        raise ValueError(f"{name} needs calibration tokens: {len(x_TD)} are too few to show what varies")
    if active_share == 1:
        return keep(ffn, torch.arange(ffn.ffn_width), Dense(ffn.w_out_DF, ffn.b_out_D))
    flops = mixture_flops(D, ffn.ffn_width, gated=ffn.gated, active_share=active_share, num_experts=num_experts)
    try:
        return compressor(ffn, x_TD, flops)
    except ValueError as error:
        raise ValueError(f"the compressor {name} at an active share of {active_share}: {error}") from error


def compress(
    model: nn.Module, name: str, inputs: Sequence[Tensor], active_share: float, *, num_experts: int = 8
) -> list[CompressedFFN]:
    """Put a compressed FFN in the place of every FFN of a dense model; return them in the order of the layers.

    `inputs` are the FFNs' inputs on calibration text, [T, D] each (`ffn2moe.decompose.inputs.layer_inputs`). Nothing is
    installed if one layer's cannot be built.
    """
    count = len(ffn_layers(model))
    if len(inputs) != count:
        raise ValueError(f"there are inputs of {len(inputs)} FFNs and the model has {count}: give one tensor each")
    layers = [
        build(name, read_ffn(model, layer), x_TD, active_share, num_experts=num_experts)
        for layer, x_TD in enumerate(inputs)
    ]
    for layer, compressed in enumerate(layers):
        install(model, layer, compressed)
    return layers


def keep(ffn: DenseFFN, neurons_S: Tensor, w_out: LinearMap, around: LinearMap | None = None) -> CompressedFFN:
    """Return an FFN of some of the neurons as they are, with another map out of them."""
    part = ffn.narrow(neurons_S)
    w_gate = None if part.w_gate_FD is None else Dense(part.w_gate_FD, part.b_gate_F)
    return CompressedFFN(ffn.activation, Dense(part.w_in_FD, part.b_in_F), w_out, w_gate, around)


def neurons_for(ffn: DenseFFN, flops: int) -> int:
    """Return how many neurons these FLOPs pay for."""
    return min(ffn.ffn_width, flops // ffn_flops(ffn.w_in_FD.shape[1], 1, gated=ffn.gated))


class Structure(Protocol):
    """A kind of map that replaces a matrix: the best of its kind for some FLOPs. ValueError if they are too few."""

    def into(self, moments: Moments, flops: int) -> LinearMap:
        """Return the map from D to the neurons."""
        ...

    def out_of(self, moments: Moments, flops: int) -> LinearMap:
        """Return the map from the neurons to D."""
        ...


def _sensitivity(ffn: DenseFFN, x_TD: Tensor) -> list[Tensor]:
    """Return what an error in each pre-activation does to the output, to first order: [F] for `w_in` and `w_gate`.

    It is the root of the mean squared derivative times the length of the neuron's output column; never quite zero.
    """
    up_TF = F.linear(x_TD, ffn.w_in_FD, ffn.b_in_F).requires_grad_(True)
    act = ACTIVATIONS[ffn.activation]
    with torch.enable_grad():
        if ffn.w_gate_FD is None:
            wanted, h_TF = [up_TF], act(up_TF)
        else:
            gate_TF = F.linear(x_TD, ffn.w_gate_FD, ffn.b_gate_F).requires_grad_(True)
            wanted, h_TF = [up_TF, gate_TF], act(gate_TF) * up_TF
        slopes = torch.autograd.grad(h_TF.sum(), wanted)
    found = [slope.square().mean(0).sqrt() * ffn.w_out_DF.norm(dim=0) for slope in slopes]
    return [one_F.clamp(min=1e-3 * one_F.max().clamp(min=1e-30)) for one_F in found]


def factored(ffn: DenseFFN, x_TD: Tensor, flops: int, structures: Sequence[Structure]) -> CompressedFFN:
    """Replace all matrices by maps of one structure, with the structure and the split of the FLOPs that fit best.

    ValueError, from the last one tried, if no structure fits.
    """
    few_TD = x_TD[:SEARCH_TOKENS]
    y_TD, moments = ffn(few_TD), _input_moments(ffn, few_TD)
    matrices = len(moments)
    best: tuple[float, Structure, float] | None = None
    refusal: ValueError | None = None
    for structure, shift in product(structures, SPLITS):
        share = matrices / (matrices + 1) + shift
        try:
            made = _replaced(ffn, few_TD, moments, flops, structure, share)
        except ValueError as reason:
            refusal = reason
            continue
        error = (made(few_TD) - y_TD).square().sum().item()
        if best is None or error < best[0]:
            best = error, structure, share
    if best is None:
        assert refusal is not None
        raise refusal
    return _replaced(ffn, x_TD, _input_moments(ffn, x_TD), flops, *best[1:])


def _input_moments(ffn: DenseFFN, x_TD: Tensor) -> list[Moments]:
    """Return the moments for the fits of `w_in` and, if gated, `w_gate`."""
    matrices = [(ffn.w_in_FD, ffn.b_in_F)]
    if ffn.w_gate_FD is not None:
        matrices.append((ffn.w_gate_FD, ffn.b_gate_F))
    importance = _sensitivity(ffn, x_TD[:SEARCH_TOKENS])
    return [Moments.of_matrix(x_TD, *matrix, one_F) for matrix, one_F in zip(matrices, importance, strict=True)]


def _replaced(
    ffn: DenseFFN, x_TD: Tensor, inputs: Sequence[Moments], flops: int, structure: Structure, share: float
) -> CompressedFFN:
    """Replace all matrices, with this share of the FLOPs for those into the neurons."""
    w_in, *gate = (structure.into(moments, int(flops * share) // len(inputs)) for moments in inputs)
    w_gate = gate[0] if gate else None
    act = ACTIVATIONS[ffn.activation]
    h_TF = act(w_in(x_TD)) if w_gate is None else act(w_gate(x_TD)) * w_in(x_TD)
    left = flops - sum(part.flops() for part in (w_in, *gate))
    w_out = structure.out_of(Moments.of(h_TF, ffn(x_TD), ffn.w_out_DF), left)
    return CompressedFFN(ffn.activation, w_in, w_out, w_gate)
