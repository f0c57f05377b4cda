"""Checks that every divergence must pass, whether the core holds it or the ablation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ffn2moe.distill.losses import logits_loss

Check = Callable[[str], None]


def logits(count: int = 12, classes: int = 5, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def smallest_where_the_student_is_the_teacher(divergence: str) -> None:
    teacher = 20 * torch.eye(5)  # rows that no transport plan confuses
    same = logits_loss(teacher, teacher, None, divergence=divergence).item()
    assert same == pytest.approx(0, abs=1e-4)
    for seed in range(20):
        student = teacher + logits(5, seed=seed, spread=4.0)
        assert logits_loss(student, teacher, None, divergence=divergence).item() > same


def finite_gradient_at_extreme_logits_too(divergence: str) -> None:
    for spread in (1.0, 300.0):
        student = logits(spread=spread).requires_grad_(True)
        loss = logits_loss(student, logits(seed=1, spread=spread), None, divergence=divergence)
        loss.backward()
        assert student.grad is not None and torch.isfinite(student.grad).all()
        assert student.grad.abs().sum() > 0


def learning_it_brings_the_student_to_the_teacher(divergence: str) -> None:
    teacher, student = logits(seed=1, spread=2.0), logits(seed=2, spread=2.0).requires_grad_(True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    start = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean().item()
    for step in range(200):
        optimizer.zero_grad()
        logits_loss(student, teacher, None, divergence=divergence, progress=step / 200).backward()
        optimizer.step()
    assert (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean().item() < 0.15 * start


CHECKS: tuple[Check, ...] = (
    smallest_where_the_student_is_the_teacher,
    finite_gradient_at_extreme_logits_too,
    learning_it_brings_the_student_to_the_teacher,
)
