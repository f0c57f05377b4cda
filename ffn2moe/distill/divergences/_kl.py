"""Arithmetic that several divergences share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.divergences import Divergence


def kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Return KL(p || q) of each row of log-probabilities [T, V], in nats: [T].

    softmax is here what exp is, at a fifth of its time: `F.kl_div`, which takes exp, needs twice as long with backward.
    """
    return (p_log.softmax(-1) * (p_log - q_log)).sum(-1)


def share_of_mean(values: Tensor, ranks: Ranks) -> Tensor:
    """Return this process's part of the mean over all processes; the parts add up to the mean."""
    return values.sum() / ranks.total(values.numel())


def forward_kl(student_TV: Tensor, teacher_TV: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean of KL(teacher || student) of logits [T, V]."""
    return share_of_mean(kl(teacher_TV.log_softmax(-1), student_TV.log_softmax(-1)), ranks)


def by_token(of_tokens: Callable[[Tensor, Tensor, float], Tensor], reference: str) -> Divergence:
    """Return the divergence whose loss is the mean of `of_tokens` over the positions."""

    def loss(student_TV: Tensor, teacher_TV: Tensor, progress: float, ranks: Ranks) -> Tensor:
        return share_of_mean(of_tokens(student_TV, teacher_TV, progress), ranks)

    return Divergence(loss, reference, of_tokens)
