"""Time several things in turn, round by round.

Other work on the machine slows all of them alike, so ratios are taken within a round and reported as the median of the
rounds with its quartiles. Each round draws its own order: no entry always runs after the same other one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

FEWEST_ROUNDS = 5  # fewer rounds have no useful quartiles
SHORTEST_SAMPLE = 0.02  # seconds; a faster entry runs several times for one sample

# Runs an entry in the round of that number. Returns figures, mostly seconds, by phase.
Sample = Callable[[int], Mapping[str, float]]
# Wraps the rounds of a race to show progress: (label, rounds) -> rounds.
Track = Callable[[str, range], Iterator[int]]


@dataclass(frozen=True)
class Spread:
    """Hold a median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values. ValueError if there is none."""
        if not values:
            raise ValueError("nothing was timed: ask for at least one round")
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(median(values), low, high)

    @classmethod
    def between(cls, over: Sequence[float], under: Sequence[float]) -> Spread:
        """Return the spread of the ratios of two sequences, round by round."""
        return cls.of([a / b for a, b in zip(over, under, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Hold one plan of a race. `speed` is over the best dense plan, with the quartiles of the rounds."""

    plan: str
    milliseconds: float
    speed: float
    low: float
    high: float
    best_dense: str
    rounds: int

    @property
    def spread(self) -> Spread:
        """Return the speed with its quartiles."""
        return Spread(self.speed, self.low, self.high)


@dataclass(frozen=True)
class Samples:
    """Hold the seconds of each entry, round by round."""

    seconds: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        """Return the number of rounds."""
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        """Return the median seconds of an entry."""
        return median(self.seconds[name])

    def fastest(self, names: Iterable[str]) -> str:
        """Return the fastest of these entries; ValueError if none of them was timed."""
        return min((name for name in names if name in self.seconds), key=self.median)

    def speed(self, name: str, over: str) -> Spread:
        """Return how many times as fast as another entry this one is: above 1 is faster."""
        return Spread.between(self.seconds[over], self.seconds[name])

    def compared(self, name: str, best: str, runs: int = 1) -> dict[str, Any]:
        """Return the values of `Compared` for an entry; a sample of it is `runs` runs."""
        speed = self.speed(name, best)
        figures = {"milliseconds": 1000 * self.median(name) / runs, "speed": speed.median}
        figures |= {"low": speed.low, "high": speed.high}
        rounded = {key: round(value, 4) for key, value in figures.items()}
        return {"plan": name, "best_dense": best, "rounds": self.rounds, **rounded}


def race(
    entries: Mapping[str, Sample],
    *,
    rounds: int,
    limit: float = math.inf,
    fewest: int = FEWEST_ROUNDS,
    warm_up: int = 0,
    label: str = "",
    track: Track = lambda _, rounds: iter(rounds),
) -> dict[str, Samples]:
    """Return the samples of every entry by phase.

    The race has `rounds` rounds, or as many as fit in `limit` seconds, but at least `fewest`. The first `warm_up`
    rounds, which also allocate and compile, come before and do not count.
    """
    if rounds < fewest:
        quartiles = "have no quartiles" if fewest > 1 else "time nothing"
        raise ValueError(f"{rounds} rounds {quartiles}: ask for {fewest} or more")
    order = random.Random(0)
    found: dict[str, dict[str, list[float]]] = {}
    start = time.perf_counter()
    for index in track(label, range(-warm_up, rounds)):
        for name in order.sample(list(entries), len(entries)):
            for phase, figure in entries[name](index).items():
                if index >= 0:
                    found.setdefault(phase, {}).setdefault(name, []).append(figure)
        if index + 1 >= fewest and time.perf_counter() - start > limit:
            break
    return {phase: Samples(figures) for phase, figures in found.items()}


def stopwatch(call: Callable[[int], object], phase: str = "whole", shortest: float = SHORTEST_SAMPLE) -> Sample:
    """Return a sample of `call`, which takes the number of the round: the mean seconds of enough calls.

    The call runs twice at once, so that the first sample is like the others. It also runs once before several calls,
    because the cache then holds the data of another entry.
    """
    call(0)
    start = time.perf_counter()
    call(0)
    calls = max(1, int(shortest / max(time.perf_counter() - start, 1e-9)))

    def sample(index: int) -> dict[str, float]:
        if calls > 1:
            call(index)
        start = time.perf_counter()
        for _ in range(calls):
            call(index)
        return {phase: (time.perf_counter() - start) / calls}

    return sample
