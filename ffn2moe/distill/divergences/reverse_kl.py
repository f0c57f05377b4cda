"""Reverse KL: KL(student || teacher). It concentrates the student on what the teacher says most often."""

from __future__ import annotations

from torch import Tensor

from ffn2moe.distill.divergences import _kl


def of_tokens(student_TV: Tensor, teacher_TV: Tensor, progress: float) -> Tensor:
    """Return KL(student || teacher) of each position."""
    return _kl.kl(student_TV.log_softmax(-1), teacher_TV.log_softmax(-1))


ROW = _kl.by_token(of_tokens, reference="MiniLLM, arXiv 2306.08543")
