"""The loss of each problem: zero for a right student, a gradient for a wrong one, and the sum of its parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ffn2moe.choices import PROBLEMS
from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.losses import EQUAL_TEACHERS, logits_loss
from tests.test_problems import logits


def loss_of(
    problem: str, student_NC: torch.Tensor, teacher_NC: torch.Tensor, divergence: str = "forward_kl"
) -> torch.Tensor:
    return logits_loss(student_NC, teacher_NC, None, divergence=divergence, problem=problem)


@pytest.mark.parametrize("problem", PROBLEMS.names())
def test_a_right_student_has_no_loss_and_a_constant_one_learns(problem):
    teacher_NC = logits(problem).float()
    assert loss_of(problem, teacher_NC, teacher_NC).item() == pytest.approx(0, abs=1e-6)
    constant_NC = torch.zeros_like(teacher_NC, requires_grad=True)
    loss = loss_of(problem, constant_NC, teacher_NC)
    loss.backward()
    assert loss.item() > 0.1 and constant_NC.grad is not None
    assert (constant_NC.grad.abs().amax(1) > 0).all(), "every text teaches"


def test_labels_that_do_not_exclude_each_other_are_learned_one_by_one():
    teacher_NC, student_NC = (
        logits("multi_label").float(),
        torch.randn(400, 4, generator=torch.Generator().manual_seed(5)),
    )
    p, q = teacher_NC.sigmoid(), student_NC.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    assert loss_of("multi_label", student_NC, teacher_NC).item() == pytest.approx(expected.item(), rel=1e-4)
    reverse = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum(1).mean()
    found = loss_of("multi_label", student_NC, teacher_NC, "reverse_kl").item()
    assert found == pytest.approx(reverse.item(), rel=1e-4)


def test_values_are_learned_in_units_of_their_own_spread():
    teacher_NC = logits("regression").float()
    student_NC = teacher_NC + 0.1 * torch.randn(400, 2, generator=torch.Generator().manual_seed(5))
    whole_C = teacher_NC.var(0, correction=0) + EQUAL_TEACHERS * teacher_NC.square().mean(0)
    expected = (F.mse_loss(student_NC, teacher_NC, reduction="none").mean(0) / whole_C).mean()
    for scale in (1.0, 1000.0):
        found = loss_of("regression", scale * student_NC, scale * teacher_NC)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("problem", ["regression", "one_label"])
def test_a_batch_of_one_text_or_of_equal_values_has_a_finite_loss(problem):
    for teacher_NC in (torch.tensor([[3.0]]), torch.full((4, 1), 3.0), torch.zeros(4, 1)):
        assert torch.isfinite(loss_of(problem, teacher_NC + 0.1, teacher_NC))


def test_a_reranker_learns_the_order_where_a_sigmoid_is_flat():
    teacher_NC = torch.tensor([[-11.0], [-9.0], [-10.0]])
    student_NC = torch.full((3, 1), -10.0, requires_grad=True)
    loss_of("one_label", student_NC, teacher_NC).backward()
    assert student_NC.grad is not None and student_NC.grad.abs().max() > 0.1


@pytest.mark.parametrize("problem", PROBLEMS.names())
def test_the_parts_of_several_processes_add_up_to_the_loss_of_the_batch(problem):
    teacher_NC = logits(problem).float()
    student_NC = teacher_NC + torch.randn(teacher_NC.shape, generator=torch.Generator().manual_seed(7))
    sums = torch.stack([teacher_NC.sum(0), teacher_NC.square().sum(0)])

    class Two(Ranks):
        """What each of two processes gets from the other: the sums over both."""

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            assert tensor.shape == sums.shape
            return sums

        def total(self, count: int) -> int:
            return count * len(teacher_NC) // part

    total = 0.0
    for rows in (slice(0, 100), slice(100, 400)):
        part = len(teacher_NC[rows])
        loss = logits_loss(
            student_NC[rows], teacher_NC[rows], None, divergence="forward_kl", problem=problem, ranks=Two(size=2)
        )
        total += loss.item()
    assert total == pytest.approx(loss_of(problem, student_NC, teacher_NC).item(), rel=1e-4)
