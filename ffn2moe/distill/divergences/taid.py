"""TAID (arXiv 2501.16937): forward KL to a target between student and teacher that moves to the teacher.

The target is ``softmax((1 - a) z_s + a z_t)``, with the student's logits held fixed and a rising linearly from 0.4 to
1: a nearer goal while the student is far away. The paper raises a further, by ``5e-4 (1 - a) sigmoid(momentum of the
loss's relative fall)`` a step, where that is ahead of the line. It never is in runs of fewer than 2,000 steps, so this
row leaves it out.
"""

from __future__ import annotations

from torch import Tensor

from ffn2moe.distill.divergences import _kl

START = 0.4  # share of the teacher in the first target


def of_tokens(student_TV: Tensor, teacher_TV: Tensor, progress: float) -> Tensor:
    """Return KL(target || student) of each position for the target of this `progress`."""
    share = START + (1 - START) * progress
    target_TV = (1 - share) * student_TV.detach() + share * teacher_TV
    return _kl.kl(target_TV.log_softmax(-1), student_TV.log_softmax(-1))


ROW = _kl.by_token(of_tokens, reference="arXiv 2501.16937")
