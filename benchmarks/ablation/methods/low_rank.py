"""Low rank: every matrix as a product of two, by an SVD weighted by the activations."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ablation.compressors import COMPRESSORS, factored
from benchmarks.ablation.least_squares import Moments
from benchmarks.ablation.linear_maps import CompressedFFN, LinearMap
from benchmarks.ablation.method import Method, add
from ffn2moe.dense.ffn import DenseFFN


class LowRank(LinearMap):
    """``left (right x) + bias``: two dense factors."""

    def __init__(self, left_OR: Tensor, right_RI: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left_OR.float().contiguous())
        self.right = nn.Parameter(right_RI.float().contiguous())
        self.bias = nn.Parameter(bias_O.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)

    def flops(self) -> int:
        return 2 * (self.left.numel() + self.right.numel())


class LowRankStructure:
    """Replace a matrix by two dense factors of one rank."""

    def into(self, moments: Moments, flops: int) -> LinearMap:
        rank = flops // (2 * sum(moments.cross_OI.shape))
        if rank < 1:
            raise ValueError(f"{flops} FLOPs are too few for a matrix of rank 1: raise the active share")
        left_OR, right_RI = moments.low_rank(rank)
        return LowRank(left_OR, right_RI, moments.bias(left_OR @ right_RI))

    out_of = into


def low_rank(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Factor every matrix in two, by an SVD weighted by the second moments of its inputs.

    SVD-LLM (arXiv 2403.07378) and ASVD (arXiv 2312.05821) weight the inputs. Here the outputs are weighted, too, and
    the output matrix is fitted to what the factored input matrices give (reduced-rank regression).
    """
    return factored(ffn, x_TD, flops, [LowRankStructure()])


COMPRESSORS.register("low_rank", low_rank)
add(
    Method(
        "low_rank",
        "low rank",
        "baselines",
        "SVD weighted by activations",
        ("free", "distilled"),
        compressor="low_rank",
    )
)
