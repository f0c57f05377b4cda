"""Reverse KL: KL(student || teacher). It concentrates the student on what the teacher says most often."""

from __future__ import annotations

from torch import Tensor

from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.divergences import Divergence
from ffn2moe.distill.divergences._kl import kl, share_of_mean


def loss(student_TV: Tensor, teacher_TV: Tensor, progress: float, ranks: Ranks) -> Tensor:
    """Return the mean of KL(student || teacher)."""
    s_log, t_log = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    return share_of_mean(kl(s_log, t_log), ranks)


ROW = Divergence(loss, reference="MiniLLM, arXiv 2306.08543")
