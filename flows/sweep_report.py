"""Print what a sweep found: its Pareto front, the history of its cells, the cheapest good cell."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.axes import EXAMPLE
from flows.recipes import RECIPE
from flows.study import history
from flows.sweep_compare import write_csv
from flows.workspace import FlowError
from tasks import front, front_picture, pareto
from tasks.store import MLFLOW_UI, default_tracking_uri, mlflow_client, page_of_runs, without_password

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False, soft_wrap=True)


def show(root: Path, folder: Path) -> None:
    """Print the Pareto front of a finished sweep, and the cells without figures."""
    results = _results(root, folder)
    rows = results["points"]
    console.print(_table_of_recipes(folder) if RECIPE in rows[0] else _table(folder, rows))
    for line in results["without_figures"]:
        console.print(line)
    where = folder.relative_to(root)
    console.print(f"all {len(rows)} plans: {where}/points.csv, the picture: {where}/front.png")
    console.print(
        f"the fastest that keeps 99 %: python -m flows.sweep best {folder.name} --keeps 0.99",
    )
    uri = default_tracking_uri(root)
    shown, client = without_password(uri), mlflow_client(uri)
    if uri.startswith("http"):
        console.print(f"run record: {page_of_runs(shown, client)}")
    else:
        console.print(f"run record: mlflow ui --backend-store-uri {shown} serves {page_of_runs(MLFLOW_UI, client)}")


def _table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{folder.name}: Pareto front, from the most kept to the fastest", title_justify="left")
    for heading in ("cell", "settings", "plan"):
        table.add_column(heading, overflow="fold")
    for heading in ("kept", "over best dense", "over dense", "ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["on_front"]:
            table.add_row(
                str(row["cell"]),
                row["settings"],
                row["plan"],
                f"{100 * row['kept']:.1f} %",
                f"{row['vs_best_dense']:.2f}x",
                f"{row['vs_dense']:.2f}x",
                f"{row['median_ms']:.2f}",
            )
    return table


def _table_of_recipes(folder: Path) -> Table:
    """Return the table of a front: the best plans of every recipe, with what each of them takes."""
    title = f"{folder.name}: recipes, from the most kept to the fastest (* no other beats it in both)"
    table = Table(title=title, title_justify="left")
    for heading in ("recipe", "plan"):
        table.add_column(heading, overflow="fold")
    for heading in ("seeds", "kept", "over best dense", "over the best baseline", "FLOPs", "MiB", "memory"):
        table.add_column(heading, justify="right")
    for point in front_picture.shown(front.read(folder / "front.jsonl")):
        table.add_row(
            f"{'* ' if point.on_front else '  '}{point.recipe or 'the teacher'}",
            point.plan,
            str(len(point.seeds)),
            front.percent(point.quality, point.spread),
            f"{point.speed:.2f}x",
            front_picture.beside_baseline(point),
            front.percent(point.flops),
            f"{point.bytes / 2**20:.0f}",
            f"{point.memory_mib:.0f} MiB",
        )
    return table


def cells(folder: Path) -> None:
    """Print the history of every cell, at any time, and write it to cells.csv."""
    rows = history(folder)
    write_csv(folder / "cells.csv", rows)
    table = Table(title=f"{folder.name}: cells", title_justify="left")
    for heading in ("cell", "settings", "state", "made", "measured", "began (UTC)", "ended (UTC)", "stages that ran"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(str(value).removesuffix("+00:00") for value in row.values()))
    console.print(table)
    twice = [row["cell"] for row in rows if len(ran := row["stages"].split()) > len(set(ran))]
    which = f"of cells {', '.join(map(str, twice))}" if twice else "of no cell"
    again = sum(row["made"] > 1 or row["measured"] > 1 for row in rows)
    console.print(f"{again} resumed after an interruption; a stage ran to its end twice: {which}")


def best(root: Path, folder: Path, *, keeps: float | None = None, speedup: float | None = None) -> None:
    """Print the fastest plan that keeps a share of the quality, or the best that is so fast, and how to use it.

    FlowError, with the nearest ones, where no plan reaches it.
    """
    rows = _results(root, folder)["points"]
    figures = [(row["kept"], row["vs_best_dense"]) for row in rows]
    if keeps is not None:
        place, wanted = pareto.cheapest(figures, keeps), f"keeps {100 * keeps:g} %"
    else:
        assert speedup is not None
        place, wanted = pareto.cheapest([(speed, kept) for kept, speed in figures], speedup), f"runs at {speedup:g}x"
    if place is None:
        key, most = ("kept", "the most is") if keeps is not None else ("vs_best_dense", "the fastest are")
        near = sorted(rows, key=lambda row: -row[key])[: 1 if keeps is not None and RECIPE not in rows[0] else 3]
        listed = "; ".join(
            f"{100 * row['kept']:.1f} % at {row['vs_best_dense']:.2f}x (cell {row['cell']}, "
            f"{row.get(RECIPE) or row['settings']}, plan {row['plan']})"
            for row in near
        )
        raise FlowError(f"no plan of {folder.name} {wanted}; {most} {listed}")
    row = rows[place]
    lines = [
        f"keeps    {100 * row['kept']:.1f} % of the teacher's quality",
        f"speed    {row['vs_best_dense']:.2f}x the best dense plan"
        + (f", {row['vs_dense']:.2f}x dense float32" if "vs_dense" in row else ""),
        *([f"recipe   {row[RECIPE] or 'none: the teacher, dense'}"] if RECIPE in row else []),
        f"params   {row['settings']}",
        f"export   {row['export']}, plan {row['plan']}",
        f'use it   ffn2moe.open_export("{row["export"]}", "{row["plan"]}")',
    ]
    if row.get(RECIPE) != "":
        called = f"name={folder.name}-best {row.get('run') or row['settings']}"
        lines.append(f'register make run SET="{called}"  (from the cache, up to the benchmark)')
    if row["vs_best_dense"] <= 1 and row.get(RECIPE) != "":
        lines.insert(2, "         the best dense plan is at least as fast: nothing of this sweep pays on this machine")
    console.print("\n".join(lines))


def publish(root: Path, folder: Path) -> None:
    """Write a front into docs/results; it replaces the points of the same model on the same machine."""
    path = folder / "front.jsonl"
    if not path.is_file():
        raise FlowError(
            f"{folder.relative_to(root)} holds no finished front; begin or resume one: make front, or "
            "python -m flows.sweep run --recipes recipes/encoder.yaml"
        )
    new = front.read(path)
    measured = (new[0].model, new[0].machine)
    kept = [point for point in front.committed(root) if (point.model, point.machine) != measured]
    front.write([*kept, *new], root / front.FRONT)
    written = front_picture.write_page([*kept, *new], root / front.FRONT.parent)
    console.print(f"wrote {front.FRONT}, {', '.join(str(one.relative_to(root)) for one in written)}: look, and commit")


def _results(root: Path, folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise FlowError(
            f"{folder.relative_to(root)} holds no finished sweep; run the command that began it again to resume it"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def folder_of(root: Path, name: str | None) -> Path:
    """Return the folder of a sweep by its name (None: the one that ended last)."""
    if name is not None:
        if not (root / "sweeps" / name).is_dir():
            known = sorted(path.name for path in (root / "sweeps").glob("*"))
            raise FlowError(f"there is no sweep {name}; known sweeps: {', '.join(known) or 'none yet'}")
        return root / "sweeps" / name
    ended = sorted((root / "sweeps").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    if not ended:
        raise FlowError(f"no sweep has ended yet; begin one: python -m flows.sweep run {EXAMPLE}")
    return ended[-1].parent
