"""Share a budget of experts among tokens at one price."""

from __future__ import annotations

import torch
from torch import Tensor

BISECTIONS = 60  # for a price


def at_one_price(errors_TN: Tensor, mean: float, weight_T: Tensor | None = None) -> tuple[Tensor, float]:
    """Return how many experts each token should use, [T] from 1 to N, `mean` of them on average; and the price.

    Each token uses the number that minimises its error plus the price of its experts (a Lagrange multiplier), so that
    no other numbers with the same sum, or a smaller one, have a smaller sum of errors. The price is the lowest possible
    one. Tokens to which two numbers are worth the same use the larger as long as there is room. A row may stand for
    several tokens, `weight_T`.
    """
    errors_TN = errors_TN.double()
    T, N = errors_TN.shape
    weight_T = errors_TN.new_ones(T) if weight_T is None else weight_T.to(errors_TN)
    cost_TN = weight_T.unsqueeze(1) * torch.arange(1, N + 1, dtype=errors_TN.dtype, device=errors_TN.device)
    budget = mean * weight_T.sum() + 1e-6

    def at(price: float) -> Tensor:
        return (errors_TN + price * cost_TN).argmin(1) + 1

    def cost(count_T: Tensor) -> Tensor:
        return (weight_T * count_T).sum()

    # Above this price a second expert pays for no token.
    low, high = 0.0, ((errors_TN[:, 0] - errors_TN.amin(1)) / weight_T.clamp(min=1)).max().item() * 2 + 1e-30
    if cost(at(low)) <= budget:
        return at(low), low
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        low, high = (price, high) if cost(at(price)) > budget else (low, price)
    few_T, many_T = at(high), at(low)
    more_T = (many_T - few_T).clamp(min=0)
    affordable_T = (weight_T * more_T).cumsum(0) <= budget - cost(few_T)
    return few_T + more_T * affordable_T, high
