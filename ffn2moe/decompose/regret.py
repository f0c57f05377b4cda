"""The error to expect when the router's scores draw the experts: 0 for the best choice, 1 for a blind one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffn2moe.decompose import oracle
from ffn2moe.decompose.evidence import Loss, Survey

if TYPE_CHECKING:
    from ffn2moe.moe.layer import MoEFFN

BISECTIONS = 30  # for the shift that makes independent draws K on average
TINY = torch.finfo(torch.float32).tiny


def enumerated_regret(error_RC: Tensor, indicator_CE: Tensor) -> Loss:
    """Return the expected regret of C choices with known errors, [R, C]; a choice's logit is the sum of its scores."""
    regret_RC = error_RC - error_RC.amin(1, keepdim=True)
    regret_RC = regret_RC / regret_RC.mean().clamp(min=TINY)

    def loss(scores_BE: Tensor, rows: Tensor) -> Tensor:
        p_BC = (scores_BE @ indicator_CE.T).softmax(-1)
        return (p_BC * regret_RC[rows]).sum(-1).mean()

    return loss


def independent_regret(moe: MoEFFN, survey: Survey, *, together: bool = False) -> Loss:
    """Return the expected regret where experts are drawn independently with ``p_i = sigmoid(s_i + t)``.

    The expectation of ``||y - a y_S||^2`` is ``1'G1 - 2a 1'Gp + a^2 (p'Gp + sum_i G_ii p_i (1 - p_i))``; a is the best
    scale for the best choice. `together` is that of `draw_probabilities`.
    """
    gram_REE, K, E = survey.grams.gram_REE, moe.num_active, moe.num_experts
    scale = oracle.fit_scale(survey.grams, survey.chosen_TE).scale
    blind = independent_error(gram_REE, torch.full_like(survey.chosen_TE, K / E), scale).mean()
    least = independent_error(gram_REE, survey.chosen_TE, scale).mean()
    unit = (blind - least).clamp(min=1e-6 * gram_REE.sum((1, 2)).mean().item() + TINY)  # with K = E both are alike

    def loss(scores_BE: Tensor, rows: Tensor) -> Tensor:
        p_BE = draw_probabilities(scores_BE, K, together=together)
        return (independent_error(gram_REE[rows], p_BE, scale).mean() - least) / unit

    return loss


def independent_error(gram_REE: Tensor, p_RE: Tensor, scale: float) -> Tensor:
    """Return the expected ``||y - scale y_S||^2`` where each expert is in S with its own probability, [R]."""
    mixed_RE = (gram_REE @ p_RE.unsqueeze(2)).squeeze(2) + gram_REE.diagonal(dim1=1, dim2=2) * (1 - p_RE)
    return gram_REE.sum((1, 2)) - 2 * scale * (gram_REE.sum(1) * p_RE).sum(1) + scale**2 * (mixed_RE * p_RE).sum(1)


def draw_probabilities(scores_RE: Tensor, num_active: int, *, together: bool = False) -> Tensor:
    """Return ``sigmoid(s_i + t)``, [R, E], with t such that the probabilities of a row add up to K.

    `together`: one t for scores about the highest of each row, and K is the mean over rows. The gradient keeps the sum
    at K, by the implicit function theorem.
    """
    rows, wanted = scores_RE, num_active
    if together:
        rows = (scores_RE - scores_RE.amax(1, keepdim=True)).flatten().unsqueeze(0)
        wanted = num_active * len(scores_RE)
    with torch.no_grad():
        low, high = -rows.amax(1, keepdim=True) - 30, 30 - rows.amin(1, keepdim=True)
        for _ in range(BISECTIONS):
            shift = (low + high) / 2
            many = (rows + shift).sigmoid().sum(1, keepdim=True) > wanted
            low, high = torch.where(many, low, shift), torch.where(many, shift, high)
        p = (rows + shift).sigmoid()
        slope = (p * (1 - p)).sum(1, keepdim=True).clamp(min=TINY)
    moved = (rows + shift).sigmoid().sum(1, keepdim=True)
    shift = shift - (moved - moved.detach()) / slope
    return (rows + shift).sigmoid().view_as(scores_RE)
