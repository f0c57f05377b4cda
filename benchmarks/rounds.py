"""What was timed in turn within rounds, compared: whatever else the machine does falls on all that a round holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Ratio:
    """The middle of ratios taken within rounds, and between which values half of them lie."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Of the values of two sequences, round by round. ValueError where there is no round."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    if not each:
        raise ValueError("nothing was timed: ask for at least one round")
    low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each[0],) * 3
    return Ratio(median(each), low, high)


def in_turn(
    works: Mapping[str, Callable[[], dict[str, float]]], rounds: int, warm_up: int = 2
) -> dict[str, list[dict[str, float]]]:
    """Do every work in each round, each time from another one on; what each of them told of each round.

    The first `warm_up` rounds are not counted: what is done for the first time also allocates and compiles.
    """
    names = list(works)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            told = works[name]()
            if index >= warm_up:
                found[name].append(told)
    return found
