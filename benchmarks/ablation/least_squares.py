"""Least-squares fits of linear maps to what the FFN's tokens ask of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Weight of the trained matrix in a least-squares fit, relative to the features' mean variance: a fit to few tokens
# stays near the trained weights, and on the calibration tokens it is never worse than they are.
SHRINKAGE = 1e-3


@dataclass(frozen=True)
class Moments:
    """Means and covariances, float64, that an affine map from features to targets is fitted from.

    They include `SHRINKAGE`, so the fit is one of the tokens and of the trained matrix.
    """

    mean_I: Tensor
    mean_O: Tensor
    covariance_II: Tensor
    cross_OI: Tensor
    importance_O: Tensor  # weight of the error of each target

    @classmethod
    def of(cls, features_TI: Tensor, targets_TO: Tensor, trained_OI: Tensor) -> Moments:
        """Return the moments of features and targets on the same tokens; the fit stays near the map `trained_OI`."""
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
        """Return the moments of a known linear map: targets are ``weight x + bias``."""
        mean_I = x_TI.mean(0)
        centred_TI = x_TI - mean_I
        covariance_II = (centred_TI.T @ centred_TI).double() / len(x_TI)
        covariance_II.diagonal().add_(_trust(covariance_II))
        mean_O = F.linear(mean_I, weight_OI, bias_O).double()
        return cls(mean_I.double(), mean_O, covariance_II, weight_OI.double() @ covariance_II, importance_O.double())

    def weight(self) -> Tensor:
        """Return the best matrix, [O, I]."""
        return torch.cholesky_solve(self.cross_OI.T, torch.linalg.cholesky(self.covariance_II)).T

    def bias(self, weight_OI: Tensor) -> Tensor:
        """Return the best bias beside a matrix, [O]: it makes the means right."""
        return self.mean_O - weight_OI @ self.mean_I

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best matrix of a rank as factors [O, R] and [R, I] (reduced-rank regression, Izenman 1975)."""
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
    """Return the eigenvectors of the largest eigenvalues of a symmetric matrix, largest first, [N, R]."""
    return torch.linalg.eigh(gram_NN).eigenvectors[:, -rank:].flip(1)


def _trust(covariance_II: Tensor) -> float:
    """Return the weight of the trained matrix; it stays above zero if no feature varies."""
    return max(SHRINKAGE * covariance_II.diagonal().mean().item(), 1e-12)
