"""Balanced KL (BD-KD, arXiv 2212.12965): both directions, weighted at each position by which model is surer."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ablation.method import Method, add
from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.divergences import DIVERGENCES, Divergence
from ffn2moe.distill.divergences._kl import kl, share_of_mean


def loss(student_TV: Tensor, teacher_TV: Tensor, progress: float, ranks: Ranks) -> Tensor:
    """Return the mean of both KLs of logits [T, V], one of them doubled.

    Where the student's entropy is below the teacher's, KL(t || s) counts double, which spreads the student. Elsewhere
    KL(s || t) does, which sharpens it. The weights 2 and 1, over 3, are this project's.
    """
    s_log, t_log = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    surer_T = _entropy(s_log) < _entropy(t_log)
    forward_T, reverse_T = kl(t_log, s_log), kl(s_log, t_log)
    return share_of_mean(forward_T + reverse_T + torch.where(surer_T, forward_T, reverse_T), ranks) / 3


@torch.no_grad()
def _entropy(p_log: Tensor) -> Tensor:
    return -(p_log.exp() * p_log).sum(-1)


DIVERGENCES.register("balanced_kl", Divergence(loss, reference="BD-KD, arXiv 2212.12965"))
add(
    Method(
        "balanced_kl",
        "balanced KL",
        "distillation",
        "BD-KD, arXiv 2212.12965",
        ("distilled",),
        divergence="balanced_kl",
        heads=("causal",),
    )
)
