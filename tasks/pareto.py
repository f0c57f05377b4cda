"""Find the points worth having where two things are wanted at once: quality kept and speed."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]  # quality kept and speed; more is better


def front(points: Sequence[Point]) -> list[int]:
    """Return the places of the points that no other beats, from most quality to most speed (Pareto's optimum).

    One point beats another if it is no worse in either and better in one; of equal points all are kept.
    """
    order = sorted(range(len(points)), key=lambda place: (-points[place][0], -points[place][1]))
    kept: list[int] = []
    for place in order:  # by quality, so that only more speed can still earn a place
        if not kept or points[place][1] > points[kept[-1]][1] or points[place] == points[kept[-1]]:
            kept.append(place)
    return kept


def cheapest(points: Sequence[Point], keeps: float) -> int | None:
    """Return the place of the fastest point that keeps at least this quality; a tie goes to the most quality.

    None where no point keeps that much.
    """
    able = [place for place, (quality, _) in enumerate(points) if quality >= keeps]
    return max(able, key=lambda place: (points[place][1], points[place][0]), default=None)
