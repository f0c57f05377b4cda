"""Read and write a front: quality against speed of recipes with experts and without, each point measured.

The committed front is docs/results/front.jsonl, one point a line. `target` of params.yaml chooses a recipe from it, and
summaries and reports show its baselines beside a run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks import pareto

FRONT = Path("docs/results/front.jsonl")  # in the repository
MEASURE = "measure one: make front, and then python -m flows.sweep publish"
NEAREST = 3  # points that are listed where none reaches a target


@dataclass(frozen=True)
class Point:
    """A plan of a recipe, or of the teacher. Shares are of the teacher's figures, speeds over its best dense plan."""

    model: str  # teacher.source
    recipe: str | None  # None: the teacher itself
    plan: str
    experts: bool
    settings: tuple[str, ...]  # of the recipe alone, KEY=VALUE
    decompose: dict[str, Any]  # the whole section of params.yaml
    training: dict[str, Any]  # what all recipes had in common, dotted key -> value
    seeds: tuple[int, ...]
    quality: float  # mean over judges and seeds
    spread: float | None  # standard deviation of a seed's mean; None with one seed
    by_seed: tuple[float, ...]
    judges: dict[str, float]  # mean over seeds
    student: dict[str, float]  # the same of the student in float32
    speed: float  # mean over the shapes
    interval: tuple[float, float] | None  # of the speed, 99 %; None: too few rounds to know it
    speeds: dict[str, float]  # "32x128" -> speed
    milliseconds: dict[str, float]
    flops: float  # of a token, as a share of the teacher's
    parameters: int
    bytes: int
    memory_mib: float
    against: dict[str, Any] | None  # the best baseline that is at least as fast, with the paired difference
    on_front: bool
    threads: int
    machine: str
    commit: str

    @property
    def name(self) -> str:
        return self.plan if self.recipe is None else f"{self.recipe} ({self.plan})"

    @property
    def is_baseline(self) -> bool:
        return not self.experts

    def __str__(self) -> str:
        seeds = "1 seed" if len(self.seeds) == 1 else f"{len(self.seeds)} seeds"
        return f"{self.name} keeps {percent(self.quality, self.spread)} at {self.speed:.2f}x, {seeds}"


def without_path(key: str, value: Any) -> Any:
    """Return the value of a parameter as a front names it: of a path its last part alone, of a tuple a list."""
    if key in ("data.corpus", "data.evaluation", "data.folder") and isinstance(value, str):
        return Path(value).name
    return list(value) if isinstance(value, tuple) else value


def percent(share: float, spread: float | None = None) -> str:
    return f"{100 * share:.1f}{'' if spread is None else f' ± {100 * spread:.1f}'} %"


def read(path: Path) -> list[Point]:
    """Return the points of a file; empty lines are none. ValueError for a line that is no point."""
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():  # a file without points has one: DVC warns of a file without a byte
            continue
        try:
            row = json.loads(line)
            row |= {key: tuple(value) for key, value in row.items() if isinstance(value, list)}
            points.append(Point(**row))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is no point of a front ({error}): restore the file (git checkout -- {FRONT}), "
                f"or {MEASURE}"
            ) from None
    return points


def committed(root: Path) -> list[Point]:
    """Return the points of the committed front; none where there is no file."""
    path = root / FRONT
    return read(path) if path.is_file() else []


def write(points: Sequence[Point], path: Path) -> None:
    """Write points, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(asdict(point))}\n" for point in points), encoding="utf-8")


def choose(points: Sequence[Point], *, keeps: float | None = None, speedup: float | None = None) -> Point | None:
    """Return the fastest point that keeps a share, or the best one that is so fast; None where none reaches it."""
    if keeps is not None:
        place = pareto.cheapest([(point.quality, point.speed) for point in points], keeps)
    else:
        assert speedup is not None
        place = pareto.cheapest([(point.speed, point.quality) for point in points], speedup)
    return None if place is None else points[place]


def nearest(points: Sequence[Point], *, keeps: float | None = None, speedup: float | None = None) -> list[Point]:
    """Return the points that come nearest to a target that none reaches, each recipe once."""

    def missing(point: Point) -> float:
        return -point.quality if keeps is not None else -point.speed

    found: dict[str | None, Point] = {}
    for point in sorted(points, key=missing):
        found.setdefault(point.recipe, point)
    return list(found.values())[:NEAREST]


def of_model(points: Sequence[Point], model: str) -> list[Point]:
    """Return the points that were measured on a model."""
    return [point for point in points if point.model == model]
