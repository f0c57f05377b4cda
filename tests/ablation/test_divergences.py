"""The divergences that lost: each still measures what its paper says, and stays in its table by name."""

from __future__ import annotations

import math

import pytest
import torch

import benchmarks.ablation.methods  # noqa: F401
from benchmarks.ablation.methods.selected_tokens import most_to_learn
from benchmarks.ablation.methods.sinkhorn import sinkhorn_distance, sinkhorn_plan
from ffn2moe.distill.losses import logits_loss
from ffn2moe.distill.objectives import LossWeights, objective_for
from tests.divergences import CHECKS, Check, logits


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("divergence", ["balanced_kl", "js", "sinkhorn"])
def test_every_divergence_can_be_learnt(divergence: str, check: Check):
    check(divergence)


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
    loss = logits_loss(student, teacher, mask, divergence="selected_tokens")
    loss.backward()
    learnt_BL = student.grad.abs().sum(-1) > 0
    assert learnt_BL.sum() == 4 and not (learnt_BL & (mask == 0)).any()
    each = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)[mask.bool()]
    assert loss.item() == pytest.approx(each.topk(4).values.mean().item(), abs=1e-6)
    whole = logits_loss(student, teacher, mask, divergence="forward_kl")
    assert whole.item() == pytest.approx(each.mean().item(), abs=1e-6)


def test_a_divergence_is_refused_for_logits_that_it_does_not_fit():
    weights = LossWeights(divergence="sinkhorn")
    with pytest.raises(ValueError, match=r"'sinkhorn' compares logits of the heads classification, .* is causal: use"):
        objective_for("causal", weights)
    with pytest.raises(ValueError, match=r"is classification: use one of .*, forward_kl, "):
        objective_for("classification", LossWeights(divergence="selected_tokens"), problem="single_label")
    assert objective_for("classification", weights, problem="single_label").terms == ("logits", "hidden")
