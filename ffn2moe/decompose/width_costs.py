"""Find what each width of an FFN costs the model that it stands in."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.decompose.elimination import errors_by_width
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.numerics import WIDEST_MOMENTS, chunk_of, low_precision

COST_TOKENS = 16384  # most tokens that the cost of a width is measured on
WIDEST_STEP, FEWEST_STEPS = 64, 24  # widths are multiples of a power of two: of 64, or less in narrow FFNs
DAMPING = 1e-4  # added to the Fisher information, relative to its mean diagonal


def step_of(ffn_width: int) -> int:
    """Return what the widths of the layers are multiples of."""
    return int(max(1, min(WIDEST_STEP, 2 ** ((ffn_width // FEWEST_STEPS).bit_length() - 1))))


def widths_of(ffn_width: int) -> list[int]:
    """Return the widths that a layer may get, ascending: multiples of the step, and all neurons."""
    step = step_of(ffn_width)
    return [*range(step, ffn_width, step), ffn_width]


@torch.no_grad()
def moments_of(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Return the sum over tokens [T, D] of ``h h'``, [F, F]; in FFNs wider than `WIDEST_MOMENTS` its diagonal, [F]."""
    F = ffn.ffn_width
    moments = torch.zeros((F,) if F > WIDEST_MOMENTS else (F, F))
    with low_precision(F, x_TD.device):
        for x in x_TD.split(chunk_of(F)):
            h_TF = ffn.neurons(x).float()
            moments += h_TF.square().sum(0) if F > WIDEST_MOMENTS else h_TF.T @ h_TF
    return moments


@torch.no_grad()
def weighed(ffn: DenseFFN, fisher_DD: Tensor) -> Tensor:
    """Return the output matrix in directions whose squares are what an error in them costs, [D, F]."""
    damped_DD = fisher_DD.double()
    damped_DD.diagonal().add_((DAMPING * damped_DD.diagonal().mean()).clamp(min=1e-30))
    return torch.linalg.cholesky(damped_DD).float().T @ ffn.w_out_DF


@torch.no_grad()
def costs(ffn: DenseFFN, moments: Tensor, fisher_DD: Tensor) -> Tensor:
    """Return what each of `widths_of` costs the model, [N] float64, in nats summed over the tokens of `moments_of`.

    The neurons that stay are those of the elimination under the same weights, with the best output matrix for them. In
    FFNs wider than `WIDEST_MOMENTS` those of most energy stay, and none takes over what the others gave.
    """
    weighed_DF, widths = weighed(ffn, fisher_DD), widths_of(ffn.ffn_width)
    if moments.dim() == 2:
        return errors_by_width(moments, weighed_DF, widths) / 2
    energy_F = (moments * weighed_DF.square().sum(0)).double().sort().values
    return torch.stack([energy_F[: ffn.ffn_width - width].sum() for width in widths]) / 2
