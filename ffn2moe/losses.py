"""What the router and the student are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_target(gain_TE: Tensor, num_active: int, iterations: int = 40) -> Tensor:
    """The router's target ``q = softmax(gain / tau)``, [T, E], with tau such that the mean entropy is log K.

    K equally good experts have entropy log K, so that is as sharp as a target for a choice of K can be. For
    K = 1 the target is the one-hot best expert.
    """
    if num_active == 1:
        return F.one_hot(gain_TE.argmax(-1), gain_TE.shape[-1]).to(gain_TE)
    wanted = log(min(num_active, gain_TE.shape[-1]))
    spread = gain_TE.std().clamp(min=torch.finfo(gain_TE.dtype).tiny)
    low, high = -20.0, 20.0  # log2 of tau in units of the spread; the entropy rises with tau
    for _ in range(iterations):
        middle = (low + high) / 2
        q_TE = (gain_TE / (spread * 2**middle)).softmax(-1)
        entropy = -(q_TE * q_TE.clamp(min=1e-30).log()).sum(-1).mean()
        low, high = (middle, high) if entropy < wanted else (low, middle)
    return (gain_TE / (spread * 2**high)).softmax(-1)


def router_loss(scores_TE: Tensor, target_TE: Tensor) -> Tensor:
    """Repaired Prior-Approximate loss: forward ``KL(target || softmax(scores))``, mean over tokens.

    FactorLLM's loss (arXiv 2408.11855) is the reverse KL to a K-hot label; see docs/methods.md for what
    was repaired and why.
    """
    return F.kl_div(scores_TE.log_softmax(-1), target_TE, reduction="batchmean")


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
    mask_BL1 = mask_BL.unsqueeze(-1)
    hidden = student_BD.new_zeros(())
    for student_BLD, teacher_BLD in zip(student_hidden, teacher_hidden, strict=True):
        error = (student_BLD.float() - teacher_BLD.float()) * mask_BL1
        hidden = hidden + error.square().sum() / (teacher_BLD.float() * mask_BL1).square().sum()
    embedding = (1 - (student_BD * teacher_BD).sum(-1)).mean()
    relational = (student_BD @ student_BD.T - teacher_BD @ teacher_BD.T).square().mean()
    total = hidden_weight * hidden + embedding_weight * embedding + relational_weight * relational
    return DistillationLoss(total, hidden, embedding, relational)
