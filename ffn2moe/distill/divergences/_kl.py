"""Arithmetic that several divergences share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ffn2moe.data.ranks import Ranks


def kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Return KL(p || q) of each row of log-probabilities [T, V], in nats: [T]."""
    return F.kl_div(q_log, p_log, reduction="none", log_target=True).sum(-1)


def share_of_mean(values: Tensor, ranks: Ranks) -> Tensor:
    """Return this process's part of the mean over all processes; the parts add up to the mean."""
    return values.sum() / ranks.total(values.numel())


def forward_kl(student_TV: Tensor, teacher_TV: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean of KL(teacher || student) of logits [T, V]."""
    s_log, t_log = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    return share_of_mean(kl(t_log, s_log), ranks)
