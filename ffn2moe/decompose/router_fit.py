"""Train the router of one layer on the dense teacher's inputs; no expert changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.decompose.objectives import Phase
from ffn2moe.moe.router import Router
from ffn2moe.numerics import schedule


def train_router(
    router: Router,
    read_RD: Tensor,
    phases: Sequence[Phase],
    *,
    steps: int,
    batch_rows: int,
    learning_rate: float,
    seed: int,
    temperature: float = 1.0,
) -> Iterator[float]:
    """Minimise the loss of each phase in turn on the rows [R, D] that a router reads; yield the loss of each step.

    This is AdamW, with one schedule for each phase. The scores are divided by a temperature that falls geometrically
    from `temperature` at the first step to 1 at the last (EvoMoE, arXiv 2112.14397). Inputs are whitened per feature
    inside, so that a learning rate means the same in every layer; at the end the weights are for plain inputs again.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation_D = read_RD.std(0).clamp(min=1e-6)
    mean_D = read_RD.mean(0) if router.has_bias else torch.zeros_like(deviation_D)
    white_RD = (read_RD - mean_D) / deviation_D
    weight = (router.weight.detach() * deviation_D).requires_grad_(True)
    bias = (router.bias.detach() + router.weight.detach() @ mean_D).requires_grad_(router.has_bias)
    trained = [weight, bias] if router.has_bias else [weight]
    # One buffer for all batches: new memory in every step costs more than the copy.
    batch_BD = white_RD.new_empty(min(batch_rows, len(white_RD)), white_RD.shape[1])
    begin = 0
    behind = 0.0
    for phase in phases:
        behind += phase.share
        end = steps if phase is phases[-1] else round(behind * steps)
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        for step in range(begin, end):
            rows = torch.randint(len(white_RD), (len(batch_BD),), generator=generator)
            torch.index_select(white_RD, 0, rows, out=batch_BD)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step - begin, end - begin)
            scores_BE = F.linear(batch_BD, weight, bias) / temperature ** (1 - step / max(1, steps - 1))
            loss = phase.loss(scores_BE, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()
        begin = end
    with torch.no_grad():
        router.weight.copy_(weight / deviation_D)
        router.bias.copy_(bias - router.weight @ mean_D)
