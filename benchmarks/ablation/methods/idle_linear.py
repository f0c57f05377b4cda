"""RePaViT (arXiv 2505.21847): idle neurons lose their activation and fold into one matrix D x D."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ablation.compressors import COMPRESSORS, keep, neurons_for
from benchmarks.ablation.least_squares import Moments
from benchmarks.ablation.linear_maps import CompressedFFN, Dense
from benchmarks.ablation.method import Method, add
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.metrics import ffn_flops


def idle_linear(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Fold the idle neurons into one matrix D x D; the others stay as they are.

    The paper passes the idle neurons' pre-activations through as they are and trains. Here least squares fits the
    D x D matrix to their output, together with the other neurons' output matrix. Idle are the neurons that a linear
    map replaces best: those of least ``var(h_j | x) ||w_out[:, j]||^2``.
    """
    D = x_TD.shape[1]
    width = neurons_for(ffn, flops - 2 * D * D)
    if width < 1:
        least = 2 * D * D + ffn_flops(D, 1, gated=ffn.gated)
        share = least / ffn_flops(D, ffn.ffn_width, gated=ffn.gated)
        raise ValueError(
            f"{flops} FLOPs are fewer than the {least} of a linear map {D} x {D} and one neuron, which is an active "
            f"share of {share:.3f} of this FFN: raise the active share, or use another compressor"
        )
    h_TF = ffn.neurons(x_TD)
    linear = Moments.of(x_TD, h_TF, torch.zeros(ffn.ffn_width, D))
    unexplained_F = h_TF.var(0) - (linear.weight() * linear.cross_OI).sum(1)
    energy_F = unexplained_F.clamp(min=0) * ffn.w_out_DF.double().square().sum(0)
    order_F = energy_F.argsort(descending=True, stable=True)
    active_S, idle_R = order_F[:width].sort().values, order_F[width:]
    folded_DD = ffn.w_out_DF[:, idle_R].double() @ linear.weight()[idle_R]
    trained = torch.cat([ffn.w_out_DF[:, active_S], folded_DD.float()], dim=1)
    moments = Moments.of(torch.cat([h_TF[:, active_S], x_TD], dim=1), ffn(x_TD), trained)
    weight = moments.weight()
    return keep(
        ffn, active_S, Dense(weight[:, :width], moments.bias(weight)), around=Dense(weight[:, width:], bias_O=None)
    )


COMPRESSORS.register("idle_linear", idle_linear)
add(
    Method(
        "idle_linear",
        "idle channels as a linear map",
        "baselines",
        "RePaViT, arXiv 2505.21847",
        ("free", "distilled"),
        compressor="idle_linear",
    )
)
