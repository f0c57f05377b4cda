"""Streaming statistics of FFN neurons over calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.numerics import WIDEST_MOMENTS, bf16_supported

MOST_KEPT_TOKENS = 16384  # of a wider FFN
ROWS = 1024  # of bfloat16 activations that are made float32 at once
OVERSAMPLING, POWER_STEPS = 16, 4  # of the search for leading directions (Halko, Martinsson & Tropp 2011)


class NeuronStatistics:
    """What the F neurons of one FFN do over T calibration tokens, summed in float64.

    Up to `WIDEST_MOMENTS` neurons: second moments, F x F, whatever T is. Above: the activations of the first
    `MOST_KEPT_TOKENS` tokens, T x F in bfloat16. With `groups`, G, the neurons' importance to each group of tokens.
    Without `profiles`, sums alone.
    """

    def __init__(self, ffn_width: int, groups: int = 0, profiles: bool = True) -> None:
        self.tokens = 0
        self.profiled = profiles
        self.members_G = torch.zeros(groups, dtype=torch.float64)
        self.importance_GF = torch.zeros(groups, ffn_width, dtype=torch.float64)
        self.sum_F = torch.zeros(ffn_width, dtype=torch.float64)
        self.square_F = torch.zeros(ffn_width, dtype=torch.float64)
        self.largest_F = torch.zeros(ffn_width)
        moments = profiles and ffn_width <= WIDEST_MOMENTS
        self.second_FF = torch.zeros(ffn_width, ffn_width, dtype=torch.float64) if moments else None
        self.kept_TF: list[Tensor] = []

    def update(self, h_TF: Tensor) -> None:
        """Add the activations of T tokens, [T, F]."""
        self.tokens += h_TF.shape[0]
        if self.second_FF is not None:
            self.sum_F += h_TF.sum(0, dtype=torch.float64).cpu()
            self.second_FF += (h_TF.T @ h_TF).double().cpu()
            self.square_F = self.second_FF.diagonal()
            self.largest_F = torch.maximum(self.largest_F, h_TF.abs().amax(0).float().cpu())
            return
        for part in h_TF.split(ROWS):
            h = part.to(torch.float32, copy=True)
            self.sum_F += h.sum(0).double().cpu()
            h.square_()
            self.square_F += h.sum(0).double().cpu()
            self.largest_F = torch.maximum(self.largest_F, h.amax(0).sqrt().cpu())
        room = MOST_KEPT_TOKENS - sum(map(len, self.kept_TF))
        if self.profiled and room > 0:
            self.kept_TF.append(h_TF[:room].bfloat16().cpu())

    def update_importance(self, h_TF: Tensor, gradient_TF: Tensor, group_T: Tensor) -> None:
        """Add ``|h_j dL/dh_j|`` of T tokens to the groups that they belong to, [T] int64 from 0 to G - 1."""
        member_GT = F.one_hot(group_T, len(self.members_G)).T
        self.members_G += member_GT.sum(1)
        change_TF = (h_TF * gradient_TF).abs_()
        self.importance_GF += (member_GT.to(change_TF.dtype) @ change_TF).double().cpu()

    def importance(self) -> Tensor:
        """Mean of ``|h_j dL/dh_j|`` over the tokens of each group, [G, F]: how L changes without the neuron."""
        return self.importance_GF / self.members_G.clamp(min=1).unsqueeze(1)

    def profiles(self, directions: int, seed: int) -> Tensor:
        """Each neuron's centred, normalised activation over the tokens, in the coordinates that matter, [F, P].

        These are the leading eigenvectors of the neurons' correlation matrix, times the roots of their eigenvalues:
        inner products are the correlations, as nearly as P directions can tell. A neuron that never moves is 0.
        """
        assert self.profiled, "made without profiles"
        if self.second_FF is not None:
            values, vectors_FP = torch.linalg.eigh(self.correlation())
        else:
            values, vectors_FP = self._leading(directions, seed)
        directions = min(directions, len(values))
        profile_FP = vectors_FP[:, -directions:] * values[-directions:].clamp(min=0).sqrt()
        # An eigenvector's sign is arbitrary; fix it, so that the same statistics give the same profiles.
        return profile_FP * torch.sign(profile_FP.gather(0, profile_FP.abs().argmax(0, keepdim=True)))

    def _leading(self, directions: int, seed: int) -> tuple[Tensor, Tensor]:
        """Leading eigenvalues, ascending, and eigenvectors of the correlation matrix, without the matrix itself.

        Randomised subspace iteration on the activations: a step costs 4 T F P operations.
        """
        mean_F, scale_F = self._mean_and_scale()
        generator = torch.Generator().manual_seed(seed)
        width = min(directions + OVERSAMPLING, len(mean_F))
        basis_FP = torch.randn(len(mean_F), width, generator=generator)
        # Where the basis turns to may be rounded; what it shows in the end, the last step, is not.
        working = torch.bfloat16 if bf16_supported() else torch.float32
        for step in range(POWER_STEPS + 1):
            basis_FP = torch.linalg.qr(basis_FP).Q
            # Centring and scaling are folded into the basis, so that the activations are read and never rewritten.
            scaled_FP = scale_F.unsqueeze(1) * basis_FP
            mean_P = mean_F @ scaled_FP
            image_FP = torch.zeros(basis_FP.shape, dtype=torch.float64)
            sum_P = torch.zeros(width, dtype=torch.float64)
            gram_PP = torch.zeros(width, width, dtype=torch.float64)
            for kept in self.kept_TF:
                for part in kept.split(ROWS):
                    last = step == POWER_STEPS
                    h_TF = part.to(torch.float32 if last else working)
                    projected_TP = (h_TF @ scaled_FP.to(h_TF.dtype)).float() - mean_P
                    if last:
                        gram_PP += (projected_TP.T @ projected_TP).double()
                    else:
                        image_FP += h_TF.T @ projected_TP.to(working)
                        sum_P += projected_TP.sum(0)
            if step < POWER_STEPS:
                centred_FP = image_FP - torch.outer(mean_F.double(), sum_P)
                basis_FP = scale_F.unsqueeze(1) * centred_FP.float()
        values, rotation_PP = torch.linalg.eigh(gram_PP / sum(map(len, self.kept_TF)))
        return values, basis_FP.double() @ rotation_PP

    def _mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Mean of each neuron and one over its deviation (0 where it never moves), [F] each, float32."""
        mean_F = self.sum_F / self.tokens
        deviation_F = (self.square_F / self.tokens - mean_F.square()).clamp(min=0).sqrt()
        scale_F = torch.where(deviation_F > 1e-9 * deviation_F.max(), 1 / deviation_F, 0)
        return mean_F.float(), scale_F.float()

    def covariance(self) -> Tensor:
        """Covariance of the activations, [F, F], float64."""
        assert self.second_FF is not None, "too wide for F x F moments"
        mean_F = self.sum_F / self.tokens
        return self.second_FF / self.tokens - torch.outer(mean_F, mean_F)

    def correlation(self) -> Tensor:
        """Correlation of the activations, [F, F], float64; a neuron that never moves correlates with none."""
        covariance_FF = self.covariance()
        deviation_F = covariance_FF.diagonal().clamp(min=0).sqrt()
        inverse_F = torch.where(deviation_F > 1e-9 * deviation_F.max(), 1 / deviation_F, 0)
        return covariance_FF * torch.outer(inverse_F, inverse_F)

    def energy(self, ffn: DenseFFN) -> Tensor:
        """Expected output energy of each neuron, ``E[h_j^2] ||w_out[:, j]||^2``, [F] (methods: CMoE)."""
        return self.square_F / self.tokens * ffn.w_out_DF.double().square().sum(0)

    def largest_contribution(self, ffn: DenseFFN) -> Tensor:
        """The most that each neuron ever adds to the output, ``max |h_j| ||w_out[:, j]||``, [F]."""
        return self.largest_F * ffn.w_out_DF.norm(dim=0)

    def narrow(self, neurons_R: Tensor) -> NeuronStatistics:
        """The same statistics of some of the neurons."""
        some = NeuronStatistics(0, profiles=self.profiled)
        some.tokens = self.tokens
        some.sum_F = self.sum_F[neurons_R]
        some.square_F = self.square_F[neurons_R]
        some.largest_F = self.largest_F[neurons_R]
        some.second_FF = None if self.second_FF is None else self.second_FF[neurons_R][:, neurons_R]
        some.kept_TF = [kept[:, neurons_R] for kept in self.kept_TF]
        some.members_G, some.importance_GF = self.members_G, self.importance_GF[:, neurons_R]
        return some
