"""Share a budget of experts among layers: K of each layer by the oracle's errors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ffn2moe.decompose import oracle
from ffn2moe.decompose.oracles import ORACLES
from ffn2moe.moe.layer import MoEFFN


@torch.no_grad()
def errors_by_active(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> Tensor:
    """Return the error of a layer with K = 1 to E experts, [E] float64: ``||y - a y_S||^2 / ||y||^2`` on tokens [T, D].

    Each K has the best choice that the layer's selection allows, and the best scale a.
    """
    found = oracle.grams(moe, x_TD, chunk)
    errors = []
    for K in range(1, moe.num_experts + 1):
        chosen_RE = ORACLES[moe.router.selection].choose(found, K, max(K, moe.router.max_active))
        errors.append(oracle.fit_scale(found, chosen_RE).error ** 2)
    return torch.tensor(errors, dtype=torch.float64)


def allocate(errors_LE: Tensor, num_active: int) -> tuple[int, ...]:
    """Return K of each layer, from 1 to E and at most `num_active` on average, with the least sum of errors.

    `errors_LE` holds the error of each layer with 1 to E experts. This is exact, by dynamic programming over the
    layers. Where errors fall by less with each expert, it equals adding the most useful expert one at a time.
    """
    L, E = errors_LE.shape
    budget = num_active * L
    best_B = np.zeros(budget + 1)  # least error of the layers so far with at most b experts
    taken = []
    for error_E in errors_LE.double().numpy():
        options_EB = np.full((E, budget + 1), np.inf)
        for K in range(1, min(E, budget) + 1):
            options_EB[K - 1, K:] = best_B[: budget + 1 - K] + error_E[K - 1]
        taken.append(options_EB.argmin(0) + 1)
        best_B = options_EB.min(0)
    active = []
    for taken_B in reversed(taken):
        active.append(int(taken_B[budget]))
        budget -= active[-1]
    return tuple(reversed(active))
