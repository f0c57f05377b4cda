"""The terms of the distillation loss.

If `ranks` is more than one process, the tensors belong to this process's texts and a loss is its part: the parts of all
processes add up to the loss of the whole batch, in value and in gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.data.ranks import ALONE, Ranks
from ffn2moe.distill.divergences import DIVERGENCES
from ffn2moe.distill.divergences._kl import share_of_mean
from ffn2moe.table import Table


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
    problem: str = "single_label",
    progress: float = 0.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return the distance of the student's logits from the teacher's, the mean over the positions that count.

    Logits are [..., V], the mask [...] or None. `problem` says what they mean (`ffn2moe.choices.PROBLEMS`; tokens of a
    vocabulary exclude each other):

    - single_label: the divergence of the distributions over V, in nats;
    - multi_label: that of each label from its own complement, summed over the labels, which are independent;
    - regression, one_label: the squared error over the teacher's variance in the batch, the mean over the V values. A
      reranker orders texts by its logits, and where a sigmoid is near 0 or 1 its divergence no longer sees the order.

    `divergence` names a row of `DIVERGENCES`; ValueError if it has none.
    """
    row = DIVERGENCES[divergence]
    if mask is not None:
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    student, teacher = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    return _LOSSES[problem](student, teacher, lambda one, other: row.loss(one, other, progress, ranks), ranks)


# (student [T, V], teacher [T, V], the divergence of logits, the processes) -> loss
_Loss = Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor], Ranks], Tensor]
_LOSSES: Table[_Loss] = Table("problem")
EQUAL_TEACHERS = 0.01  # share of the mean square that counts as variance: a batch may hold one text, or equal ones


def _of_labels(student_TV: Tensor, teacher_TV: Tensor, divergence: Any, ranks: Ranks) -> Tensor:
    pairs = [torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1) for logits in (student_TV, teacher_TV)]
    loss: Tensor = divergence(*pairs) * student_TV.shape[1]
    return loss


def _of_values(student_TV: Tensor, teacher_TV: Tensor, divergence: Any, ranks: Ranks) -> Tensor:
    error_V = (student_TV - teacher_TV).square().sum(0)
    sums_V, squares_V = ranks.sum(torch.stack([teacher_TV.sum(0), teacher_TV.square().sum(0)]))
    whole_V = squares_V - sums_V.square() / ranks.total(len(teacher_TV)) + EQUAL_TEACHERS * squares_V
    return (error_V / whole_V.clamp(min=1e-12)).mean()


_LOSSES.register("single_label", lambda student, teacher, divergence, ranks: divergence(student, teacher))
_LOSSES.register("multi_label", _of_labels)
_LOSSES.register("regression", _of_values)
_LOSSES.register("one_label", _of_values)


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
