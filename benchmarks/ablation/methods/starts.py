"""Other weights that a router starts from. Those from rows of the experts are scaled to scores of deviation 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ablation.method import Method, add
from ffn2moe.decompose.evidence import RouterData
from ffn2moe.decompose.starts import STARTS, RouterStart
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN

TINY = torch.finfo(torch.float32).tiny


def zeros(data: RouterData, penalty: float) -> tuple[Tensor, Tensor]:
    """Return zeros: all experts alike."""
    E, D = data.moe.router.weight.shape
    return torch.zeros(E, D), torch.zeros(E)


def centroid(experts: list[DenseFFN], data: RouterData) -> tuple[Tensor, Tensor]:
    """Return the mean direction of each expert's input rows."""
    weight_ED = torch.stack([F.normalize(_input_rows(ffn)[0], dim=1).mean(0) for ffn in experts])
    return weight_ED, torch.zeros(len(experts))


def mean_row(experts: list[DenseFFN], data: RouterData) -> tuple[Tensor, Tensor]:
    """Return the mean of each expert's input rows, after avg-K (arXiv 2305.13999)."""
    return torch.stack([_input_rows(ffn)[0].mean(0) for ffn in experts]), torch.zeros(len(experts))


def representative(experts: list[DenseFFN], data: RouterData) -> tuple[Tensor, Tensor]:
    """Return the direction of one input row of each expert: of the neuron that is nearest to all of its neurons.

    CMoE measures nearness between 0/1 marks of each token's strongest neurons, where a neuron that is never active is
    near to all; here it is the cosine of activations.
    """
    nearest = (ffn.narrow(_representative(ffn, data.x_TD, data.chunk)) for ffn in experts)
    rows, biases = zip(*map(_input_rows, nearest), strict=True)
    weight_ED = torch.cat(rows)
    bias_E = torch.cat(biases) if data.moe.router.has_bias else torch.zeros(len(experts))
    length_E = weight_ED.norm(dim=1).clamp(min=TINY)
    return weight_ED / length_E.unsqueeze(1), bias_E / length_E


def from_rows(
    method: Callable[[list[DenseFFN], RouterData], tuple[Tensor, Tensor]],
) -> Callable[[RouterData, float], tuple[Tensor, Tensor]]:
    """Return a start that divides a method's scores by their deviation about each row's mean.

    The rows of an expert do not say how large a score should be.
    """

    def weights(data: RouterData, penalty: float) -> tuple[Tensor, Tensor]:
        experts = [routed_part(data.moe, index) for index in range(data.moe.num_experts)]
        weight_ED, bias_E = method(experts, data)
        scores_RE = F.linear(data.read_RD, weight_ED, bias_E)
        spread = about_mean(scores_RE).square().mean().sqrt().clamp(min=TINY)
        return weight_ED / spread, bias_E / spread

    return weights


def routed_part(moe: MoEFFN, index: int) -> DenseFFN:
    """Return one expert as a dense FFN, without the zero neurons that pad it."""

    def part(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked[index].detach()

    whole = DenseFFN(
        w_in_FD=moe.w_in[index].detach(),
        w_out_DF=moe.w_out[index].detach(),
        activation=moe.activation,
        b_in_F=part(moe.b_in),
        w_gate_FD=part(moe.w_gate),
        b_gate_F=part(moe.b_gate),
    )
    return whole.narrow((moe.neurons[index] >= 0).nonzero().flatten())


def _input_rows(ffn: DenseFFN) -> tuple[Tensor, Tensor]:
    """Return the rows [F, D] and biases [F] that switch neurons on: those of gate_proj where there is one."""
    rows_FD, b_F = (ffn.w_in_FD, ffn.b_in_F) if ffn.w_gate_FD is None else (ffn.w_gate_FD, ffn.b_gate_F)
    return rows_FD, torch.zeros(len(rows_FD)) if b_F is None else b_F


def _representative(expert: DenseFFN, x_TD: Tensor, chunk: int) -> Tensor:
    """Return the neuron whose activations have the largest cosine with the sum of all, each of norm 1, [1]."""
    moments_MM = torch.zeros(expert.ffn_width, expert.ffn_width, dtype=torch.float64)
    for x in x_TD.split(chunk):
        h_TM = expert.neurons(x)
        moments_MM += (h_TM.T @ h_TM).double()
    norm_M = moments_MM.diagonal().sqrt()
    cosine_MM = moments_MM / (norm_M * norm_M.unsqueeze(1)).clamp(min=TINY)
    return cosine_MM.sum(1).argmax().unsqueeze(0)


def about_mean(values_RE: Tensor) -> Tensor:
    """Return values less the mean of each row."""
    return values_RE - values_RE.mean(1, keepdim=True)


STARTS.register("zeros", RouterStart("a control", zeros, single_experts=False))
STARTS.register("centroid", RouterStart("MoEfication, arXiv 2110.01786", from_rows(centroid)))
STARTS.register("representative", RouterStart("CMoE, arXiv 2502.04416", from_rows(representative)))
STARTS.register("mean_row", RouterStart("EMoE, arXiv 2310.10908", from_rows(mean_row)))

add(
    Method("centroid", "centroid", "router start", "MoEfication, arXiv 2110.01786", ("free",), start="centroid"),
    Method(
        "representative",
        "representative neurons",
        "router start",
        "CMoE, arXiv 2502.04416",
        ("free",),
        start="representative",
    ),
    Method("mean_row", "mean row", "router start", "EMoE, arXiv 2310.10908", ("free",), start="mean_row"),
    Method("zeros", "zeros", "router start", "a control", start="zeros"),
)
