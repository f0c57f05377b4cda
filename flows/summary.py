"""How a run ends for a person: what was kept, what was gained, where things are, how to use them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flows.workspace import Workspace

_MEASURES = (
    ("retrieval.ndcg_at_10", "docstring retrieval, nDCG@10", 4),
    ("retrieval.mrr", "docstring retrieval, MRR", 4),
    ("stsb.spearman", "STS-B dev, Spearman x 100", 2),
    ("classification.ag_news.accuracy", "AG News, accuracy", 4),
    ("classification.sst2.accuracy", "SST-2, accuracy", 4),
)


def show(workspace: Workspace, uri: str, console: Console) -> None:
    """Prints the summary of a finished run, from the files it wrote."""
    quality = _json(workspace.root / "metrics" / "evaluate.json")
    plan = _json(workspace.root / "exports" / workspace.name / "plan.json")
    registered = _json(workspace.root / "metrics" / "register.json")
    manifest = _json(workspace.root / "exports" / workspace.name / "manifest.json")
    share, bound = _at(quality, "active_ffn_share"), _at(quality, "amdahl_bound")
    served = manifest["plans"][plan["default_plan"]]["retention"]
    parts = (
        Text("What was kept", style="bold"),
        kept(quality),
        Text(f"in float32; the plan {plan['default_plan']} keeps {100 * served:.1f} % of the teacher's nDCG@10"),
        Text(f"\nWhat was gained by the plan {plan['default_plan']}", style="bold"),
        gained(plan),
        Text(plan["reason"]),
        Text(f"{100 * share:.0f} % of the FFN is active; in equal arithmetic at most {bound:.2f}x (Amdahl)"),
        Text("\nWhere it is", style="bold"),
        _where(workspace, registered, uri),
    )
    console.print(
        Panel(Group(*parts), title=f"{workspace.name}: done", title_align="left", padding=(1, 2), expand=False)
    )
    console.print(_use(workspace, registered, uri), soft_wrap=True, highlight=False, markup=False)


def kept(quality: dict[str, Any]) -> Table:
    """Teacher, training-free mixture and student, measure by measure."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("teacher", "no training", "student", "retention"):
        table.add_column(column, justify="right")
    for key, label, digits in _MEASURES:
        values = [_at(quality, f"{model}.{key}") for model in ("teacher", "training_free", "student")]
        if None not in values:
            retention = values[2] / values[0] if values[0] else float("nan")
            table.add_row(label, *(f"{value:.{digits}f}" for value in values), f"{100 * retention:.1f} %")
    return table


def gained(plan: dict[str, Any]) -> Table:
    """The chosen plan, shape by shape, against dense float32 and against the best dense plan."""
    table = Table(box=None, pad_edge=False)
    table.add_column("batch x sequence, threads")
    for column in ("median", "over dense float32", "over the best dense"):
        table.add_column(column, justify="right")
    for row in plan["timings"].get(plan["default_plan"], []):
        table.add_row(
            f"{row['batch']} x {row['sequence']}, {row['threads']}",
            f"{row['median_ms']:.2f} ms",
            f"{row['speedup_vs_dense']:.2f}x",
            f"{row['speedup_vs_best_dense']:.2f}x",
        )
    return table


def _where(workspace: Workspace, registered: dict[str, Any], uri: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("export", _relative(workspace.export))
    table.add_row("report", _relative(workspace.report))
    aliases = " and ".join(registered["aliases"])
    table.add_row("registry", f"models:/{registered['model']}/{registered['version']}, alias {aliases}")
    for reason in registered["refused"]:
        table.add_row("", f"not champion: {reason}")
    table.add_row("run record", f"{_relative(_bin('mlflow'))} ui --backend-store-uri {uri}")
    return table


def _use(workspace: Workspace, registered: dict[str, Any], uri: str) -> str:
    alias = registered["aliases"][-1]
    export = _relative(workspace.export)
    python = f"import ffn2moe; print(ffn2moe.open_export('{export}').encode(['A sentence.']).shape)"
    return "\n".join(
        (
            "Use it:",
            f"  {_relative(_bin('ffn2moe'))} encode {export} 'A sentence.'",
            f'  {_relative(Path(sys.executable))} -c "{python}"',
            f"  MLFLOW_TRACKING_URI={uri} {_relative(_bin('mlflow'))} models serve "
            f"-m models:/{registered['model']}@{alias} --env-manager local --port 5001",
        )
    )


def _bin(name: str) -> Path:
    return Path(sys.executable).parent / name


def _relative(path: Path) -> str:
    """As a person in the current folder would type it."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
