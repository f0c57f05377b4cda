"""Time several things in turn, round by round.

What else a machine does falls on all of them alike, so ratios are taken within a round and reported as the median of
the rounds with its quartiles. The order is drawn anew for each round: none always comes after the same other one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

FEWEST_ROUNDS = 5  # however long they take: fewer have no quartiles to speak of
SHORTEST_SAMPLE = 0.02  # seconds; what is faster is run several times for one sample

# Runs one thing in a round of that number, and gives its seconds, by phase where it has several.
Sample = Callable[[int], Mapping[str, float]]
# Wraps the rounds while they are worked through: (what they time, rounds) -> rounds.
Track = Callable[[str, range], Iterator[int]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(frozen=True)
class Samples:
    """Seconds of each thing, round by round."""

    seconds: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def fastest(self, names: Iterable[str]) -> str:
        """The fastest of those that were timed; ValueError if none was."""
        return min((name for name in names if name in self.seconds), key=self.median)

    def speed(self, name: str, over: str) -> Spread:
        """How many times as fast as another thing: above 1 is faster."""
        return Spread.of([slow / fast for slow, fast in zip(self.seconds[over], self.seconds[name], strict=True)])


def race(
    things: Mapping[str, Sample],
    *,
    rounds: int,
    limit: float,
    label: str = "",
    track: Track = lambda _, rounds: iter(rounds),
    seed: int = 0,
) -> dict[str, Samples]:
    """Samples of every thing by phase: of `rounds` rounds, or of as many as fit in `limit` seconds, but 5 at least."""
    if rounds < FEWEST_ROUNDS:
        raise ValueError(f"{rounds} rounds have no quartiles: ask for {FEWEST_ROUNDS} or more")
    order = random.Random(seed)
    found: dict[str, dict[str, list[float]]] = {}
    start = time.perf_counter()
    for index in track(label, range(rounds)):
        for name in order.sample(list(things), len(things)):
            for phase, seconds in things[name](index).items():
                found.setdefault(phase, {}).setdefault(name, []).append(seconds)
        if index + 1 >= FEWEST_ROUNDS and time.perf_counter() - start > limit:
            break
    return {phase: Samples(seconds) for phase, seconds in found.items()}


def stopwatch(call: Callable[[int], object], phase: str = "whole") -> Sample:
    """A sample of `call`, which takes the number of the round: the mean of as many calls as make a sample long enough.

    It has been called before, so that the first sample is like the others; and once more before several, as another
    thing's numbers are in the cache then.
    """
    call(0)
    start = time.perf_counter()
    call(0)
    calls = max(1, int(SHORTEST_SAMPLE / max(time.perf_counter() - start, 1e-9)))

    def sample(index: int) -> dict[str, float]:
        if calls > 1:
            call(index)
        start = time.perf_counter()
        for _ in range(calls):
            call(index)
        return {phase: (time.perf_counter() - start) / calls}

    return sample
