"""Static structured pruning: some neurons stay, for every token."""

from __future__ import annotations

from torch import Tensor

from benchmarks.ablation.compressors import COMPRESSORS, keep, neurons_for
from benchmarks.ablation.least_squares import Moments
from benchmarks.ablation.linear_maps import CompressedFFN, Dense
from benchmarks.ablation.method import Method, add
from ffn2moe.dense.ffn import DenseFFN


def pruned(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Keep the neurons of highest expected output energy.

    Energy is about the mean, ``var(h_j) ||w_out[:, j]||^2``, because the output bias takes the mean of the neurons that
    go. Least squares fits the output matrix again, as in ZipLM (arXiv 2302.04089).
    """
    width = neurons_for(ffn, flops)
    if width < 1:
        raise ValueError(f"{flops} FLOPs are too few for one neuron: raise the active share")
    h_TF = ffn.neurons(x_TD)
    energy_F = h_TF.var(0) * ffn.w_out_DF.square().sum(0)
    neurons_S = energy_F.topk(width).indices.sort().values
    moments = Moments.of(h_TF[:, neurons_S], ffn(x_TD), ffn.w_out_DF[:, neurons_S])
    weight_DS = moments.weight()
    return keep(ffn, neurons_S, Dense(weight_DS, moments.bias(weight_DS)))


COMPRESSORS.register("pruned", pruned)
add(
    Method(
        "pruned",
        "pruned neurons",
        "baselines",
        "structured, by output energy",
        ("free", "distilled"),
        compressor="pruned",
    )
)
