"""One optimiser step of distillation, whether it trains a model or one layer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ffn2moe.numerics import schedule

MAX_GRADIENT_NORM = 1.0
# Routers that choose how many experts a token uses follow the batches, so that the mean stays at K:
FOLLOW_RATE = 0.1  # this share of the way in each step, ...
FOLLOWED_TOKENS = 1024  # ... by this many tokens of the batch


def budgets_of(num_active: int, elastic: Sequence[int]) -> tuple[int, ...]:
    """Return the K that the steps take turns in, the model's own first; none if the model has one K alone."""
    return tuple(dict.fromkeys((num_active, *elastic))) if elastic else ()


def budget_of_step(budgets: Sequence[int], step: int, seed: int) -> int:
    """Return the K that a step of elastic training runs: each K once in every round, each round in a random order."""
    past, place = divmod(step, len(budgets))
    return random.Random(f"{seed}/{past}").sample(list(budgets), len(budgets))[place]


def adamw(trained: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """Return the optimiser that `update` steps."""
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


def update(
    optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter], learning_rate: float, step: int, steps: int
) -> Tensor:
    """Clip the gradients and change the weights, at the rate of this step; return the gradients' norm."""
    norm = nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * schedule(step, steps)
    optimizer.step()
    return norm


def require_finite(value: float, loss: str, step: str) -> float:
    """Return a loss. FloatingPointError, with the remedy, if it is not finite; `loss` and `step` name it."""
    if value != value or value in (float("inf"), float("-inf")):
        raise FloatingPointError(f"{loss} is {value} at {step}: lower the learning rate, or switch bfloat16 off")
    return value
