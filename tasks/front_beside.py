"""Put a run beside the baselines of the committed front: students without experts that were measured at its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from tasks.front import Point, of_model, percent
from tasks.front_points import EQUAL_SPEED
from tasks.measures import at


@dataclass(frozen=True)
class Beside:
    """The run and the nearest baselines, as rows of text, and a sentence on which is ahead."""

    heads: list[str]
    rows: list[list[str]]  # the run first
    sentence: str
    note: str  # how it was measured


def beside(points: Sequence[Point], model: str, quality: Mapping[str, Any], plan: Mapping[str, Any]) -> Beside | None:
    """Return a run beside the nearest baselines of a front of its model; None where the front has none of it.

    `quality` is metrics/evaluate.json and `plan` plan.json of the run. Both sides are students in float32, judged by
    what the run was judged by. Baselines of the run's kind of CPU come before others. Also None where the run timed
    other shapes, or was judged by nothing of the front.
    """
    baselines = [point for point in of_model(points, model) if point.is_baseline]
    if not baselines:
        return None
    speed = speed_of(plan, baselines[0])
    retention = quality["retention"]
    judges = [name for name in baselines[0].student if at(retention, name.split(".")) is not None]
    if speed is None or not judges:
        return None
    alike = [point for point in baselines if point.machine.startswith(f"{plan['machine']['cpu']},")]
    baselines = alike or baselines
    kept = mean(at(retention, name.split(".")) for name in judges)

    def quality_of(point: Point) -> float:
        return mean(point.student[name] for name in judges)

    as_fast = [point for point in baselines if point.speed >= EQUAL_SPEED * speed]
    slower = [point for point in baselines if point.speed < EQUAL_SPEED * speed]
    rival = max(as_fast, key=lambda point: (quality_of(point), point.speed), default=None)
    below = max(slower, key=lambda point: (point.speed, quality_of(point)), default=None)
    rows = [["this run", percent(kept), f"{speed:.2f}x", "1", plan["machine"]["cpu"]]]
    rows += [
        [
            point.name,
            percent(quality_of(point)),
            f"{point.speed:.2f}x",
            str(len(point.seeds)),
            point.machine,
        ]
        for point in (below, rival)
        if point is not None
    ]
    first = baselines[0]
    return Beside(
        ["", "kept", "speed", "seeds", "machine"],
        rows,
        sentence(rival, kept, None if rival is None else quality_of(rival)),
        f"Kept: students in float32, mean of {len(judges)} of the {len(first.student)} judges of the front. Speed: "
        f"over the best dense plan, mean of {' and '.join(first.speeds)}, threads {first.threads}.",
    )


def sentence(rival: Point | None, kept: float, other: float | None) -> str:
    """Return which is ahead at the speed of the run: it, or the best baseline that is at least as fast."""
    if rival is None or other is None:
        return "No baseline of the committed front is as fast."
    named = f"{rival.name} keeps {percent(other)} at {rival.speed:.2f}x"
    if other > kept:
        made = (
            f'make run SET="name={rival.recipe} {" ".join(rival.settings)}"' if rival.recipe else "use the dense plan"
        )
        ahead = f"{named}, {100 * (other - kept):.1f} points more than this run"
        return f"A baseline is ahead at this speed: {ahead}. To have it: {made}"
    return f"No baseline of the committed front is ahead at this speed: {named}."


def speed_of(plan: Mapping[str, Any], point: Point) -> float | None:
    """Return the speed of a run at the shapes and threads of a point, over its best dense plan; None if not timed."""
    chosen = {
        f"{row['batch']}x{row['sequence']}": row["speedup_vs_best_dense"]
        for row in plan["choices"]
        if row["threads"] == point.threads and row["phase"] in ("whole", "request")
    }
    if not point.speeds.keys() <= chosen.keys():
        return None
    return mean(chosen[shape] for shape in point.speeds)
