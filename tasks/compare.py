"""Compare the exports of several runs: time them in one interleaved session, and draw quality against speed.

    python -m tasks.compare SESSION.json TIMINGS.json

This is not a stage of dvc.yaml, because it compares the results of whole runs. Each run timed its own plans at another
time; here each round times all of them in turn, with the dense plans among them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tasks import pareto
from tasks.job import read_json, run_job

TEXTS = 400  # the batches are made of them, as in the stage `benchmark`
WHOLE = ("whole", "request")  # the phases of all the work of a batch


@dataclass(frozen=True)
class Point:
    """One plan of one export, at the deciding shape."""

    cell: int
    plan: str
    kept: float  # share of the teacher's quality, by the headline figure
    vs_best_dense: float
    vs_dense: float
    median_ms: float


def points(cell: int, export: Path, shapes: Collection[tuple[int, int]] = ()) -> list[Point]:
    """Return every plan of the student, as the export's own benchmark timed it: at the deciding shape, or at `shapes`.

    The speeds are then their means over the shapes; a plan that was dropped at one of them is left out.
    """
    from ffn2moe.runtime.plans import is_dense

    manifest, timed = read_json(export / "manifest.json"), read_json(export / "plan.json")["timings"]
    found = []
    for plan, rows in timed.items():
        if is_dense(plan):
            continue
        used = [row for row in rows if (row["batch"], row["sequence"]) in shapes and row.get("phase", "whole") in WHOLE]
        used = used if shapes else [deciding(rows)]
        if len(used) >= len(shapes):
            keys = ("speedup_vs_best_dense", "speedup_vs_dense", "median_ms")
            figures = (mean(row[key] for row in used) for key in keys)
            found.append(Point(cell, plan, float(manifest["plans"][plan]["retention"]), *figures))
    return found


def dense_plans(export: Path, wanted: float) -> list[str]:
    """Return `dense` and the other dense plans that keep the share `wanted` of the quality."""
    from ffn2moe.runtime.plans import PLANS

    plans = read_json(export / "manifest.json")["plans"]
    dense = [name for name, plan in PLANS.items() if plan.dense and name in plans]
    return [name for name in dense if name == "dense" or plans[name]["retention"] >= wanted]


def deciding(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the timing that judges a plan: all the work, the most tokens, the first number of threads."""
    whole = [row for row in rows if row.get("phase", "whole") in WHOLE]
    return max(whole, key=lambda row: row["batch"] * row["sequence"])


def best_of(found: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats in both quality and speed, from best quality to best speed."""
    return [found[place] for place in pareto.front([(point.kept, point.vs_best_dense) for point in found])]


def cheapest_of(found: Sequence[Point], keeps: float) -> Point | None:
    """Return the fastest point that keeps at least the share `keeps` of the quality; None if no point does."""
    place = pareto.cheapest([(point.kept, point.vs_best_dense) for point in found], keeps)
    return None if place is None else found[place]


def session(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time the job's `exports` (label -> folder and plan, with `dense`) at one shape; return a row each, in order."""
    from ffn2moe.data.corpus import read_lines
    from ffn2moe.planning import timing
    from ffn2moe.runtime.export import open_export
    from ffn2moe.runtime.plans import is_dense

    lines = read_lines(Path(job["texts"]))[:TEXTS]
    opened = {label: open_export(folder, plan, job["threads"]) for label, (folder, plan) in job["exports"].items()}
    batch, sequence = job["shape"]
    # As the plans are used, and as the stage `benchmark` times them.
    timing.fix(opened, [(batch, sequence)])
    batches = timing.full_batches(opened["dense"], [json.loads(line)["text"] for line in lines], batch, sequence)
    race = timing.Race(
        opened,
        batches,
        threads=job["threads"],
        decode_tokens=job["decode_tokens"],
        comparable=[label for label, (_, plan) in job["exports"].items() if is_dense(plan)],
    )
    for _ in range(job["rounds"]):
        race.round()
    return [asdict(row) for row in race.timings() if row.phase in timing.DECISIVE]


def draw(found: Sequence[Point], labels: Mapping[int, str], wanted: float, title: str, path: Path) -> None:
    """Draw quality against speed of every point, and the front; the ending of `path` sets the format."""
    from matplotlib.figure import Figure

    best = best_of(found)
    figure = Figure(figsize=(8.4, 5.2 + 0.2 * len(best)), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[5, 0.3 + 0.22 * len(best)])
    axes, legend = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    others = [point for point in found if point not in best]
    axes.scatter(
        [point.vs_best_dense for point in others],
        [100 * point.kept for point in others],
        s=26,
        color="#9aa3b2",
        label="other plans",
    )
    axes.step(
        [point.vs_best_dense for point in best],
        [100 * point.kept for point in best],
        where="pre",
        color="#2563c9",
        linewidth=1.2,
        alpha=0.6,
    )
    axes.scatter(
        [point.vs_best_dense for point in best],
        [100 * point.kept for point in best],
        s=46,
        color="#2563c9",
        zorder=3,
        label="Pareto front",
    )
    for number, point in enumerate(best, 1):
        axes.annotate(
            str(number), (point.vs_best_dense, 100 * point.kept), xytext=(5, 5), textcoords="offset points", fontsize=9
        )
    axes.axvline(1, color="#1b1f27", linewidth=1, label="best dense plan")
    axes.axhline(100 * wanted, color="#1b1f27", linewidth=1, linestyle=":", label="gate.min_retention")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("speed over the best dense plan (right is faster)")
    axes.set_ylabel("% of the teacher's quality kept")
    axes.grid(color="#dce0e7", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best")
    legend.axis("off")
    lines = [
        f"{number}  {100 * point.kept:.1f} %  {point.vs_best_dense:.2f}x  {point.plan}, {labels[point.cell]}"
        for number, point in enumerate(best, 1)
    ]
    legend.text(0, 1, "\n".join(lines), fontsize=9, family="monospace", va="top", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def time_session(job: Mapping[str, Any], out: Path) -> None:
    """Time a session and write its rows to a file."""
    out.write_text(json.dumps(session(job), indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Time the session that one file describes, write the rows to another, and return the exit code."""
    return run_job(time_session, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
