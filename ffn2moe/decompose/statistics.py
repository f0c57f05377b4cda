"""Sum statistics of an FFN's neurons over calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.numerics import WIDEST_MOMENTS, bf16_supported

MOST_KEPT_TOKENS = 16384  # tokens whose activations are kept of a wider FFN
ROWS = 1024  # rows of bfloat16 activations that become float32 at once
OVERSAMPLING, POWER_STEPS = 16, 4  # for the search of leading directions (Halko, Martinsson & Tropp 2011)


class NeuronStatistics:
    """Sum the activations of the F neurons of one FFN over T calibration tokens, in float64.

    With `profiles` it keeps second moments, F x F, of up to `WIDEST_MOMENTS` neurons. Of wider FFNs it keeps the
    activations of the first `MOST_KEPT_TOKENS` tokens instead, T x F in bfloat16. Without `profiles` it keeps sums.
    """

    def __init__(self, ffn_width: int, profiles: bool = True) -> None:
        self.tokens = 0
        self.profiled = profiles
        self.sum_F = torch.zeros(ffn_width, dtype=torch.float64)
        self.square_F = torch.zeros(ffn_width, dtype=torch.float64)
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
            return
        for part in h_TF.split(ROWS):
            h = part.to(torch.float32, copy=True)
            self.sum_F += h.sum(0).double().cpu()
            h.square_()
            self.square_F += h.sum(0).double().cpu()
        room = MOST_KEPT_TOKENS - sum(map(len, self.kept_TF))
        if self.profiled and room > 0:
            self.kept_TF.append(h_TF[:room].bfloat16().cpu())

    def profiles(self, directions: int, seed: int) -> Tensor:
        """Return each neuron's centred, normalised activation over the tokens, in its P leading coordinates, [F, P].

        The coordinates are the leading eigenvectors of the neurons' correlation matrix, times the roots of their
        eigenvalues: inner products approximate the correlations. A neuron that never changes is 0.
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
        """Return the leading eigenvalues, ascending, and eigenvectors of the correlation matrix, without the matrix.

        This is randomised subspace iteration on the activations: a step costs 4 T F P operations.
        """
        mean_F, scale_F = self._mean_and_scale()
        generator = torch.Generator().manual_seed(seed)
        width = min(directions + OVERSAMPLING, len(mean_F))
        basis_FP = torch.randn(len(mean_F), width, generator=generator)
        # Steps that turn the basis may round; the last step, which reads the result, does not.
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
        """Return each neuron's mean and one over its deviation (0 where it never changes), [F] each, float32."""
        mean_F = self.sum_F / self.tokens
        deviation_F = (self.square_F / self.tokens - mean_F.square()).clamp(min=0).sqrt()
        scale_F = torch.where(deviation_F > 1e-9 * deviation_F.max(), 1 / deviation_F, 0)
        return mean_F.float(), scale_F.float()

    def covariance(self) -> Tensor:
        """Return the covariance of the activations, [F, F], float64."""
        assert self.second_FF is not None, "too wide for F x F moments"
        mean_F = self.sum_F / self.tokens
        return self.second_FF / self.tokens - torch.outer(mean_F, mean_F)

    def correlation(self) -> Tensor:
        """Return the correlation of the activations, [F, F], float64; 0 for a neuron that never changes."""
        covariance_FF = self.covariance()
        deviation_F = covariance_FF.diagonal().clamp(min=0).sqrt()
        inverse_F = torch.where(deviation_F > 1e-9 * deviation_F.max(), 1 / deviation_F, 0)
        return covariance_FF * torch.outer(inverse_F, inverse_F)

    def energy(self, ffn: DenseFFN) -> Tensor:
        """Return the expected output energy of each neuron, ``E[h_j^2] ||w_out[:, j]||^2``, [F] (methods: CMoE)."""
        return self.square_F / self.tokens * ffn.w_out_DF.double().square().sum(0)

    def narrow(self, neurons_R: Tensor) -> NeuronStatistics:
        """Return the same statistics of some of the neurons."""
        some = NeuronStatistics(0, profiles=self.profiled)
        some.tokens = self.tokens
        some.sum_F = self.sum_F[neurons_R]
        some.square_F = self.square_F[neurons_R]
        some.second_FF = None if self.second_FF is None else self.second_FF[neurons_R][:, neurons_R]
        some.kept_TF = [kept[:, neurons_R] for kept in self.kept_TF]
        return some
