"""Forward KL: KL(teacher || student). It spreads the student over everything that the teacher says."""

from __future__ import annotations

from torch import Tensor

from ffn2moe.distill.divergences import _kl


def of_tokens(student_TV: Tensor, teacher_TV: Tensor, progress: float) -> Tensor:
    """Return KL(teacher || student) of each position."""
    return _kl.kl(teacher_TV.log_softmax(-1), student_TV.log_softmax(-1))


ROW = _kl.by_token(of_tokens, reference="Hinton et al., arXiv 1503.02531")
