"""What is worth having where two things are wanted at once: as much quality kept, and as fast, as can be."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]  # the quality that is kept, and the speed; of both, more is better


def front(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other beats, from the most quality to the most speed (Pareto's optimum).

    One point beats another if it is no worse in either and better in one; of equal points all are kept.
    """
    order = sorted(range(len(points)), key=lambda place: (-points[place][0], -points[place][1]))
    kept: list[int] = []
    for place in order:  # by quality, so that only more speed can still earn a place
        if not kept or points[place][1] > points[kept[-1]][1] or points[place] == points[kept[-1]]:
            kept.append(place)
    return kept


def cheapest(points: Sequence[Point], keeps: float) -> int | None:
    """The place of the fastest point that keeps at least this quality; of equally fast ones, the one that keeps most.

    None where no point keeps that much.
    """
    able = [place for place, (quality, _) in enumerate(points) if quality >= keeps]
    return max(able, key=lambda place: (points[place][1], points[place][0]), default=None)
