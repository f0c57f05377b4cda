"""Distillation: what each divergence measures, layers that learn by themselves, and budgets that take turns."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from ffn2moe.losses import Divergence, logits_loss, most_to_learn, sinkhorn_distance, sinkhorn_plan

DIVERGENCES = get_args(Divergence)


def logits(count: int = 12, classes: int = 5, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


# --- divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_is_negative_and_each_is_smallest_where_the_student_is_the_teacher(divergence: Divergence):
    teacher = 20 * torch.eye(5)  # rows that no transport plan confuses
    same = logits_loss(teacher, teacher, None, divergence=divergence).item()
    assert same == pytest.approx(0, abs=1e-4)
    for seed in range(20):
        student = teacher + logits(5, seed=seed, spread=4.0)
        assert logits_loss(student, teacher, None, divergence=divergence).item() > same


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_has_a_finite_gradient_at_extreme_logits_too(divergence: Divergence):
    for spread in (1.0, 300.0):
        student = logits(spread=spread).requires_grad_(True)
        loss = logits_loss(student, logits(seed=1, spread=spread), None, divergence=divergence)
        loss.backward()
        assert student.grad is not None and torch.isfinite(student.grad).all()
        assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_learning_a_divergence_brings_the_student_to_the_teacher(divergence: Divergence):
    teacher, student = logits(seed=1, spread=2.0), logits(seed=2, spread=2.0).requires_grad_(True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    start = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean().item()
    for step in range(200):
        optimizer.zero_grad()
        logits_loss(student, teacher, None, divergence=divergence, progress=step / 200).backward()
        optimizer.step()
    assert (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean().item() < 0.15 * start


def test_balanced_kl_doubles_the_direction_that_moves_the_students_confidence_to_the_teachers():
    sure, unsure = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    sure_to_unsure = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)  # KL(sure || unsure)
    unsure_to_sure = 0.5 * math.log(5 / 9) + 0.5 * math.log(5)
    too_sure = logits_loss(sure.log()[None], unsure.log()[None], None, divergence="balanced_kl")
    assert too_sure.item() == pytest.approx((2 * unsure_to_sure + sure_to_unsure) / 3, abs=1e-6)
    too_unsure = logits_loss(unsure.log()[None], sure.log()[None], None, divergence="balanced_kl")
    assert too_unsure.item() == pytest.approx((2 * unsure_to_sure + sure_to_unsure) / 3, abs=1e-6)
    both = logits_loss(
        torch.stack([sure, unsure]).log(), torch.stack([unsure, sure]).log(), None, divergence="balanced_kl"
    )
    assert both.item() == pytest.approx((too_sure.item() + too_unsure.item()) / 2, abs=1e-6)  # sample by sample


def test_taids_target_moves_from_the_student_to_the_teacher_and_holds_the_student_fixed():
    student, teacher = logits(1, seed=1), logits(1, seed=2)
    for progress, share in ((0.0, 0.4), (0.5, 0.7), (1.0, 1.0)):
        target = ((1 - share) * student + share * teacher).softmax(-1)
        expected = (target * (target.log() - student.log_softmax(-1))).sum()
        found = logits_loss(student, teacher, None, divergence="taid", progress=progress)
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    free = student.clone().requires_grad_(True)
    logits_loss(free, teacher, None, divergence="taid", progress=0.0).backward()
    target = (0.6 * student + 0.4 * teacher).softmax(-1)
    assert torch.allclose(free.grad, student.softmax(-1) - target, atol=1e-6)  # of a KL to a constant


@pytest.mark.parametrize("spread", [0.1, 1.0, 50.0])
def test_a_transport_plan_has_uniform_marginals_and_no_negative_entry(spread: float):
    cost_TT = spread * torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    plan_TT = sinkhorn_plan(cost_TT, rounds=500)
    assert (plan_TT >= 0).all() and torch.isfinite(plan_TT).all()
    assert torch.allclose(plan_TT.sum(0), torch.full((9,), 1 / 9), atol=1e-6)
    assert torch.allclose(plan_TT.sum(1), torch.full((9,), 1 / 9), atol=2e-3)


def test_the_sinkhorn_distance_is_the_cost_of_the_cheapest_transport_when_the_rows_are_far_apart():
    teacher = 60 * torch.eye(4)  # one-hot at any temperature
    assert sinkhorn_distance(teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    assert sinkhorn_distance(teacher[[1, 2, 3, 0]], teacher).item() == pytest.approx(0, abs=1e-5)  # order is free
    student = teacher[[0, 1, 2, 2]]  # one of four has to go from class 2 to class 3, at ||e_2 - e_3||_1 = 2
    assert sinkhorn_distance(student, teacher).item() == pytest.approx(2 / 4, abs=1e-3)
    half = 2 * torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()  # temperature 2 gives 0.5 and 0.5 again
    assert sinkhorn_distance(half, 60 * torch.eye(2)).item() == pytest.approx(1.0, abs=1e-5)


def test_a_student_with_the_teachers_rows_in_another_order_is_not_done():
    teacher = 20 * torch.eye(4)
    assert logits_loss(teacher[[1, 2, 3, 0]], teacher, None, divergence="sinkhorn").item() > 1


# --- selective tokens -----------------------------------------------------------------------------


def test_the_tokens_learnt_from_are_those_where_the_student_is_farthest_from_the_teacher():
    teacher = logits(10)
    student = teacher.clone()
    student[[2, 5, 7]] += logits(3, seed=1, spread=3.0)
    assert most_to_learn(student, teacher, 0.3).tolist() == [2, 5, 7]
    assert len(most_to_learn(student, teacher, 0.001)) == 1


def test_a_share_of_the_tokens_is_a_share_of_those_that_count():
    teacher, student = logits(10).view(2, 5, 5), logits(10, seed=1).view(2, 5, 5).requires_grad_(True)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    loss = logits_loss(student, teacher, mask, divergence="forward_kl", token_share=0.5)
    loss.backward()
    learnt_BL = student.grad.abs().sum(-1) > 0
    assert learnt_BL.sum() == 4 and not (learnt_BL & (mask == 0)).any()
    each = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)[mask.bool()]
    assert loss.item() == pytest.approx(each.topk(4).values.mean().item(), abs=1e-6)
    whole = logits_loss(student, teacher, mask, divergence="forward_kl")
    assert whole.item() == pytest.approx(each.mean().item(), abs=1e-6)
