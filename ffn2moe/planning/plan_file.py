"""Write plan.json: the plan chosen for each shape, for lists of texts, and each number of threads, and why."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ffn2moe.planning import timing
from ffn2moe.planning.choose import Cell, Choice, cells_of, choose, choose_for_lists, with_lists
from ffn2moe.planning.measure import Measured
from ffn2moe.planning.memory import memory_of
from ffn2moe.planning.shipping import Shipment
from ffn2moe.planning.timing import Timing
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import PLAN_FILE, read_manifest
from ffn2moe.runtime.plans import decodes, is_dense
from ffn2moe.runtime.workload import Workload


def planned(
    measured: Measured,
    *,
    min_retention: float,
    max_plans: int | None = None,
    texts: Sequence[str] = (),
    shipment: Shipment | None = None,
) -> dict[str, Any]:
    """Return the content of plan.json: the choice for each shape, for lists and number of threads, and all behind it.

    `default_plan`, `best_dense_plan`, `speedup_vs_best_dense` and `reason` are those of the first number of threads,
    the speed-up that of the whole workload. `choices` has a row for each shape (and phase), and `lists` one for each
    number of threads, if lists were timed: `ffn2moe.runtime.export` goes by both. `plans` are all that they name.
    `memory_mib` is the most memory of a process that opens the plans one after the other, measured; with several plans
    `agreement` is the least mean cosine of the embeddings that two of them give the same texts. Plans are used together
    only where they fit into the `shipment`, if there is one.
    """
    setting = measured.setting
    path, workload = setting.path, setting.workload
    head = read_manifest(path)["spec"]["head"]
    if head == "seq2seq":
        max_plans = 1
    choices: dict[int, Choice] = {}
    kept: list[str] = []
    for count in setting.threads:
        cells = cells_of(measured.timings, workload, threads=count, head=head, decode_tokens=setting.decode_tokens)
        choices[count] = choose(
            cells, setting.keeps_quality, max_plans, partial(_fit, shipment, kept), setting.retention
        )
        choices[count] = _both(measured, count, choices[count], kept, max_plans, shipment)
        kept = list(dict.fromkeys([*kept, *choices[count].plans]))
    lists: list[dict[str, Any]] = []
    for count, choice in choices.items():
        lists += _for_lists(measured, count, choice, kept, max_plans, shipment)
        kept = list(dict.fromkeys([*kept, *(row["plan"] for row in lists)]))
    threads = setting.threads[0]
    first = choices[threads]
    plans = list(dict.fromkeys(row.plan for row in measured.timings))
    content: dict[str, Any] = {
        "default_plan": first.plans[0],
        "best_dense_plan": first.best_dense,
        "speedup_vs_best_dense": _digits(first.speedup),
        "reason": first.reason,
        "plans": kept,
        "choices": [
            _chosen(cell, plan, count)
            for count, choice in choices.items()
            for cell, plan in zip(choice.cells, choice.plan_of, strict=True)
        ],
        "by_threads": [_by_threads(count, choice) for count, choice in choices.items()],
        "lists": lists,
        "workload": _described(workload, setting.decode_tokens if decodes(head) else None),
        "confidence": timing.CONFIDENCE,
        "left_out": measured.left_out,
        "min_retention": min_retention,
        "keeps_quality": dict(setting.keeps_quality),
        "memory_mib": memory_of(path, _fixed_shapes(first, kept, workload), workload.largest, threads),
        "machine": timing.machine(),
        "timings": {plan: [row_of(row) for row in measured.timings if row.plan == plan] for plan in plans},
    }
    if head == "embedding" and len(kept) > 1 and texts:
        content["agreement"] = _digits(agreement_of(path, kept, texts, threads))
    return content


def _fit(shipment: Shipment | None, kept: Sequence[str], plans: Sequence[str]) -> bool:
    return shipment is None or shipment.fits([*kept, *plans])


def _joining(
    choice: Choice, kept: Sequence[str], max_plans: int | None, shipment: Shipment | None
) -> Callable[[str], bool]:
    """Return whether a plan may be used for lists beside those of a choice, and those that are `kept`."""

    def may_join(plan: str) -> bool:
        few = max_plans is None or len({*choice.plans, plan}) <= max_plans
        return few and (plan in kept or _fit(shipment, kept, [plan]))

    return may_join


def _on_lists(measured: Measured, threads: int) -> Cell | None:
    """Return what was timed on lists of texts on a number of threads; None where nothing was."""
    rows = {row.plan: row for row in measured.lists if row.threads == threads}
    if not rows:
        return None
    one = next(iter(rows.values()))
    return Cell(one.batch, one.sequence, one.phase, 1.0, rows)


def _both(
    measured: Measured,
    threads: int,
    choice: Choice,
    kept: Sequence[str],
    max_plans: int | None,
    shipment: Shipment | None,
) -> Choice:
    """Return the choice for the shapes, or of one plan that is better for shapes and lists together (`with_lists`)."""
    cell = _on_lists(measured, threads)
    if cell is None:
        return choice
    may_join = _joining(choice, list(dict.fromkeys([*kept, *choice.plans])), max_plans, shipment)
    setting = measured.setting
    fits = partial(_fit, shipment, kept)
    return with_lists(choice, cell, setting.keeps_quality, may_join, fits, setting.retention)


def _for_lists(
    measured: Measured,
    threads: int,
    choice: Choice,
    kept: Sequence[str],
    max_plans: int | None,
    shipment: Shipment | None,
) -> list[dict[str, Any]]:
    """Return the row of plan.json for lists of texts on a number of threads; none where nothing was timed."""
    cell = _on_lists(measured, threads)
    if cell is None:
        return []
    rows = cell.rows
    may_join = _joining(choice, kept, max_plans, shipment)
    portable = shipment.portable(kept) if shipment else read_manifest(measured.setting.path).get("portable")
    shipped = [*kept, *([portable] if portable else [])]
    plan = choose_for_lists(cell, measured.setting.keeps_quality, choice.plans, shipped, may_join)
    if plan is None:
        return []
    row, best = rows[plan], cell.best_dense
    chosen = {
        "threads": threads,
        "texts": cell.batch,
        "plan": plan,
        "best_dense_plan": best.plan,
        "best_dense_ms": _digits(best.median_ms),
        **_brief(row),
        "timings": {plan: _brief(row) for plan, row in rows.items()},
    }
    return [chosen | {"reason": _reason_for_lists(row, best)}]


def _brief(row: Timing) -> dict[str, Any]:
    """Return what is written of a plan's timing on lists; null means unknown."""
    values = {key: getattr(row, key) for key in ("median_ms", "speedup_vs_best_dense", "low", "high")}
    return {key: _digits(value) for key, value in values.items()} | {"rounds": row.rounds}


