"""What the student is trained on.

Where `ranks` is more than one process, tensors are those of this process's texts and a loss is its share: the shares of
all processes add up to the loss of the whole batch, in value and in gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.data.ranks import ALONE, Ranks

Divergence = Literal["forward_kl", "reverse_kl", "js", "balanced_kl", "taid", "sinkhorn"]
TAID_START = 0.4  # share of the teacher in the first target
SINKHORN_TEMPERATURE = 2.0
SINKHORN_WEIGHT = 0.8  # beside the forward KL


def hidden_loss(
    student_hidden: tuple[Tensor, ...],
    teacher_hidden: tuple[Tensor, ...],
    mask_BL: Tensor | None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Squared error of each layer's hidden states [B, L, D] relative to their energy, summed over layers."""
    errors, wholes = [], []
    for student_BLD, teacher_BLD in zip(student_hidden, teacher_hidden, strict=True):
        # mse_loss makes one pass each way, where a difference and its square make several.
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


def _mean(values: Tensor, ranks: Ranks) -> Tensor:
    """This process's share of the mean over all processes."""
    return values.sum() / ranks.total(values.numel())


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    divergence: Divergence,
    progress: float = 0.0,
    token_share: float = 1.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """How far the student's distribution is from the teacher's: nats, mean over the positions that count.

    Logits are [..., V], the mask [...] or None. With t the teacher's and s the student's distribution:

    - `forward_kl`: KL(t || s); `reverse_kl`: KL(s || t); `js`: the Jensen-Shannon divergence.
    - `balanced_kl` (BD-KD, arXiv 2212.12965): both directions, weighed anew at each position by who is surer. Where
      the student's entropy is below the teacher's, KL(t || s) counts double, which spreads the student out; elsewhere
      KL(s || t) does, which sharpens it. The weights 2 and 1, over 3, are this project's.
    - `taid` (arXiv 2501.16937): the forward KL to a target between the two, ``softmax((1 - a) z_s + a z_t)`` of the
      logits with the student's held fixed, a rising linearly with `progress` from 0.4 to 1: a nearer goal while the
      student is far off. The paper raises a further, by ``5e-4 (1 - a) sigmoid(momentum of the loss's relative
      fall)`` a step, where that is ahead of the line; it never is in runs of fewer than 2,000 steps, and is left out.
    - `sinkhorn` (SinKD, arXiv 2402.17110): the forward KL plus 0.8 times the `sinkhorn_distance` of the whole batch.
      The KL is a part of it, here as in the paper: a student whose rows are the teacher's in another order is at no
      distance. For classifiers: positions are compared each with each, and so are all V entries.

    With `token_share` < 1 only that share of the positions counts, those that `most_to_learn` names.
    """
    if mask is not None:
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    s, t = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    if token_share < 1:
        chosen_T = most_to_learn(s, t, token_share, ranks)
        s, t = s[chosen_T], t[chosen_T]
    if divergence == "taid":
        share = TAID_START + (1 - TAID_START) * progress
        t = (1 - share) * s.detach() + share * t
    s_log, t_log = s.log_softmax(-1), t.log_softmax(-1)
    if divergence == "reverse_kl":
        return _mean(_kl(s_log, t_log), ranks)
    if divergence == "js":
        middle = torch.logaddexp(s_log, t_log) - log(2)
        return _mean(_kl(s_log, middle) + _kl(t_log, middle), ranks) / 2
    if divergence == "balanced_kl":
        surer_T = _entropy(s_log) < _entropy(t_log)
        forward_T, reverse_T = _kl(t_log, s_log), _kl(s_log, t_log)
        return _mean(forward_T + reverse_T + torch.where(surer_T, forward_T, reverse_T), ranks) / 3
    if divergence == "sinkhorn":
        whole = sinkhorn_distance(ranks.gather(s), ranks.gather(t))
        return _mean(_kl(t_log, s_log), ranks) + SINKHORN_WEIGHT * whole / ranks.size
    return _mean(_kl(t_log, s_log), ranks)


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p || q) of each row, [T]."""
    return F.kl_div(q_log, p_log, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def _entropy(p_log: Tensor) -> Tensor:
    return -(p_log.exp() * p_log).sum(-1)


@torch.no_grad()
def most_to_learn(student_TV: Tensor, teacher_TV: Tensor, share: float, ranks: Ranks = ALONE) -> Tensor:
    """The positions, in order, of the given share of T that have the most left to learn; at least one.

    Of several processes together: each gets the positions that are its own, which may be none.

    AdaSPEC (arXiv 2510.19779) ranks positions by the student's loss less that of a reference, so that what is hard for
    the reference too is not insisted on. Its reference is a second student, distilled before. Here it is the teacher: a
    mixture starts as its teacher's own weights and not 64 times smaller, so that no position is out of reach, and a
    reference costs another distillation. (The student as it was at the start would be the wrong one: it asks for what
    has been learnt least so far, which is what AdaSPEC avoids.) The gap is taken in expectation over what the teacher
    says next, which is KL(teacher || student), whatever divergence is then learnt from.
    """
    gap_T = _kl(teacher_TV.log_softmax(-1), student_TV.log_softmax(-1))
    place, total = ranks.place(len(gap_T))
    chosen_T = ranks.gather(gap_T).topk(max(1, round(share * total))).indices.sort().values
    return chosen_T[(chosen_T >= place.start) & (chosen_T < place.stop)] - place.start


def sinkhorn_distance(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """What it costs to carry the student's T distributions over to the teacher's T (SinKD, arXiv 2402.17110).

    The cost of a pair is ``C_ij = ||softmax(z_s^i / 2) - softmax(z_t^j / 2)||_1``, and the plan is `sinkhorn_plan`'s.
    Between 0 and 2, mean over the batch (the paper's code sums). For the teacher itself it is 0 as far as its rows are
    apart; rows nearer to each other than the plan's blur are carried to one another, and leave a little.
    """
    student, teacher = ((z / SINKHORN_TEMPERATURE).softmax(-1) for z in (student_TV, teacher_TV))
    cost_TT = torch.cdist(student, teacher, p=1)
    return (sinkhorn_plan(cost_TT) * cost_TT).sum()


def sinkhorn_plan(cost_TT: Tensor, blur: float = 0.1, rounds: int = 20) -> Tensor:
    """The transport plan between two uniform measures that entropy blurs, [T, T]: rows and columns sum to 1 / T.

    ``exp(-C / blur)`` with rows and columns normalised in turn, `rounds` times; in logarithms, so nothing underflows.
    The columns come last, so theirs are exact, and the rows as near as the rounds have brought them.
    """
    plan_TT = -cost_TT / blur
    for _ in range(rounds):
        plan_TT = plan_TT.log_softmax(1)
        plan_TT = plan_TT.log_softmax(0)
    return plan_TT.exp() / len(cost_TT)


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
    """How far the student is from the teacher on one batch.

    - hidden: squared error of each layer's hidden states [B, L, D] relative to their energy, over real tokens,
      summed over layers;
    - embedding: mean of 1 - cosine between the pooled, unit-length embeddings [B, D];
    - relational: mean squared difference between the batch's similarity matrices [B, B].
    """
    hidden = hidden_loss(student_hidden, teacher_hidden, mask_BL, ranks)
    embedding = _mean(1 - (student_BD * teacher_BD).sum(-1), ranks)
    student_BD, teacher_BD = ranks.gather(student_BD), ranks.gather(teacher_BD)  # each text with every other
    relational = (student_BD @ student_BD.T - teacher_BD @ teacher_BD.T).square().mean() / ranks.size
    total = hidden_weight * hidden + embedding_weight * embedding + relational_weight * relational
    return DistillationLoss(total, hidden, embedding, relational)
