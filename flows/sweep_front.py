"""Compare the recipes of a front: judge the plans of every seed, and time those of the first seed in one session."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffn2moe.planning.timing import machine
from ffn2moe.runtime.files import read_manifest
from flows.recipes import RECIPE
from flows.study import Cell, Study, history
from flows.sweep_compare import Timer, in_memory, run_session, without_figures, write_csv
from flows.workspace import FlowError, commit
from tasks import compare, front, front_picture
from tasks.front_points import Made, label, points
from tasks.params import Params
from tasks.workload import shapes_of

ROUNDS = 30  # of the session, at each shape
Plans = Mapping[str, Sequence[str]]  # recipe -> plans


def compare_front(
    study: Study, root: Path, time: Timer, judge: Timer, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the points of all recipes as rows; also write front.jsonl, points.csv, results.json and front.png.

    `time` runs a session and `judge` the judging of a cell: (job, result). What has ended is not repeated. FlowError if
    no cell has figures.
    """
    cells = sorted(study.finished(), key=lambda cell: (study.params(cell).seed, cell.number))
    if not cells:
        raise FlowError("no cell has figures; " + "; ".join(without_figures(study)[:3]))
    firsts = {str(cell.recipe): cell for cell in reversed(cells)}  # the first seed of each recipe
    firsts = {recipe: firsts[recipe] for recipe in dict.fromkeys(str(cell.recipe) for cell in cells)}
    params = study.params(cells[0])
    export = root / "exports" / cells[0].name
    shapes = largest_batches(params, export)
    plans = {recipe: _plans_of(root / "exports" / cell.name, shapes) for recipe, cell in firsts.items()}
    dense = compare.dense_plans(export, params.gate.min_retention)
    made: list[Made] = []
    for place, cell in enumerate(cells):
        wanted = [*plans[str(cell.recipe)], *(dense if cell == cells[0] else ())]
        say(f"judging {', '.join(wanted)} of {cell.label}, {place + 1}/{len(cells)}")
        made += _judged(study, cell, root, shapes[-1], wanted, judge)
    timings = {}
    for batch, sequence in shapes:
        say(f"timing {len(dense) + sum(map(len, plans.values()))} plans in turn at {batch} x {sequence}")
        timings[f"{batch}x{sequence}"] = _session(study, firsts, plans, dense, root, (batch, sequence), time)
    found = points(made, timings, _common(study, params, root))
    return _written(study, found, {cell: name for name, cell in firsts.items()})


def largest_batches(params: Params, export: Path) -> list[tuple[int, int]]:
    """Return the shapes of the workload with the largest batch, the most tokens last: they say how fast a plan is."""
    shapes = [(int(batch), int(sequence)) for batch, sequence, *_ in shapes_of(params.benchmark, read_manifest(export))]
    largest = max(batch for batch, _ in shapes)
    return sorted(shape for shape in shapes if shape[0] == largest)


def _plans_of(export: Path, shapes: Sequence[tuple[int, int]]) -> list[str]:
    """Return the plans of a cell that no other of its plans beats, by its own benchmark."""
    return [point.plan for point in compare.best_of(compare.points(0, export, shapes))]


def _judged(
    study: Study, cell: Cell, root: Path, shape: tuple[int, int], plans: Sequence[str], judge: Timer
) -> list[Made]:
    """Return what a cell left, and apart from it the teacher's plans in its export."""
    from ffn2moe.runtime.plans import is_dense

    folder, export = study.folder / f"{cell.number:03}", root / "exports" / cell.name
    params, out = study.params(cell), folder / "judged.json"
    known = read_manifest(export)["plans"]
    wanted = [plan for plan in plans if plan in known]
    job = {
        "export": str(export),
        "benchmarks": str(folder / "benchmarks"),
        "plans": wanted,
        "threads": params.benchmark.threads[0],
        "shape": shape,
        "seed": params.seed,
    }
    path = folder / "judge.json"
    path.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    judged = _json(out) if out.is_file() else {}
    if any(plan not in judged for plan in wanted):
        judge(path, out)
        judged = _json(out)
    evaluated = _json(export / "metrics" / "evaluate.json")
    decompose = params.model_dump(mode="json", by_alias=True)["decompose"]
    own = {plan: row for plan, row in judged.items() if plan in plans and not is_dense(plan)}
    teachers = {plan: row for plan, row in judged.items() if plan in plans and is_dense(plan)}
    settings = tuple(study.recipe(str(cell.recipe)))
    made = [Made(cell.recipe, params.seed, settings, decompose, evaluated, own)]
    return [*made, Made(None, params.seed, (), {}, evaluated, teachers)] if teachers else made


