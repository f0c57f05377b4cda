"""Compare the cells of a sweep: one interleaved session over their plans, and the Pareto front."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from ffn2moe.runtime.files import read_manifest
from flows.study import Cell, Study, history
from flows.workspace import FlowError
from tasks import compare
from tasks.params import Params
from tasks.record import PipelineRecord
from tasks.workload import shapes_of

Timer = Callable[[Path, Path], object]


def compare_cells(study: Study, root: Path, time: Timer) -> list[dict[str, Any]]:
    """Return the points of all cells, timed in one session, as rows; also write points.csv, results.json and front.png.

    `time` runs a session: (file of the session, file of the timings). FlowError if no cell has figures.
    """
    cells = study.finished()
    if not cells:
        raise FlowError("no cell has figures; " + "; ".join(without_figures(study)[:3]))
    found: list[compare.Point] = []

    def size(cell: Cell) -> int:
        return sum(path.stat().st_size for path in (root / "exports" / cell.name).rglob("*.onnx*"))

    # Cells of one teacher share its dense plans. Each teacher has a session of its own.
    by_teacher = sorted(cells, key=lambda cell: str(study.params(cell).teacher))
    for number, (_, group) in enumerate(groupby(by_teacher, key=lambda cell: str(study.params(cell).teacher))):
        for part, several in enumerate(in_memory(list(group), size)):
            found += _session(study, several, study.folder / f"session-{number}-{part}.json", root, time)
    best = compare.best_of(found)
    labels = {cell.number: cell.label for cell in cells}
    rows = [
        {
            "on_front": point in best,
            **{key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(point).items()},
            "settings": labels[point.cell],
            "export": f"exports/{study.name}-{point.cell:03}",
        }
        for point in sorted(found, key=lambda point: (-point.kept, -point.vs_best_dense))
    ]
    write_csv(study.folder / "points.csv", rows)
    write_csv(study.folder / "cells.csv", history(study.folder))
    params = study.params(cells[0])
    batch, sequence, threads = *_shape(params, root / "exports" / cells[0].name), params.benchmark.threads[0]
    title = f"{study.name}: quality against speed at {batch} × {sequence} tokens, {threads} thread{'s'[: threads - 1]}"
    compare.draw(found, labels, params.gate.min_retention, title, study.folder / "front.png")
    results = {"points": rows, "without_figures": without_figures(study)}
    (study.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return rows


def without_figures(study: Study) -> list[str]:
    """Return a line for each cell that failed or was left out, with the reason."""
    return [
        f"cell {cell.number}  {cell.label}: {word}: {reason}"
        for word, cells in (("failed", study.failed()), ("left out", study.left_out()))
        for cell, reason in cells
    ]


def in_memory(cells: Sequence[Cell], bytes_of: Callable[[Cell], int]) -> list[Sequence[Cell]]:
    """Group the cells into sessions that fit in memory, by the size of their graphs; mostly one session."""
    # While a plan opens, it holds up to twice the size of its file.
    at_once = max(1, int(psutil.virtual_memory().available / 2 / max(1, 2 * max(map(bytes_of, cells)))))
    return [cells[start : start + at_once] for start in range(0, len(cells), at_once)]


def _session(study: Study, cells: Sequence[Cell], path: Path, root: Path, time: Timer) -> list[compare.Point]:
    """Return the points of some cells, timed in turn beside the dense plans of their teacher.

    A cell takes part with the plans of its own Pareto front.
    """
    params = study.params(cells[0])
    first = root / "exports" / cells[0].name
    own = {
        f"{point.cell}:{point.plan}": point
        for cell in cells
        for point in compare.best_of(compare.points(cell.number, root / "exports" / cell.name))
    }
    job = {
        "texts": str(study.folder / f"{cells[0].number:03}" / "texts.jsonl"),
        "exports": {plan: [str(first), plan] for plan in compare.dense_plans(first, params.gate.min_retention)}
        | {label: [str(root / "exports" / f"{study.name}-{one.cell:03}"), one.plan] for label, one in own.items()},
        "shape": _shape(params, first),
        "threads": params.benchmark.threads[0],
        "rounds": params.benchmark.rounds,
        "decode_tokens": params.benchmark.decode_tokens,
    }
    rows = run_session(job, path, time)
    return [
        compare.Point(
            one.cell,
            one.plan,
            one.kept,
            rows[label]["speedup_vs_best_dense"],
            rows[label]["speedup_vs_dense"],
            rows[label]["median_ms"],
        )
        for label, one in own.items()
    ]


def run_session(job: Mapping[str, Any], path: Path, time: Timer) -> dict[str, dict[str, Any]]:
    """Return label -> row of a session; a finished one with the same job is not repeated."""
    out, text = path.with_suffix(".timings.json"), json.dumps(job, indent=2) + "\n"
    if not (out.is_file() and path.is_file() and path.read_text(encoding="utf-8") == text):
        out.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        time(path, out)
    return {row["plan"]: row for row in json.loads(out.read_text(encoding="utf-8"))}


def _shape(params: Params, export: Path) -> list[int]:
    """Return the largest batch and sequence, which decide."""
    shapes = shapes_of(params.benchmark, read_manifest(export))
    return [int(size) for size in max(shapes, key=lambda shape: shape[0] * shape[1])[:2]]


def log_front(study: Study, root: Path, rows: Sequence[Mapping[str, Any]], record: PipelineRecord) -> None:
    """Log the front in the run record: the picture and the table in the run of the sweep, figures in those of cells."""
    front = [row for row in rows if row["on_front"]]
    record.add(
        {
            "cells.finished": len(study.finished()),
            "cells.failed": len(study.failed()),
            "cells.left_out": len(study.left_out()),
            "front.points": len(front),
            "front.most_kept": max(row["kept"] for row in front),
            "front.fastest": max(row["vs_best_dense"] for row in front),
        },
        [study.folder / name for name in ("front.png", "points.csv", "cells.csv")],
    )
    for cell in study.finished():
        own = PipelineRecord.resume(root, study.noted(cell, "run"))
        if own is None:  # the database was removed
            continue
        values = {
            f"sweep.{row['plan']}.{key}": row[key]
            for row in rows
            for key in ("kept", "vs_best_dense", "vs_dense", "median_ms")
            if row["cell"] == cell.number and key in row
        }
        on_front = any(row["on_front"] for row in rows if row["cell"] == cell.number)
        own.add(values, tags={"on_front": str(on_front).lower()})
        own.finish("FINISHED")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
