"""Forward KL: KL(teacher || student). It spreads the student over everything that the teacher says."""

from __future__ import annotations

from torch import Tensor

from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.divergences import Divergence, _kl


def loss(student_TV: Tensor, teacher_TV: Tensor, progress: float, ranks: Ranks) -> Tensor:
    """Return the mean of KL(teacher || student)."""
    return _kl.forward_kl(student_TV, teacher_TV, ranks)


ROW = Divergence(loss, reference="Hinton et al., arXiv 1503.02531")