def _session(
    study: Study,
    firsts: Mapping[str, Cell],
    plans: Plans,
    dense: Sequence[str],
    root: Path,
    shape: tuple[int, int],
    time: Timer,
) -> dict[str, dict[str, Any]]:
    """Return the row of every plan at one shape, timed in turn; mostly in one session."""
    found: dict[str, dict[str, Any]] = {}
    recipes = {cell.name: recipe for recipe, cell in firsts.items()}

    def size(cell: Cell) -> int:
        judged = _json(study.folder / f"{cell.number:03}" / "judged.json")
        return sum(int(judged[plan]["bytes"]) for plan in plans[recipes[cell.name]])

    for part, cells in enumerate(in_memory(list(firsts.values()), size)):
        first = root / "exports" / cells[0].name
        params = study.params(cells[0])
        job = {
            "texts": str(study.folder / f"{cells[0].number:03}" / "texts.jsonl"),
            "exports": {plan: [str(first), plan] for plan in dense}
            | {
                label(recipes[cell.name], plan): [str(root / "exports" / cell.name), plan]
                for cell in cells
                for plan in plans[recipes[cell.name]]
            },
            "shape": list(shape),
            "threads": params.benchmark.threads[0],
            "rounds": ROUNDS,
            "decode_tokens": params.benchmark.decode_tokens,
        }
        path = study.folder / f"session-{shape[0]}x{shape[1]}-{part}.json"
        found = run_session(job, path, time) | found
    return found


def _common(study: Study, params: Params, root: Path) -> dict[str, Any]:
    """Return what all points of a front share: the model, the training that every recipe had, machine and code."""
    head, dirty = commit(root)
    flat = params.flat()
    own = {setting.partition("=")[0] for name in study.recipes for setting in study.recipe(name)}
    trained = ("data.", "train_router.", "distill.")
    about = machine()
    return {
        "model": params.teacher.source,
        "training": {
            key: front.without_path(key, value)
            for key, value in flat.items()
            if key.startswith(trained) and key not in own
        },
        "threads": params.benchmark.threads[0],
        "machine": ", ".join([about["cpu"], f"{about['cores']} cores"]),
        "commit": head[:7] + ("+" if dirty else ""),
    }


def _written(study: Study, found: Sequence[front.Point], firsts: Mapping[Cell, str]) -> list[dict[str, Any]]:
    """Write the points into the folder of the study; return rows like those of a sweep, with the recipes."""
    numbers = {name: cell.number for cell, name in firsts.items()}
    called = {name: cell.settings[1:] for cell, name in firsts.items()}  # all but its name
    rows = [
        {
            "on_front": point.on_front,
            "cell": numbers.get(str(point.recipe), min(numbers.values())),
            RECIPE: point.recipe or "",
            "plan": point.plan,
            "kept": point.quality,
            "spread": point.spread,
            "vs_best_dense": point.speed,
            "median_ms": list(point.milliseconds.values())[-1],
            "flops": point.flops,
            "parameters": point.parameters,
            "bytes": point.bytes,
            "memory_mib": point.memory_mib,
            "settings": " ".join(point.settings) or "the teacher",
            "run": " ".join(called.get(str(point.recipe), ())),
            "export": f"exports/{study.name}-{numbers.get(str(point.recipe), min(numbers.values())):03}",
        }
        for point in found
    ]
    front.write(found, study.folder / "front.jsonl")
    write_csv(study.folder / "points.csv", rows)
    write_csv(study.folder / "cells.csv", history(study.folder))
    front_picture.draw(found, study.name, study.folder / "front.png")
    results = {"points": rows, "without_figures": without_figures(study)}
    (study.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return rows


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
