"""What the student is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Divergence = Literal["forward_kl", "reverse_kl", "js", "taid"]
TAID_START = 0.4  # share of the teacher in the first target


def hidden_loss(
    student_hidden: tuple[Tensor, ...], teacher_hidden: tuple[Tensor, ...], mask_BL: Tensor | None
) -> Tensor:
    """Squared error of each layer's hidden states [B, L, D] relative to their energy, summed over layers."""
    total = student_hidden[0].new_zeros((), dtype=torch.float32)
    for student_BLD, teacher_BLD in zip(student_hidden, teacher_hidden, strict=True):
        error, whole = student_BLD.float() - teacher_BLD.float(), teacher_BLD.float()
        if mask_BL is not None:
            error, whole = error * mask_BL.unsqueeze(-1), whole * mask_BL.unsqueeze(-1)
        total = total + error.square().sum() / whole.square().sum()
    return total


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    divergence: Divergence,
    progress: float = 0.0,
) -> Tensor:
    """How far the student's distribution is from the teacher's: nats, mean over the positions that count.

    Logits are [..., V], the mask [...] or None. `forward_kl` is KL(teacher || student), `reverse_kl` the other way
    round, `js` the Jensen-Shannon divergence. `taid` (arXiv 2501.16937) is the forward KL to a target between the two,
    ``softmax((1 - t) student + t teacher)`` with the student held fixed and t rising with `progress` from 0.4 to 1:
    a nearer goal while the student is far off.
    """
    if mask is not None:
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    s, t = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    if divergence == "taid":
        share = TAID_START + (1 - TAID_START) * progress
        t = (1 - share) * s.detach() + share * t
    s_log, t_log = s.log_softmax(-1), t.log_softmax(-1)
    if divergence == "reverse_kl":
        return F.kl_div(t_log, s_log, reduction="batchmean", log_target=True)
    if divergence == "js":
        middle = torch.logaddexp(s_log, t_log) - log(2)
        both = (F.kl_div(middle, one, reduction="batchmean", log_target=True) for one in (s_log, t_log))
        return sum(both, s.new_zeros(())) / 2
    return F.kl_div(s_log, t_log, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class DistillationLoss:
    """The three terms that an encoder student is trained on, and their weighted sum."""

    total: Tensor
    hidden: Tensor
    embedding: Tensor
    relational: Tensor


def distillation_loss(
    student_hidden: tuple[Tensor, ...],
    teacher_hidden: tuple[Tensor, ...],
    student_BD: Tensor,
    teacher_BD: Tensor,
    mask_BL: Tensor,
    *,
    hidden_weight: float,
    embedding_weight: float,
    relational_weight: float,
) -> DistillationLoss:
    """How far the student is from the teacher on one batch.

    - hidden: squared error of each layer's hidden states [B, L, D] relative to their energy, over real tokens,
      summed over layers;
    - embedding: mean of 1 - cosine between the pooled, unit-length embeddings [B, D];
    - relational: mean squared difference between the batch's similarity matrices [B, B].
    """
    hidden = hidden_loss(student_hidden, teacher_hidden, mask_BL)
    embedding = (1 - (student_BD * teacher_BD).sum(-1)).mean()
    relational = (student_BD @ student_BD.T - teacher_BD @ teacher_BD.T).square().mean()
    total = hidden_weight * hidden + embedding_weight * embedding + relational_weight * relational
    return DistillationLoss(total, hidden, embedding, relational)
