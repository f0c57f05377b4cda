"""Static structured pruning that drops the least needed neuron again and again."""

from __future__ import annotations

from torch import Tensor

from benchmarks.ablation.compressors import COMPRESSORS, keep, neurons_for
from benchmarks.ablation.least_squares import Moments
from benchmarks.ablation.linear_maps import CompressedFFN, Dense
from benchmarks.ablation.method import Method, add
from ffn2moe.decompose.elimination import most_needed
from ffn2moe.dense.ffn import DenseFFN


def needed(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Keep the neurons that the others can replace least (`most_needed`), and fit the output matrix again."""
    width = neurons_for(ffn, flops)
    if width < 1:
        raise ValueError(f"{flops} FLOPs are too few for one neuron: raise the active share")
    h_TF = ffn.neurons(x_TD)
    centred_TF = h_TF - h_TF.mean(0)
    neurons_S = most_needed(centred_TF.T @ centred_TF, ffn.w_out_DF, width)
    moments = Moments.of(h_TF[:, neurons_S], ffn(x_TD), ffn.w_out_DF[:, neurons_S])
    weight_DS = moments.weight()
    return keep(ffn, neurons_S, Dense(weight_DS, moments.bias(weight_DS)))


COMPRESSORS.register("needed", needed)
add(
    Method(
        "needed",
        "pruned neurons, by need",
        "baselines",
        "structured, by what the others cannot replace",
        ("free", "distilled"),
        compressor="needed",
    )
)
