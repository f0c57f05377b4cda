"""Share a budget among layers, such as experts: K of each layer by the oracle's errors."""

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


def allocate(errors_LE: Tensor, total: int) -> tuple[int, ...]:
    """Return how many of E parts each layer gets, 1 to E and at most `total` together, with the least sum of errors.

    `errors_LE` holds the error of each layer with 1 to E parts, such as experts. This is exact, by dynamic programming
    over the layers. Where errors fall by less with each part, it equals adding the most useful part one at a time.
    """
    E, budget = errors_LE.shape[1], total
    best_B = np.zeros(budget + 1)  # least error of the layers so far with at most b parts
    taken = []
    for error_E in errors_LE.double().numpy():
        options_EB = np.full((E, budget + 1), np.inf)
        for K in range(1, min(E, budget) + 1):
            options_EB[K - 1, K:] = best_B[: budget + 1 - K] + error_E[K - 1]
        taken.append(options_EB.argmin(0) + 1)
        best_B = options_EB.min(0)
    shares = []
    for taken_B in reversed(taken):
        shares.append(int(taken_B[budget]))
        budget -= shares[-1]
    return tuple(reversed(shares))
