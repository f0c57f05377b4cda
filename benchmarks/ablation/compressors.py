"""Other ways to make an FFN cheaper, at the active FLOPs of a mixture: what routing is worth.

A rival spends the same on every token. Each is built in closed form from a dense FFN and its inputs on calibration
text, in the strongest form known to us: the input matrices are fitted to the pre-activations, each neuron counting by
what an error in it does to the output, and the output matrix and bias are then fitted by least squares to the dense
FFN's output on the activations that are left. What a method leaves open (block counts, the size of a basis, how the
FLOPs are shared by the matrices) is settled by the error on calibration tokens. Rivals can be trained like mixtures.
They are there to be compared with: no checkpoint, container or export holds one.

Letters as in `ffn2moe.spec`; besides, I inputs and O outputs of a linear map, and R its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.dense.ffn import ACTIVATIONS, DenseFFN
from ffn2moe.dense.locate import ffn_layers, install, read_ffn
from ffn2moe.metrics import ffn_flops
from ffn2moe.spec import Activation

# Weight of the trained matrix in a least-squares fit, relative to the features' mean variance: a fit to few tokens
# stays near the trained weights, and on the calibration tokens it is never worse than they are.
SHRINKAGE = 1e-3
SEARCH_TOKENS = 4096  # on which the open choices of a method are settled
SPLITS = (-0.15, 0.0, 0.15)  # tried shares of the input matrices, about that of their number
BLOCKS = (2, 4)  # of a block-diagonal factor
BASIS_SHARES = (0.25, 0.5, 0.75, 1.0)  # tried sizes of a dense basis, over the width D
BLOCK_SWEEPS, BASIS_STEPS = 3, 12


# --- linear maps that cost less than a matrix ------------------------------------------------------------------------


class LinearMap(nn.Module):
    """An affine map [..., I] -> [..., O]."""

    def flops(self) -> int:
        """Of one input, in matrix products: two a multiplication."""
        raise NotImplementedError


class Dense(LinearMap):
    """``weight x + bias``."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.float().contiguous())
        self.bias = None if bias_O is None else nn.Parameter(bias_O.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def flops(self) -> int:
        return 2 * self.weight.numel()


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


class DenseSparse(LinearMap):
    """A dense basis of R vectors, of which each neuron mixes a few: N non-zeros in its row of the sparse factor.

    Into the neurons it is ``sparse (basis x) + bias``, out of them ``basis (sparse' h) + bias``. The places of the
    non-zeros stay. Computed with zeros filled in, counted without them.
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


class CompressedFFN(nn.Module):
    """What takes an FFN's place: [..., D] -> [..., D], the same work for every token.

    ``y = w_out(act(w_in x)) + around x``, or with ``act(w_gate x) * w_in x`` inside; each map has its bias.
    """

    def __init__(
        self,
        activation: Activation,
        w_in: LinearMap,
        w_out: LinearMap,
        w_gate: LinearMap | None = None,
        around: LinearMap | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w_in = w_in
        self.w_out = w_out
        self.w_gate = w_gate
        self.around = around

    def neurons(self, x: Tensor) -> Tensor:
        """Activations of the neurons that are left, [..., F]."""
        act = ACTIVATIONS[self.activation]
        return act(self.w_in(x)) if self.w_gate is None else act(self.w_gate(x)) * self.w_in(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w_out(self.neurons(x))
        return y if self.around is None else y + self.around(x)

    def flops(self) -> int:
        """Of one token, in matrix products; a sparse factor counts by its non-zeros."""
        return sum(part.flops() for part in self.children() if isinstance(part, LinearMap))


# --- least squares ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Means and covariances, float64, from which the affine map from features to targets is fitted.

    `SHRINKAGE` is in them: the fit that they give is that of the tokens and of the trained matrix.
    """

    mean_I: Tensor
    mean_O: Tensor
    covariance_II: Tensor
    cross_OI: Tensor
    importance_O: Tensor  # what the error of each target counts

    @classmethod
    def of(cls, features_TI: Tensor, targets_TO: Tensor, trained_OI: Tensor) -> Moments:
        """Of features and targets on the same tokens; `trained_OI` is the map that the fit stays near."""
        mean_I, mean_O = features_TI.mean(0), targets_TO.mean(0)
        centred_TI = features_TI - mean_I
        covariance_II = (centred_TI.T @ centred_TI).double() / len(features_TI)
        cross_OI = ((targets_TO - mean_O).T @ centred_TI).double() / len(features_TI)
        trust = _trust(covariance_II)
        covariance_II.diagonal().add_(trust)
        ones_O = torch.ones(len(mean_O), dtype=torch.float64)
        return cls(mean_I.double(), mean_O.double(), covariance_II, cross_OI + trust * trained_OI.double(), ones_O)

    @classmethod
    def of_matrix(cls, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, importance_O: Tensor) -> Moments:
        """Of a linear map that is known: targets are ``weight x + bias``."""
        mean_I = x_TI.mean(0)
        centred_TI = x_TI - mean_I
        covariance_II = (centred_TI.T @ centred_TI).double() / len(x_TI)
        covariance_II.diagonal().add_(_trust(covariance_II))
        mean_O = F.linear(mean_I, weight_OI, bias_O).double()
        return cls(mean_I.double(), mean_O, covariance_II, weight_OI.double() @ covariance_II, importance_O.double())

    def weight(self) -> Tensor:
        """The best matrix, [O, I]."""
        return torch.cholesky_solve(self.cross_OI.T, torch.linalg.cholesky(self.covariance_II)).T

    def bias(self, weight_OI: Tensor) -> Tensor:
        """The best bias beside a matrix, [O]: it makes the means right."""
        return self.mean_O - weight_OI @ self.mean_I

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best matrix of a rank as two factors, [O, R] and [R, I] (reduced-rank regression, Izenman 1975)."""
        root_II = torch.linalg.cholesky(self.covariance_II)
        importance_O1 = self.importance_O.unsqueeze(1)
        whitened_OI = importance_O1 * torch.linalg.solve_triangular(root_II, self.cross_OI.T, upper=False).T
        if whitened_OI.shape[0] < whitened_OI.shape[1]:
            left_OR = leading(whitened_OI @ whitened_OI.T, rank)
            right_RI = left_OR.T @ whitened_OI
        else:
            right_RI = leading(whitened_OI.T @ whitened_OI, rank).T
            left_OR = whitened_OI @ right_RI.T
        return left_OR / importance_O1, torch.linalg.solve_triangular(root_II, right_RI, upper=False, left=False)


def leading(gram_NN: Tensor, rank: int) -> Tensor:
    """The eigenvectors of largest eigenvalues of a symmetric matrix, largest first, [N, R]."""
    return torch.linalg.eigh(gram_NN).eigenvectors[:, -rank:].flip(1)


def _trust(covariance_II: Tensor) -> float:
    """The weight of the trained matrix; above zero where nothing varies at all."""
    return max(SHRINKAGE * covariance_II.diagonal().mean().item(), 1e-12)


def sparse_basis(signals_FD: Tensor, rank: int, nonzeros: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signals as sparse mixtures of an orthonormal basis: basis [R, D], values [F, N] and their places [F, N].

    In turn the best codes for the basis (the N largest coefficients) and the best basis for the codes (orthogonal
    Procrustes, Schönemann 1966): the error never rises. Begins at the leading singular vectors, and with N = R that is
    the best matrix of rank R.
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


# --- how a matrix is replaced ----------------------------------------------------------------------------------------


class Structure(Protocol):
    """A way to replace a matrix: the best map of its kind for some FLOPs. ValueError where they are too few."""

    def into(self, moments: Moments, flops: int) -> LinearMap:
        """The map from D to the neurons."""
        ...

    def out_of(self, moments: Moments, flops: int) -> LinearMap:
        """The map from the neurons to D."""
        ...


class _LowRankStructure:
    def into(self, moments: Moments, flops: int) -> LinearMap:
        rank = flops // (2 * sum(moments.cross_OI.shape))
        if rank < 1:
            raise ValueError(f"{flops} FLOPs are too few for a matrix of rank 1: raise the active share")
        left_OR, right_RI = moments.low_rank(rank)
        return LowRank(left_OR, right_RI, moments.bias(left_OR @ right_RI))

    out_of = into


@dataclass(frozen=True)
class _BlockDenseStructure:
    blocks: int

    def into(self, moments: Moments, flops: int) -> LinearMap:
        outputs, inputs = moments.cross_OI.shape
        each = flops // (2 * (inputs + self.blocks * outputs))  # rank of a block
        if each < 1:
            raise ValueError(f"{flops} FLOPs are too few for {self.blocks} blocks of rank 1: raise the active share")
        places = [slice(start, start + inputs // self.blocks) for start in range(0, inputs, inputs // self.blocks)]
        # A column block of the product is a product of its own, whose best approximation is known; the others' errors
        # go into it through the covariance, hence the sweeps. Each step lowers the error.
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


@dataclass(frozen=True)
class _DenseSparseStructure:
    basis_share: float  # of the width D: vectors of the basis

    def _sizes(self, width: int, neurons: int, flops: int) -> tuple[int, int]:
        """Vectors of the basis and non-zeros of a neuron."""
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
        # The basis again, for all neurons together as they vary: what the codes were found without.
        mixed = replace(
            moments,
            mean_I=moments.mean_I @ sparse_FR,
            covariance_II=sparse_FR.T @ moments.covariance_II @ sparse_FR,
            cross_OI=moments.cross_OI @ sparse_FR,
        )
        mixed.covariance_II.diagonal().add_(1e-9 * mixed.covariance_II.diagonal().mean())  # a vector nobody uses
        basis_DR = mixed.weight()
        return DenseSparse(basis_DR, values_FN, places_FN, mixed.bias(basis_DR), into=False)


def _sensitivity(ffn: DenseFFN, x_TD: Tensor) -> list[Tensor]:
    """What an error in each neuron's pre-activation does to the output, to first order, [F] for `w_in` and `w_gate`.

    The root of the mean squared derivative times the length of the neuron's output column; never quite zero.
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


def _factored(ffn: DenseFFN, x_TD: Tensor, flops: int, structures: Sequence[Structure]) -> CompressedFFN:
    """All matrices replaced by maps of one structure; the structure and the split of the FLOPs that fit best.

    ValueError, that of the last one tried, where no structure fits.
    """
    few_TD = x_TD[:SEARCH_TOKENS]
    y_TD, moments = ffn(few_TD), _input_moments(ffn, few_TD)
    matrices = len(moments)
    best: tuple[float, Structure, float] | None = None
    refusal: ValueError | None = None
    for structure, shift in product(structures, SPLITS):
        share = matrices / (matrices + 1) + shift
        try:
            rival = _replaced(ffn, few_TD, moments, flops, structure, share)
        except ValueError as reason:
            refusal = reason
            continue
        error = (rival(few_TD) - y_TD).square().sum().item()
        if best is None or error < best[0]:
            best = error, structure, share
    if best is None:
        assert refusal is not None
        raise refusal
    return _replaced(ffn, x_TD, _input_moments(ffn, x_TD), flops, *best[1:])


def _input_moments(ffn: DenseFFN, x_TD: Tensor) -> list[Moments]:
    """What the fits of `w_in` and, if gated, `w_gate` need."""
    matrices = [(ffn.w_in_FD, ffn.b_in_F)]
    if ffn.w_gate_FD is not None:
        matrices.append((ffn.w_gate_FD, ffn.b_gate_F))
    importance = _sensitivity(ffn, x_TD[:SEARCH_TOKENS])
    return [Moments.of_matrix(x_TD, *matrix, one_F) for matrix, one_F in zip(matrices, importance, strict=True)]


def _replaced(
    ffn: DenseFFN, x_TD: Tensor, inputs: Sequence[Moments], flops: int, structure: Structure, share: float
) -> CompressedFFN:
    """All matrices replaced, with this share of the FLOPs for those into the neurons."""
    w_in, *gate = (structure.into(moments, int(flops * share) // len(inputs)) for moments in inputs)
    w_gate = gate[0] if gate else None
    act = ACTIVATIONS[ffn.activation]
    h_TF = act(w_in(x_TD)) if w_gate is None else act(w_gate(x_TD)) * w_in(x_TD)
    left = flops - sum(part.flops() for part in (w_in, *gate))
    w_out = structure.out_of(Moments.of(h_TF, ffn(x_TD), ffn.w_out_DF), left)
    return CompressedFFN(ffn.activation, w_in, w_out, w_gate)


# --- the rivals ------------------------------------------------------------------------------------------------------


def _kept(ffn: DenseFFN, neurons_S: Tensor, w_out: LinearMap, around: LinearMap | None = None) -> CompressedFFN:
    """Some of the neurons as they are, with another map out of them."""
    part = ffn.narrow(neurons_S)
    w_gate = None if part.w_gate_FD is None else Dense(part.w_gate_FD, part.b_gate_F)
    return CompressedFFN(ffn.activation, Dense(part.w_in_FD, part.b_in_F), w_out, w_gate, around)


def _neurons_for(ffn: DenseFFN, flops: int) -> int:
    """How many neurons so many FLOPs are enough for."""
    return min(ffn.ffn_width, flops // ffn_flops(ffn.w_in_FD.shape[1], 1, gated=ffn.gated))


def pruned(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Static structured pruning: the neurons of highest expected output energy stay, for every token.

    Energy is about the mean, ``var(h_j) ||w_out[:, j]||^2``, as the mean of what goes is put in the output bias; the
    output matrix is refitted by least squares, as in Optimal Brain Surgeon's structured heirs (ZipLM, arXiv
    2302.04089).
    """
    width = _neurons_for(ffn, flops)
    if width < 1:
        raise ValueError(f"{flops} FLOPs are too few for one neuron: raise the active share")
    h_TF = ffn.neurons(x_TD)
    energy_F = h_TF.var(0) * ffn.w_out_DF.square().sum(0)
    neurons_S = energy_F.topk(width).indices.sort().values
    moments = Moments.of(h_TF[:, neurons_S], ffn(x_TD), ffn.w_out_DF[:, neurons_S])
    weight_DS = moments.weight()
    return _kept(ffn, neurons_S, Dense(weight_DS, moments.bias(weight_DS)))


def low_rank(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """Every matrix as a product of two, by an SVD weighted by the second moments of what it reads.

    SVD-LLM (arXiv 2403.07378) and ASVD (arXiv 2312.05821) weigh the inputs; here outputs are weighed, too, and the
    output matrix is fitted to what the factored input matrices give (reduced-rank regression).
    """
    return _factored(ffn, x_TD, flops, [_LowRankStructure()])


def block_diagonal(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """StructuredFFN's BlockDense (arXiv 2406.16450): every matrix as a dense one times a block-diagonal one.

    The paper trains from scratch; this starts at the best approximation of the trained matrices, in 2 or 4 blocks.
    """
    D, width = ffn.w_in_FD.shape[1], ffn.ffn_width
    blocks = [count for count in BLOCKS if D % count == 0 and width % count == 0]
    if not blocks:
        raise ValueError(f"widths of {D} and {width} cannot be cut in {BLOCKS[0]} equal blocks: use another rival")
    return _factored(ffn, x_TD, flops, [_BlockDenseStructure(count) for count in blocks])


def sparse_factors(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """DSFormer (arXiv 2312.13211): every matrix as a small dense basis times a sparse factor, so many non-zeros a row.

    FLOPs count the non-zeros alone, as a kernel for them would. The sparse factor is fitted to the weights under the
    activations' second moments (`sparse_basis`); training moves the values and leaves the places, where the paper's
    straight-through factoriser may move them.
    """
    return _factored(ffn, x_TD, flops, [_DenseSparseStructure(share) for share in BASIS_SHARES])


def idle_linear(ffn: DenseFFN, x_TD: Tensor, flops: int) -> CompressedFFN:
    """RePaViT (arXiv 2505.21847): the idle neurons have no activation, so that they fold into one matrix D x D.

    The paper lets the idle neurons' pre-activations through as they are and trains. Here the D x D matrix is fitted to
    what they give, by least squares and together with the other neurons' output matrix, and idle are those that a
    linear map can stand in for: of least ``var(h_j | x) ||w_out[:, j]||^2``.
    """
    D = x_TD.shape[1]
    width = _neurons_for(ffn, flops - 2 * D * D)
    if width < 1:
        least = 2 * D * D + ffn_flops(D, 1, gated=ffn.gated)
        share = least / ffn_flops(D, ffn.ffn_width, gated=ffn.gated)
        raise ValueError(
            f"{flops} FLOPs are fewer than the {least} of a linear map {D} x {D} and one neuron, which is an active "
            f"share of {share:.3f} of this FFN: raise the active share, or use another rival"
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
    return _kept(
        ffn, active_S, Dense(weight[:, :width], moments.bias(weight)), around=Dense(weight[:, width:], bias_O=None)
    )


@dataclass(frozen=True)
class Rival:
    """One way to make an FFN cheaper."""

    title: str
    source: str
    build: Callable[[DenseFFN, Tensor, int], CompressedFFN]  # of an FFN, its inputs [T, D] and the FLOPs of a token


RIVALS: dict[str, Rival] = {
    "pruned": Rival("static structured pruning, output refitted", "ZipLM, arXiv 2302.04089", pruned),
    "low_rank": Rival("SVD weighted by activations", "SVD-LLM, arXiv 2403.07378", low_rank),
    "block_diagonal": Rival("dense times block-diagonal", "StructuredFFN, arXiv 2406.16450", block_diagonal),
    "sparse_factors": Rival("dense basis times sparse factor", "DSFormer, arXiv 2312.13211", sparse_factors),
    "idle_linear": Rival("idle neurons folded to a linear map", "RePaViT, arXiv 2505.21847", idle_linear),
}


def mixture_flops(width: int, ffn_width: int, *, gated: bool, active_share: float, num_experts: int) -> int:
    """Of one token in one FFN of a mixture: the active share of the neurons, and the router."""
    return int(active_share * ffn_flops(width, ffn_width, gated=gated)) + 2 * width * num_experts


@torch.no_grad()
def build(name: str, ffn: DenseFFN, x_TD: Tensor, active_share: float, *, num_experts: int = 8) -> CompressedFFN:
    """The rival `name` of a mixture of `num_experts` with this active share, from the FFN and its inputs [T, D].

    Its FLOPs are as near to the mixture's, router included, as its structure allows, and never above. At an active
    share of 1 it is the dense FFN. ValueError for an unknown name, a share outside (0, 1], or one that is too small for
    the method.
    """
    if name not in RIVALS:
        raise ValueError(f"there is no rival {name!r}; there are: {', '.join(RIVALS)}")
    if not 0 < active_share <= 1:
        raise ValueError(f"active_share = {active_share} must be above 0 and at most 1: it is a share of the FFN")
    D = ffn.w_in_FD.shape[1]
    if len(x_TD) < 2:
        raise ValueError(f"{name} needs calibration tokens: {len(x_TD)} are too few to tell what varies")
    if active_share == 1:
        return _kept(ffn, torch.arange(ffn.ffn_width), Dense(ffn.w_out_DF, ffn.b_out_D))
    flops = mixture_flops(D, ffn.ffn_width, gated=ffn.gated, active_share=active_share, num_experts=num_experts)
    try:
        return RIVALS[name].build(ffn, x_TD, flops)
    except ValueError as error:
        raise ValueError(f"the rival {name} at an active share of {active_share}: {error}") from error


def compress(
    model: nn.Module, name: str, inputs: Sequence[Tensor], active_share: float, *, num_experts: int = 8
) -> list[CompressedFFN]:
    """Put a rival in the place of every FFN of a dense model, and return them, in the order of the layers.

    `inputs` are the FFNs' inputs on calibration text, [T, D] each (`ffn2moe.decompose.inputs.layer_inputs`). Nothing is
    installed if one layer's cannot be built.
    """
    count = len(ffn_layers(model))
    if len(inputs) != count:
        raise ValueError(f"there are inputs of {len(inputs)} FFNs and the model has {count}")
    layers = [
        build(name, read_ffn(model, layer), x_TD, active_share, num_experts=num_experts)
        for layer, x_TD in enumerate(inputs)
    ]
    for layer, rival in enumerate(layers):
        install(model, layer, rival)
    return layers