def _reason_for_lists(row: Timing, best: Timing) -> str:
    whole = f"lists of texts run on {row.plan}"
    if row.plan == best.plan:
        return f"{whole}, the best dense plan there" if is_dense(best.plan) else whole
    noise = f"{row.low:.2f} to {row.high:.2f}" if row.high < math.inf else f"{row.rounds} rounds are too few to tell"
    return f"{whole}, {row.speedup_vs_best_dense:.2f}x as fast as {best.plan} ({noise})"


def _fixed_shapes(choice: Choice, plans: Sequence[str], workload: Workload) -> dict[str, list[tuple[int, int]]]:
    """Return the shapes (batch, sequence) that each plan is compiled for."""
    pairs = list(zip(choice.cells, choice.plan_of, strict=True))
    return {
        plan: [
            (cell.batch, cell.sequence)
            for cell, chosen in pairs
            if chosen == plan and (cell.batch, cell.sequence) in workload.fixed
        ]
        for plan in plans
    }


def _by_threads(threads: int, choice: Choice) -> dict[str, Any]:
    return {
        "threads": threads,
        "plans": list(choice.plans),
        "speedup_vs_best_dense": _digits(choice.speedup),
        "low": _digits(choice.low),
        "high": _digits(choice.high),
        "reason": choice.reason,
    }


def _described(workload: Workload, decode_tokens: int | None) -> dict[str, Any]:
    shapes = [{"batch": one.batch, "sequence": one.sequence, "weight": _digits(one.weight)} for one in workload.shapes]
    return {"source": workload.source, "shapes": shapes, "decode_tokens": decode_tokens}


def _chosen(cell: Cell, plan: str, threads: int) -> dict[str, Any]:
    row = cell.rows[plan]
    return {
        "batch": cell.batch,
        "sequence": cell.sequence,
        "phase": cell.phase,
        "threads": threads,
        "weight": _digits(cell.weight),
        "plan": plan,
        "best_dense_plan": cell.best_dense.plan,
        "median_ms": _digits(row.median_ms),
        "best_dense_ms": _digits(cell.best_dense.median_ms),
        "speedup_vs_best_dense": _digits(row.speedup_vs_best_dense),
        "low": _digits(row.low),
        "high": _digits(row.high),
        "rounds": row.rounds,
    }


def row_of(row: Timing) -> dict[str, Any]:
    """Return one timing for a file, without its plan's name and without meaningless digits; null means unknown."""
    values = {key: value for key, value in asdict(row).items() if key != "plan"}
    values["tokens_per_second"] = row.tokens_per_second
    return {key: _digits(value) if isinstance(value, float) else value for key, value in values.items()}


def _digits(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def agreement_of(path: Path, plans: Sequence[str], texts: Sequence[str], threads: int) -> float:
    """Return the least mean cosine between the embeddings of the same texts by two plans."""
    found = [open_export(path, plan, threads).encode([text for text in texts if text.strip()][:64]) for plan in plans]
    return min(float(np.mean((one * other).sum(1))) for one, other in combinations(found, 2))


def write(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write plan.json of an export beside its place and move it there, so that it is never half written."""
    file = Path(path) / PLAN_FILE
    partial_file = file.with_name(f".{file.name}.partial")
    partial_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial_file, file)
    return file


def bounds_of(folder: Path, length: int, plan: str) -> dict[str, float]:
    """Return how much faster a mixture could be end to end: by its FLOPs, and by Amdahl's law with free routing.

    The bounds are for texts of `length` tokens, with the engine and precision of the dense model. A dense plan stands
    for the mixture of the spec.
    """
    from transformers import AutoConfig

    from ffn2moe import metrics
    from ffn2moe.moe import checkpoint
    from ffn2moe.moe.variants import Variant

    entry = read_manifest(folder)["plans"][plan]
    spec = Variant.of(entry).spec(checkpoint.load_spec(folder / "checkpoint"))
    config = AutoConfig.from_pretrained(folder / "checkpoint")
    teacher, student = metrics.flops_per_token(spec, config, length)
    return {
        "flops": round(teacher.total / student.total, 4),
        "amdahl": round(metrics.amdahl_bound(teacher, student), 4),
        "ffn_share": round(teacher.ffn / teacher.total, 4),
    }
