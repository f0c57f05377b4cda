"""The terms of the distillation loss.

If `ranks` is more than one process, the tensors belong to this process's texts and a loss is its part: the parts of all
processes add up to the loss of the whole batch, in value and in gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.data.ranks import ALONE, Ranks
from ffn2moe.distill.divergences import DIVERGENCES
from ffn2moe.distill.divergences._kl import share_of_mean


def hidden_loss(
    student_hidden: tuple[Tensor, ...],
    teacher_hidden: tuple[Tensor, ...],
    mask_BL: Tensor | None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return the squared error of each layer's hidden states [B, L, D] over their energy, summed over the layers."""
    errors, wholes = [], []
    for student_BLD, teacher_BLD in zip(student_hidden, teacher_hidden, strict=True):
        # mse_loss makes one pass each way; a difference and its square make several.
        error_BL = F.mse_loss(student_BLD.float(), teacher_BLD.float(), reduction="none").sum(-1)
        whole_BL = teacher_BLD.float().square().sum(-1)
        if mask_BL is not None:
            error_BL, whole_BL = error_BL * mask_BL, whole_BL * mask_BL
        errors.append(error_BL.sum())
        wholes.append(whole_BL.sum())
    total = student_hidden[0].new_zeros((), dtype=torch.float32)
    for error, whole in zip(errors, ranks.sum(torch.stack(wholes)), strict=True):
        total = total + error / whole
    return total


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    divergence: str,
    progress: float = 0.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return the divergence of the student's distribution from the teacher's: nats, mean over the positions that count.

    Logits are [..., V], the mask [...] or None. `divergence` names a row of `DIVERGENCES`; ValueError if it has none.
    """
    row = DIVERGENCES[divergence]
    if mask is not None:
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    return row.loss(student.float().flatten(0, -2), teacher.float().flatten(0, -2), progress, ranks)


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
    ranks: Ranks = ALONE,
) -> DistillationLoss:
    """Return the distance of an encoder student from its teacher on one batch.

    - hidden: squared error of each layer's hidden states [B, L, D] relative to their energy, over real tokens,
      summed over layers;
    - embedding: mean of 1 - cosine between the pooled, unit-length embeddings [B, D];
    - relational: mean squared difference between the batch's similarity matrices [B, B].
    """
    hidden = hidden_loss(student_hidden, teacher_hidden, mask_BL, ranks)
    embedding = share_of_mean(1 - (student_BD * teacher_BD).sum(-1), ranks)
    student_BD, teacher_BD = ranks.gather(student_BD), ranks.gather(teacher_BD)  # each text with every other
    relational = (student_BD @ student_BD.T - teacher_BD @ teacher_BD.T).square().mean() / ranks.size
    total = hidden_weight * hidden + embedding_weight * embedding + relational_weight * relational
    return DistillationLoss(total, hidden, embedding, relational)
