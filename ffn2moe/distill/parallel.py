"""Keep the processes that share every batch in step: sum their gradients, compare their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ffn2moe.data.ranks import Ranks

COMPARED_EVERY = 100  # steps between two comparisons of the weights


@torch.no_grad()
def sum_gradients(trained: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Give every process the gradients of the whole batch, in one exchange.

    A parameter without a gradient in every process (the scale of another K) has none afterwards either, so that the
    optimiser leaves it alone, as it does in one process.
    """
    if ranks.size == 1:
        return
    device = trained[0].device
    known = torch.tensor([float(one.grad is not None) for one in trained], device=device)
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
    summed = ranks.sum(torch.cat([known, *(part.flatten() for part in parts)]))
    known, *parts = summed.split([len(trained), *(one.numel() for one in trained)])
    for parameter, part, times in zip(trained, parts, known.tolist(), strict=True):
        parameter.grad = part.view_as(parameter) if times else None


@torch.no_grad()
def require_same_weights(tensors: Iterable[Tensor], step: int, ranks: Ranks) -> None:
    """Raise ValueError if the processes do not hold the same weights, bit for bit."""
    if ranks.size == 1:
        return
    sums = [tensor.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64) for tensor in tensors]
    if not ranks.same(torch.stack(sums)):
        raise ValueError(
            f"after step {step} the processes hold different weights: they must run on processors of one kind with "
            "equal numbers of threads (OMP_NUM_THREADS) and the same versions of everything"
        )
