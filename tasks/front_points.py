"""Make the points of a front from the figures of its cells and the timings of one session."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import mean, stdev
from typing import Any

from tasks import pareto
from tasks.front import Point

EQUAL_SPEED = 0.98  # of another speed: less is noise, and a baseline this near counts as equally fast
CONFIDENCE = 0.95

Timings = Mapping[str, Mapping[str, Mapping[str, Any]]]  # shape -> label of a plan -> row of the session


@dataclass(frozen=True)
class Made:
    """What a cell of a front left: the files metrics/evaluate.json and judged.json, and what it was made of."""

    recipe: str | None  # None: the teacher's plans in the export of a cell
    seed: int
    settings: tuple[str, ...]
    decompose: dict[str, Any]
    evaluated: Mapping[str, Any]
    judged: Mapping[str, Mapping[str, Any]]


def label(recipe: str | None, plan: str) -> str:
    """Return how a session calls a plan of a recipe; the teacher's plans keep their names."""
    return plan if recipe is None else f"{recipe}:{plan}"


def points(cells: Sequence[Made], timings: Timings, common: Mapping[str, Any]) -> list[Point]:
    """Return a point for each plan that was timed, from most quality to most speed.

    `common` are the fields that all points share. A plan is judged with every seed, and timed with the first.
    """
    found = []
    for recipe in dict.fromkeys(cell.recipe for cell in cells):
        seeds = sorted((cell for cell in cells if cell.recipe == recipe), key=lambda cell: cell.seed)
        for plan in seeds[0].judged:
            if all(label(recipe, plan) in rows for rows in timings.values()):
                judged = [cell for cell in seeds if plan in cell.judged]
                found.append(_point(recipe, plan, judged, timings, common))
    on_front = set(pareto.front([(one.quality, one.speed) for one in found]))
    placed = [replace(one, on_front=place in on_front, against=against(one, found)) for place, one in enumerate(found)]
    return sorted(placed, key=lambda one: (-one.quality, -one.speed))


def _point(recipe: str | None, plan: str, cells: Sequence[Made], timings: Timings, common: Mapping[str, Any]) -> Point:
    first, judged = cells[0], cells[0].judged[plan]
    rows = {shape: rows[label(recipe, plan)] for shape, rows in timings.items()}
    by_seed = [mean(cell.judged[plan]["judges"].values()) for cell in cells]
    names = list(judged["judges"])
    kept = [_kept(cell, names, teacher=recipe is None) for cell in cells]
    who = "teacher" if recipe is None else "student"
    return Point(
        **common,
        recipe=recipe,
        plan=plan,
        experts=recipe is not None and first.decompose["num_experts"] != 1,
        settings=first.settings,
        decompose=first.decompose,
        seeds=tuple(cell.seed for cell in cells),
        quality=_digits(mean(by_seed)),
        spread=_digits(stdev(by_seed)) if len(by_seed) > 1 else None,
        by_seed=tuple(map(_digits, by_seed)),
        judges={name: _digits(mean(cell.judged[plan]["judges"][name] for cell in cells)) for name in names},
        student={name: _digits(mean(one[name] for one in kept)) for name in names},
        speed=_digits(mean(row["speedup_vs_best_dense"] for row in rows.values())),
        interval=_interval(rows.values()),
        speeds={shape: _digits(row["speedup_vs_best_dense"]) for shape, row in rows.items()},
        milliseconds={shape: _digits(row["median_ms"]) for shape, row in rows.items()},
        flops=_digits(judged["flops"]),
        parameters=first.evaluated["parameters"][who],
        bytes=judged["bytes"],
        memory_mib=judged["memory_mib"],
        against=None,
        on_front=False,
    )


def _interval(rows: Collection[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the means of the limits at each shape; None where there were too few rounds to know them."""
    low, high = (mean(row[limit] for row in rows) for limit in ("low", "high"))
    return (_digits(low), _digits(high)) if isfinite(high) else None


def _kept(cell: Made, names: Sequence[str], *, teacher: bool) -> dict[str, float]:
    """Return what the student keeps in float32 of each of the teacher's figures; the teacher keeps all."""
    if teacher:
        return dict.fromkeys(names, 1.0)
    found = {}
    for name in names:
        value: Any = cell.evaluated["retention"]
        for key in name.split("."):
            value = value[key]
        found[name] = float(value)
    return found


def against(point: Point, points: Sequence[Point]) -> dict[str, Any] | None:
    """Return the best baseline that is at least as fast as a mixture, and the difference of their qualities.

    The interval is of the mean of the paired differences, a pair for each seed (Student's t); None with one seed.
    A baseline has no interval of its own, and so None.
    """
    able = [one for one in points if one.is_baseline and one.speed >= EQUAL_SPEED * point.speed]
    if point.is_baseline or not able:
        return None
    rival = max(able, key=lambda one: (one.quality, one.speed))
    mine, others = (
        dict(zip(point.seeds, point.by_seed, strict=True)),
        dict(zip(rival.seeds, rival.by_seed, strict=True)),
    )
    pairs = [mine[seed] - others[seed] for seed in mine if seed in others]
    row: dict[str, Any] = {"recipe": rival.recipe, "plan": rival.plan, "speed": rival.speed, "pairs": len(pairs)}
    row["difference"] = _digits(mean(pairs) if pairs else point.quality - rival.quality)
    row |= {"low": None, "high": None}
    if len(pairs) > 1:
        from scipy import stats

        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * stdev(pairs) / len(pairs) ** 0.5
        row |= {"low": _digits(row["difference"] - half), "high": _digits(row["difference"] + half)}
    return row


def _digits(value: float) -> float:
    return round(float(value), 5)
