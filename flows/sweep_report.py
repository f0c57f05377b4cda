"""Print what a sweep found: its Pareto front, the history of its cells, the cheapest good cell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.axes import EXAMPLE
from flows.study import history
from flows.sweep_compare import write_csv
from flows.workspace import FlowError
from tasks import compare
from tasks.store import MLFLOW_UI, default_tracking_uri, mlflow_client, page_of_runs, without_password

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False, soft_wrap=True)


def show(root: Path, folder: Path) -> None:
    """Print the Pareto front of a finished sweep, and the cells without figures."""
    results = _results(root, folder)
    rows = results["points"]
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
    console.print(table)
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


def best(root: Path, folder: Path, keeps: float) -> None:
    """Print the cheapest cell that keeps a share of the quality: its settings, its export, how to use it."""
    rows = _results(root, folder)["points"]
    found = [compare.Point(**{key: row[key] for key in compare.Point.__dataclass_fields__}) for row in rows]
    point = compare.cheapest_of(found, keeps)
    if point is None:
        most = max(rows, key=lambda row: row["kept"])
        raise FlowError(
            f"no plan of {folder.name} keeps {100 * keeps:g} %; the most is {100 * most['kept']:.1f} % "
            f"(cell {most['cell']}, {most['settings']}, plan {most['plan']})"
        )
    row = rows[found.index(point)]
    lines = [
        f"keeps    {100 * point.kept:.1f} % of the teacher's quality",
        f"speed    {point.vs_best_dense:.2f}x the best dense plan, {point.vs_dense:.2f}x dense float32",
        f"params   {row['settings']}",
        f"export   {row['export']}, plan {point.plan}",
        f'use it   ffn2moe.open_export("{row["export"]}", "{point.plan}")',
        f'register make run SET="name={folder.name}-best {row["settings"]}"  (from the cache, up to the benchmark)',
    ]
    if point.vs_best_dense <= 1:
        lines.insert(
            2, "         the best dense plan is at least as fast: no mixture of this sweep pays on this machine"
        )
    console.print("\n".join(lines))


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
