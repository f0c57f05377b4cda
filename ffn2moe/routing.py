"""How a router comes by its weights: where it starts, what it is trained towards, and the training.

A layer by itself on the dense teacher's inputs; no expert changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.router import Router
from ffn2moe.train import schedule


def ridge(x_TD: Tensor, target_TE: Tensor, penalty: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Ridge regression from tokens to target scores, in closed form: weight [E, D] and bias [E].

    ``W = (X'X + n penalty s I)^-1 X'U`` on centred data, s the mean variance of X, so that `penalty` has no unit.
    Without an intercept the bias is 0, and each token's targets are taken about their mean, which no choice sees.
    """
    x = x_TD.double()
    u = target_TE.double()
    if not intercept:
        gram = x.T @ x
        gram.diagonal().add_(penalty * gram.diagonal().mean())
        weight_DE = torch.linalg.solve(gram, x.T @ (u - u.mean(1, keepdim=True)))
        return weight_DE.T.float().contiguous(), torch.zeros(u.shape[1])
    x_mean, u_mean = x.mean(0), u.mean(0)
    x, u = x - x_mean, u - u_mean
    gram = x.T @ x
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight_DE = torch.linalg.solve(gram, x.T @ u)
    bias_E = u_mean - x_mean @ weight_DE
    return weight_DE.T.float().contiguous(), bias_E.float()


def softmax_target(gain_TE: Tensor, num_active: int, iterations: int = 40) -> Tensor:
    """The router's target ``q = softmax(gain / tau)``, [T, E], with tau such that the mean entropy is log K.

    K equally good experts have entropy log K, so that is as sharp as a target for a choice of K can be. For
    K = 1 the target is the one-hot best expert.
    """
    if num_active == 1:
        return F.one_hot(gain_TE.argmax(-1), gain_TE.shape[-1]).to(gain_TE)
    wanted = log(min(num_active, gain_TE.shape[-1]))
    spread = gain_TE.std().clamp(min=torch.finfo(gain_TE.dtype).tiny)
    low, high = -20.0, 20.0  # log2 of tau in units of the spread; the entropy rises with tau
    for _ in range(iterations):
        middle = (low + high) / 2
        q_TE = (gain_TE / (spread * 2**middle)).softmax(-1)
        entropy = -(q_TE * q_TE.clamp(min=1e-30).log()).sum(-1).mean()
        low, high = (middle, high) if entropy < wanted else (low, middle)
    return (gain_TE / (spread * 2**high)).softmax(-1)


def router_loss(scores_TE: Tensor, target_TE: Tensor) -> Tensor:
    """Repaired Prior-Approximate loss: forward ``KL(target || softmax(scores))``, mean over tokens.

    FactorLLM's loss (arXiv 2408.11855) is the reverse KL to a K-hot label; see docs/methods.md for what
    was repaired and why.
    """
    return F.kl_div(scores_TE.log_softmax(-1), target_TE, reduction="batchmean")


def prior_approximate_loss(scores_TE: Tensor, outputs_TED: Tensor, num_active: int) -> Tensor:
    """FactorLLM's Prior-Approximate loss as published (arXiv 2408.11855), mean over tokens: the rival of `router_loss`.

    The label is K-hot at the experts whose own output is nearest to ``y / c``, c = E/K, y being the sum of the outputs
    [T, E, D]; the loss is the reverse ``KL(softmax(scores) || softmax(label))``. docs/methods.md says what is wrong
    with it.
    """
    target_T1D = outputs_TED.detach().sum(1, keepdim=True) * (num_active / outputs_TED.shape[1])
    error_TE = (outputs_TED.detach() - target_T1D).square().mean(-1)
    nearest_TK = error_TE.topk(num_active, largest=False).indices
    label_TE = torch.zeros_like(scores_TE).scatter_(1, nearest_TK, 1.0)
    return F.kl_div(label_TE.log_softmax(-1), scores_TE.log_softmax(-1), reduction="batchmean", log_target=True)


def train_router(
    router: Router,
    x_TD: Tensor,
    target_TE: Tensor,
    *,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """Minimise the router loss on a layer's inputs [T, D] and targets [T, E]; yields the loss of each step.

    Inputs are whitened per feature inside, so that the learning rate means the same in every layer; the weights
    are those of the plain inputs again at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation_D = x_TD.std(0).clamp(min=1e-6)
    mean_D = x_TD.mean(0) if router.has_bias else torch.zeros_like(deviation_D)
    white_TD = (x_TD - mean_D) / deviation_D
    weight = (router.weight.detach() * deviation_D).requires_grad_(True)
    bias = (router.bias.detach() + router.weight.detach() @ mean_D).requires_grad_(router.has_bias)
    trained = [weight, bias] if router.has_bias else [weight]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(len(x_TD), (min(batch_tokens, len(x_TD)),), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        loss = router_loss(F.linear(white_TD[rows], weight, bias), target_TE[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    with torch.no_grad():
        router.weight.copy_(weight / deviation_D)
        router.bias.copy_(bias - router.weight @ mean_D)
