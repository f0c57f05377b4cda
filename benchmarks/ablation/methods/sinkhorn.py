"""Sinkhorn distance of a classifier's logits (SinKD, arXiv 2402.17110), beside the forward KL.

The KL is a part of it, here as in the paper: a student whose rows are the teacher's in another order is at no Sinkhorn
distance. It is for classifiers: it compares every position with every other, and all V entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.divergences import DIVERGENCES, Divergence
from ffn2moe.distill.divergences._kl import forward_kl

TEMPERATURE = 2.0
WEIGHT = 0.8  # beside the forward KL


def loss(student_TV: Tensor, teacher_TV: Tensor, progress: float, ranks: Ranks) -> Tensor:
    """Return the forward KL plus 0.8 times the `sinkhorn_distance` of the whole batch; logits are [T, V]."""
    whole = sinkhorn_distance(ranks.gather(student_TV), ranks.gather(teacher_TV))
    return forward_kl(student_TV, teacher_TV, ranks) + WEIGHT * whole / ranks.size


def sinkhorn_distance(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Return the cost of moving the student's T distributions to the teacher's T; 0 to 2, mean over the batch.

    The cost of a pair is ``C_ij = ||softmax(z_s^i / 2) - softmax(z_t^j / 2)||_1``, and the plan is `sinkhorn_plan`'s.
    (The paper's code sums over the batch.) For the teacher itself it is 0 if its rows are far apart. Rows nearer to
    each other than the plan's blur exchange mass, and leave a little.
    """
    student, teacher = ((z / TEMPERATURE).softmax(-1) for z in (student_TV, teacher_TV))
    cost_TT = torch.cdist(student, teacher, p=1)
    return (sinkhorn_plan(cost_TT) * cost_TT).sum()


def sinkhorn_plan(cost_TT: Tensor, blur: float = 0.1, rounds: int = 20) -> Tensor:
    """Return the transport plan between two uniform measures, blurred by entropy, [T, T]: rows and columns sum to 1/T.

    It normalises rows and columns of ``exp(-C / blur)`` in turn, `rounds` times, in logarithms so that nothing
    underflows. Columns come last, so their sums are exact; the rows' are as near as the rounds bring them.
    """
    plan_TT = -cost_TT / blur
    for _ in range(rounds):
        plan_TT = plan_TT.log_softmax(1)
        plan_TT = plan_TT.log_softmax(0)
    return plan_TT.exp() / len(cost_TT)


DIVERGENCES.register("sinkhorn", Divergence(loss, "SinKD, arXiv 2402.17110", heads=("classification",)))
