"""Score the answers of a language model: which are right, and how much of a teacher's a student keeps.

N counts questions, R rounds of resampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ffn2moe.judges.items import Item
from ffn2moe.metrics import Interval
from ffn2moe.table import Table

TIED = 1e-9  # nats between answers that are equally probable: the rounding of a sum
CERTAIN = 1.96  # standard errors that a teacher must be above chance, or nothing can be kept


@dataclass(frozen=True)
class Figure:
    """An accuracy: its name for people, and what the log-likelihood of an answer is divided by."""

    label: str
    divisor: Callable[[str], float]


FIGURES: Table[Figure] = Table("figure")
FIGURES.register("accuracy", Figure("accuracy", lambda choice: 1.0))
FIGURES.register("accuracy_normalised", Figure("normalised", lambda choice: float(len(choice))))  # by characters


def right(items: Sequence[Item], nats_A: Tensor, figure: str) -> Tensor:
    """Return the share of each question that is right, [N] float64, from the log-likelihoods of all answers in a row.

    The most probable answer is chosen. Where several are, each is chosen with the same probability, so that a model
    that finds all answers alike is at chance.
    """
    divisor, found = FIGURES[figure].divisor, []
    parts = nats_A.split([len(item.choices) for item in items])
    for item, nats_C in zip(items, parts, strict=True):
        score_C = nats_C / torch.tensor([divisor(choice) for choice in item.choices], dtype=torch.float64)
        best_C = score_C >= score_C.max() - TIED
        found.append(best_C[item.label].double() / best_C.sum())
    return torch.stack(found)


def by_group(items: Sequence[Item], right_N: Tensor) -> dict[str, float]:
    """Return the accuracy of each kind of question, where the items name kinds."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if item.group is not None:
            places.setdefault(item.group, []).append(place)
    return {group: right_N[found].mean().item() for group, found in sorted(places.items())}


def standard_error(right_N: Tensor) -> float:
    """Return the standard error of an accuracy; 0 for a single question."""
    return (right_N.std() / len(right_N) ** 0.5).item() if len(right_N) > 1 else 0.0


@dataclass(frozen=True)
class Compared:
    """The same questions, answered by a student and its teacher, and the chance to guess each."""

    student_N: np.ndarray
    teacher_N: np.ndarray
    chance_N: np.ndarray

    @classmethod
    def of(cls, items: Sequence[Item], student_N: Tensor, teacher_N: Tensor) -> Compared:
        """Return what is compared."""
        return cls(student_N.numpy(), teacher_N.numpy(), np.array([item.chance for item in items]))

    @property
    def known(self) -> bool:
        """Whether the teacher is above chance beyond the noise: else there is nothing to keep."""
        above_N = torch.from_numpy(self.teacher_N - self.chance_N)
        return above_N.mean().item() > CERTAIN * standard_error(above_N)

    def kept(self, index_N: np.ndarray | slice = slice(None)) -> float:
        """Return the student's accuracy above chance over the teacher's, for some of the questions; may be below 0."""
        student, teacher, chance = (one[index_N].mean() for one in (self.student_N, self.teacher_N, self.chance_N))
        return float((student - chance) / (teacher - chance)) if teacher != chance else float("nan")


def kept(tasks: Sequence[Compared]) -> float:
    """Return the mean over tasks of what the student keeps of its teacher's accuracy above chance."""
    return float(np.mean([task.kept() for task in tasks]))


def kept_interval(tasks: Sequence[Compared], *, rounds: int = 1000, seed: int = 0) -> Interval:
    """Return the 95 % interval of `kept`, by a bootstrap over the questions of each task.

    Student and teacher are resampled together, so that questions that are hard for both cancel.
    """
    generator = np.random.default_rng(seed)
    sizes = [len(task.student_N) for task in tasks]
    kept_R = [
        np.mean([task.kept(generator.integers(0, size, size)) for task, size in zip(tasks, sizes, strict=True)])
        for _ in range(rounds)
    ]
    low, high = np.nanpercentile(kept_R, [2.5, 97.5])
    return Interval(float(low), float(high))
