"""Choose the neurons of an FFN that can stand in for all of them.

Of a set S of neurons with activations h_S the best output matrix follows from the second moments of the activations,
G = H'H, alone. Dropping neuron j from a set and fitting the others anew raises the squared error by
``||w_j||^2 / (G_SS^-1)_jj``, with w_j the fitted output column of the neuron (Optimal Brain Surgeon; Hassibi & Stork
1993). So neurons that others can replace go first, however strong they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STEPS = 64  # neurons are dropped in so many steps at least, from all of them to none
DAMPING = 1e-3  # added to G, relative to its mean diagonal


def most_needed(gram_FF: Tensor, w_out_DF: Tensor, count: int, always_S: Tensor | None = None) -> Tensor:
    """Return the `count` neurons that are left when the least needed one is dropped again and again, ascending int64.

    `gram_FF` is the sum of ``h h'`` over tokens, float32. The neurons `always_S` stay. Takes O(F^3) time.
    """
    left_N, _ = next(_dropped(gram_FF, w_out_DF, (count,), always_S))
    return left_N


def errors_by_width(gram_FF: Tensor, w_out_DF: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the squared error that is left with each of `widths` neurons, ascending, after the best fit; float64.

    It is summed over the tokens and outputs of `gram_FF` and `w_out_DF`. All of it is one elimination.
    """
    found = [error for _, error in _dropped(gram_FF, w_out_DF, widths[::-1], None)]
    return torch.tensor(found[::-1], dtype=torch.float64)


def _dropped(
    gram_FF: Tensor, w_out_DF: Tensor, counts: Sequence[int], always_S: Tensor | None
) -> Iterator[tuple[Tensor, float]]:
    """Yield, for each of descending `counts`, the neurons that are left, ascending, and the squared error so far."""
    alive_F = torch.arange(len(gram_FF))
    stays_F = torch.zeros(len(gram_FF), dtype=torch.bool)
    if always_S is not None:
        stays_F[always_S] = True
    damped_FF = gram_FF.double()
    damped_FF.diagonal().add_(DAMPING * damped_FF.diagonal().mean())
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(damped_FF)).float()
    w_FD = w_out_DF.T.contiguous()
    most, error = max(1, len(gram_FF) // STEPS), 0.0
    for count in counts:
        while len(alive_F) > count:
            rise_F = w_FD.square().sum(1) / inverse_FF.diagonal()
            rise_F[stays_F[alive_F]] = torch.inf
            dropped_N = rise_F.topk(min(most, len(alive_F) - count), largest=False).indices
            kept_F = torch.ones(len(alive_F), dtype=torch.bool)
            kept_F[dropped_N] = False
            # The others take over what the dropped ones gave: the fit on the rest follows from the inverse, by blocks.
            across_FN = inverse_FF[kept_F][:, dropped_N]
            solved = torch.linalg.solve(
                inverse_FF[dropped_N][:, dropped_N], torch.cat([w_FD[dropped_N], across_FN.T], dim=1)
            )
            error += (w_FD[dropped_N] * solved[:, : w_FD.shape[1]]).sum().item()
            w_FD = w_FD[kept_F] - across_FN @ solved[:, : w_FD.shape[1]]
            inverse_FF = inverse_FF[kept_F][:, kept_F] - across_FN @ solved[:, w_FD.shape[1] :]
            alive_F = alive_F[kept_F]
        yield alive_F, error
