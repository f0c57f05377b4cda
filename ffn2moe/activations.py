"""Streaming statistics of FFN neurons over calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.dense import DenseFFN


class NeuronStatistics:
    """Moments of the F neurons of one FFN, summed over tokens in float64; memory is F x F, whatever T is."""

    def __init__(self, ffn_width: int) -> None:
        self.tokens = 0
        self.sum_F = torch.zeros(ffn_width, dtype=torch.float64)
        self.second_FF = torch.zeros(ffn_width, ffn_width, dtype=torch.float64)

    def update(self, h_TF: Tensor) -> None:
        """Add the activations of T tokens, [T, F]."""
        self.tokens += h_TF.shape[0]
        self.sum_F += h_TF.sum(0, dtype=torch.float64).cpu()
        self.second_FF += (h_TF.T @ h_TF).double().cpu()

    def covariance(self) -> Tensor:
        """Covariance of the activations, [F, F], float64."""
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
        return self.second_FF.diagonal() / self.tokens * ffn.w_out_DF.double().square().sum(0)

    def narrow(self, neurons_R: Tensor) -> NeuronStatistics:
        """The same statistics of some of the neurons."""
        some = NeuronStatistics(0)
        some.tokens = self.tokens
        some.sum_F = self.sum_F[neurons_R]
        some.second_FF = self.second_FF[neurons_R][:, neurons_R]
        return some
