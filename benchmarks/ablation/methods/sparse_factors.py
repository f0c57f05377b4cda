"""DSFormer (arXiv 2312.13211): every matrix as a small dense basis times a sparse factor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ablation.compressors import COMPRESSORS, factored
from benchmarks.ablation.least_squares import Moments, leading
from benchmarks.ablation.linear_maps import CompressedFFN, LinearMap
from benchmarks.ablation.method import Method, add
from ffn2moe.dense.ffn import DenseFFN

BASIS_SHARES = (0.25, 0.5, 0.75, 1.0)  # tried sizes of the basis, over the width D
BASIS_STEPS = 12


class DenseSparse(LinearMap):
    """A dense basis of R vectors; each neuron mixes a few of them: N non-zeros in its row of the sparse factor.

    Into the neurons it is ``sparse (basis x) + bias``, out of them ``basis (sparse' h) + bias``. The places of the
    non-zeros stay. The zeros are computed and not counted.
    """

    places: Tensor

    def __init__(self, basis: Tensor, values_FN: Tensor, places_FN: Tensor, bias_O: Tensor, *, into: bool) -> None:
        """`basis` is [R, D] into the neurons and [D, R] out of them."""
        super().__init__()
        self.into = into
        self.basis = nn.Parameter(basis.float().contiguous())
        self.values = nn.Parameter(values_FN.float().contiguous())
        self.bias = nn.Parameter(bias_O.float())
        self.register_buffer("places", places_FN)

    def forward(self, x: Tensor) -> Tensor:
        rank = self.basis.shape[0 if self.into else 1]
        sparse_FR = self.values.new_zeros(len(self.values), rank).scatter(1, self.places, self.values)
        if self.into:
            return F.linear(F.linear(x, self.basis), sparse_FR, self.bias)
        return F.linear(x @ sparse_FR, self.basis, self.bias)

    def flops(self) -> int:
        return 2 * (self.basis.numel() + self.values.numel())


def sparse_basis(signals_FD: Tensor, rank: int, nonzeros: int) -> tuple[Tensor, Tensor, Tensor]:
    """Write signals as sparse mixtures of an orthonormal basis: basis [R, D], values [F, N] and their places [F, N].

    Each step finds the best codes for the basis (the N largest coefficients), then the best basis for the codes
    (orthogonal Procrustes, Schönemann 1966), so the error never rises. It starts at the leading singular vectors; with
    N = R they give the best matrix of rank R.
    """
    basis_RD = leading(signals_FD.T @ signals_FD, rank).T
    for step in range(BASIS_STEPS + 1):
        coefficients_FR = signals_FD @ basis_RD.T
        places_FN = coefficients_FR.abs().topk(nonzeros, dim=1).indices
        values_FN = coefficients_FR.gather(1, places_FN)
        if nonzeros == rank or step == BASIS_STEPS:
            break
        codes_FR = torch.zeros_like(coefficients_FR).scatter(1, places_FN, values_FN)
        left, _, right = torch.linalg.svd(codes_FR.T @ signals_FD, full_matrices=False)
        basis_RD = left @ right
    return basis_RD, values_FN, places_FN


@dataclass(frozen=True)
class DenseSparseStructure:
    """Replace a matrix by a dense basis and a sparse factor."""

    basis_share: float  # vectors of the basis, over the width D

    def _sizes(self, width: int, neurons: int, flops: int) -> tuple[int, int]:
        """Return the vectors of the basis and the non-zeros of a neuron."""
        rank = round(self.basis_share * width)
        nonzeros = min(rank, (flops // 2 - rank * width) // neurons)
        if nonzeros < 1:
            raise ValueError(
                f"{flops} FLOPs are too few for a basis of {rank} vectors and {neurons} neurons that each use one: "
                "raise the active share"
            )
        return max(nonzeros, min(width, (flops // 2 - nonzeros * neurons) // width)), nonzeros

    def into(self, moments: Moments, flops: int) -> LinearMap:
        neurons, width = moments.cross_OI.shape
        rank, nonzeros = self._sizes(width, neurons, flops)
        root_II = torch.linalg.cholesky(moments.covariance_II)
        importance_F1 = moments.importance_O.unsqueeze(1)
        basis_RD, values_FN, places_FN = sparse_basis(importance_F1 * (moments.weight() @ root_II), rank, nonzeros)
        basis_RD = torch.linalg.solve_triangular(root_II, basis_RD, upper=False, left=False)
        values_FN = values_FN / importance_F1
        sparse_FR = values_FN.new_zeros(neurons, rank).scatter(1, places_FN, values_FN)
        return DenseSparse(basis_RD, values_FN, places_FN, moments.bias(sparse_FR @ basis_RD), into=True)

    def out_of(self, moments: Moments, flops: int) -> LinearMap:
        width, neurons = moments.cross_OI.shape
        rank, nonzeros = self._sizes(width, neurons, flops)
        deviation_F1 = moments.covariance_II.diagonal().sqrt().unsqueeze(1)
        _, values_FN, places_FN = sparse_basis(moments.weight().T * deviation_F1, rank, nonzeros)
        values_FN = values_FN / deviation_F1
        sparse_FR = values_FN.new_zeros(neurons, rank).scatter(1, places_FN, values_FN)
        # Fit the basis again, for all neurons together with their covariance, which the codes did not see.
        mixed = replace(
            moments,
            mean_I=moments.mean_I @ sparse_FR,
            covariance_II=sparse_FR.T @ moments.covariance_II @ sparse_FR,
            cross_OI=moments.cross_OI @ sparse_FR,
        )
        mixed.covariance_II.diagonal().add_(1e-9 * mixed.covariance_II.diagonal().mean())  # a vector without a user
        basis_DR = mixed.weight()
        return DenseSparse(basis_DR, values_FN, places_FN, mixed.bias(basis_DR), into=False)


def sparse_factors(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Factor every matrix into a dense basis and a sparse factor with N non-zeros a row.

    FLOPs count the non-zeros alone, as a kernel for them would. The sparse factor is fitted to the weights under the
    activations' second moments (`sparse_basis`); training moves the values and leaves the places, where the paper's
    straight-through factoriser may move them.
    """
    return factored(ffn, x_TD, flops, [DenseSparseStructure(share) for share in BASIS_SHARES])


COMPRESSORS.register("sparse_factors", sparse_factors)
add(
    Method(
        "sparse_factors",
        "dense x sparse factors",
        "baselines",
        "DSFormer, arXiv 2312.13211",
        ("free", "distilled"),
        compressor="sparse_factors",
    )
)
