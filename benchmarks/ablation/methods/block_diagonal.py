"""StructuredFFN's BlockDense (arXiv 2406.16450): every matrix as a dense one times a block-diagonal one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ablation.compressors import COMPRESSORS, factored
from benchmarks.ablation.least_squares import Moments
from benchmarks.ablation.linear_maps import CompressedFFN, LinearMap
from benchmarks.ablation.method import Method, add
from ffn2moe.dense.ffn import DenseFFN

BLOCKS = (2, 4)  # tried numbers of blocks
BLOCK_SWEEPS = 3


class BlockDense(LinearMap):
    """``left (blocks x) + bias``: the input in B equal parts, each with a matrix of its own, and a dense factor."""

    def __init__(self, left_OR: Tensor, blocks_BRI: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left_OR.float().contiguous())
        self.blocks = nn.Parameter(blocks_BRI.float().contiguous())
        self.bias = nn.Parameter(bias_O.float())

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (len(self.blocks), -1))
        return F.linear(torch.einsum("...bi,bri->...br", parts, self.blocks).flatten(-2), self.left, self.bias)

    def flops(self) -> int:
        return 2 * (self.left.numel() + self.blocks.numel())


@dataclass(frozen=True)
class BlockDenseStructure:
    """Replace a matrix by a block-diagonal factor and a dense one."""

    blocks: int

    def into(self, moments: Moments, flops: int) -> LinearMap:
        outputs, inputs = moments.cross_OI.shape
        each = flops // (2 * (inputs + self.blocks * outputs))  # rank of a block
        if each < 1:
            raise ValueError(f"{flops} FLOPs are too few for {self.blocks} blocks of rank 1: raise the active share")
        places = [slice(start, start + inputs // self.blocks) for start in range(0, inputs, inputs // self.blocks)]
        # The best approximation of one column block is known. The errors of the other blocks reach it through the
        # covariance, so the sweeps repeat it. Each step lowers the error.
        trained_OI = moments.weight()
        found: list[tuple[Tensor, Tensor]] = []
        for place in places:
            own_II = moments.covariance_II[place, place]
            part = replace(moments, covariance_II=own_II, cross_OI=trained_OI[:, place] @ own_II)
            found.append(part.low_rank(each))
        for _ in range(BLOCK_SWEEPS):
            for block, place in enumerate(places):
                product_OI = torch.cat([left @ right for left, right in found], dim=1)
                product_OI[:, place] = 0
                left_OI = moments.cross_OI[:, place] - product_OI @ moments.covariance_II[:, place]
                part = replace(moments, covariance_II=moments.covariance_II[place, place], cross_OI=left_OI)
                found[block] = part.low_rank(each)
        product_OI = torch.cat([left @ right for left, right in found], dim=1)
        lefts, rights = zip(*found, strict=True)
        return BlockDense(torch.cat(lefts, dim=1), torch.stack(rights), moments.bias(product_OI))

    out_of = into


def block_diagonal(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Factor every matrix into a dense one times a block-diagonal one.

    The paper trains from scratch; this starts at the best approximation of the trained matrices, in 2 or 4 blocks.
    """
    D, width = ffn.w_in_FD.shape[1], ffn.ffn_width
    blocks = [count for count in BLOCKS if D % count == 0 and width % count == 0]
    if not blocks:
        raise ValueError(f"widths of {D} and {width} cannot be cut in {BLOCKS[0]} equal blocks: use another compressor")
    return factored(ffn, x_TD, flops, [BlockDenseStructure(count) for count in blocks])


COMPRESSORS.register("block_diagonal", block_diagonal)
add(
    Method(
        "block_diagonal",
        "block diagonal",
        "baselines",
        "StructuredFFN, arXiv 2406.16450",
        ("free", "distilled"),
        compressor="block_diagonal",
    )
)
