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
    alive_F = torch.ones(len(gram_FF), dtype=torch.bool)
    stays_F = torch.zeros_like(alive_F)
    if always_S is not None:
        stays_F[always_S] = True
    damped_FF = gram_FF.double()
    damped_FF.diagonal().add_(DAMPING * damped_FF.diagonal().mean())
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(damped_FF)).float()
    w_FD = w_out_DF.T.contiguous()
    left, most, error = len(gram_FF), max(1, len(gram_FF) // STEPS), 0.0
    for count in counts:
        while left > count:
            rise_F = w_FD.square().sum(1) / inverse_FF.diagonal()
            rise_F[stays_F | ~alive_F] = torch.inf
            dropped_N = rise_F.topk(min(most, left - count), largest=False).indices
            # The others take over what the dropped ones gave: the fit on the rest follows from the inverse, by blocks.
            # Rows and columns that are gone become 0 and stay in their places: to copy the others costs more.
            across_FN, w_ND = inverse_FF[:, dropped_N], w_FD[dropped_N]
            solved = torch.linalg.solve(across_FN[dropped_N], torch.cat([w_ND, across_FN.T], dim=1))
            solved_ND, solved_NF = solved.split([w_FD.shape[1], len(w_FD)], dim=1)
            error += (w_ND * solved_ND).sum().item()
            w_FD.addmm_(across_FN, solved_ND, alpha=-1)
            inverse_FF.addmm_(across_FN, solved_NF, alpha=-1)
            alive_F[dropped_N] = False
            left -= len(dropped_N)
        yield alive_F.nonzero().flatten(), error
