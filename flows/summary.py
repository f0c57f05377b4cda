"""Print the summary of a run: what was kept, what was gained, where things are, how to use them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ffn2moe.planning.shipping import Size
from flows.promote import Decision
from flows.workspace import Workspace
from tasks import front, front_beside
from tasks.measures import SHOWN, at, headline, usage
from tasks.params import load_params
from tasks.registry import CHALLENGER, CHAMPION
from tasks.store import MLFLOW_UI, mlflow_client, page_of_runs, without_password


def show(workspace: Workspace, decision: Decision, uri: str, console: Console) -> None:
    """Print the summary of a finished run, from its files."""
    quality = _json(workspace.root / "metrics" / "evaluate.json")
    plan = _json(workspace.root / "exports" / workspace.name / "plan.json")
    manifest = _json(workspace.root / "exports" / workspace.name / "manifest.json")
    share, bound = quality["active_ffn_share"], quality["amdahl_bound"]
    used = plan["plans"]
    served = " and ".join(f"{100 * manifest['plans'][name]['retention']:.1f} %" for name in used)
    named = f"{'the plan' if len(used) == 1 else 'the plans'} {' and '.join(used)}"
    label = headline(quality).label
    parts = (
        Text("What was kept", style="bold"),
        kept(quality),
        Text(f"in float32; {named} {'keeps' if len(used) == 1 else 'keep'} {served} of the teacher's ({label})"),
        Text(f"\nWhat was gained by {named}", style="bold"),
        gained(plan),
        Text(plan["reason"]),
        Text(f"{100 * share:.0f} % of the FFN is active; in equal arithmetic at most {bound:.2f}x (Amdahl)"),
        *_baselines(workspace, quality, plan),
        Text("\nWhere it is", style="bold"),
        _where(workspace, decision, manifest, uri),
    )
    console.print(
        Panel(Group(*parts), title=Text(f"{workspace.name}: done"), title_align="left", padding=(1, 2), expand=False)
    )
    console.print(
        _use(workspace, decision, manifest, uri),
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def kept(quality: dict[str, Any]) -> Table:
    """Return a table of teacher, training-free mixture and student, one row for each measure."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("teacher", "no training", "student", "retention"):
        table.add_column(column, justify="right")
    for shown in SHOWN:
        values = [at(quality[model], shown.path) for model in ("teacher", "training_free", "student")]
        if values[2] is None:
            continue
        retention = at(quality["retention"], shown.path)
        table.add_row(
            shown.label,
            *("" if value is None else shown.form.format(value) for value in values),
            "" if retention is None else f"{100 * retention:.1f} %",
        )
    return table


def gained(plan: dict[str, Any]) -> Table:
    """Return a table of the chosen plans, against dense float32 and the best dense plan with its noise.

    There is one for each shape and, where the model reads them, one for lists of texts.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("batch x sequence, threads")
    table.add_column("plan")
    for column in ("median", "over dense float32", "over the best dense"):
        table.add_column(column, justify="right")
    for row in plan["choices"]:
        place = ("batch", "sequence", "threads", "phase")
        timed = next(one for one in plan["timings"][row["plan"]] if all(one[key] == row[key] for key in place))
        is_best = row["plan"] == row["best_dense_plan"]
        table.add_row(
            f"{row['batch']} x {row['sequence']}, {row['threads']}"
            + ("" if row["phase"] == "whole" else f", {row['phase']}"),
            row["plan"],
            f"{row['median_ms']:.2f} ms",
            f"{timed['speedup_vs_dense']:.2f}x",
            "1.00x, it is the best" if is_best else _with_noise(row),
        )
    for row in plan.get("lists", []):
        is_best = row["plan"] == row["best_dense_plan"]
        speed = "1.00x, it is the best" if is_best else _with_noise(row)
        table.add_row(f"lists of texts, {row['threads']}", row["plan"], f"{row['median_ms']:.2f} ms", "", speed)
    return table


def _baselines(workspace: Workspace, quality: dict[str, Any], plan: dict[str, Any]) -> list[RenderableType]:
    """Return the nearest baselines of the committed front; nothing where it has none of this model."""
    model = load_params(workspace.root / "params.yaml").teacher.source
    found = front_beside.beside(front.committed(workspace.root), model, quality, plan)
    if found is None:
        return []
    table = Table(box=None, pad_edge=False)
    for place, head in enumerate(found.heads):
        table.add_column(head, justify="right" if 0 < place < len(found.heads) - 1 else "left")
    for row in found.rows:
        table.add_row(*row)
    return [
        Text(f"\nBeside the baselines of {front.FRONT}", style="bold"),
        table,
        Text(found.sentence),
        Text(found.note),
    ]


def _with_noise(row: dict[str, Any]) -> str:
    noise = f"{row['low']:.2f} to {row['high']:.2f}" if row["high"] is not None else "too few rounds to know the noise"
    return f"{row['speedup_vs_best_dense']:.2f}x ({noise})"


def _where(workspace: Workspace, decision: Decision, manifest: dict[str, Any], uri: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("export", f"{_relative(workspace.export)}: {Size(**manifest['bytes'])}")
    if "container" in manifest:
        container = f"{_relative(workspace.export / 'container')} ({manifest['container']['name']})"
        table.add_row("container", f"{container}: transformers and vLLM can load it")
    for kind, file in manifest.get("gguf", {}).get("files", {}).items():
        table.add_row("llama.cpp", f"{_relative(workspace.export / file)} ({kind})")
    table.add_row("report", _relative(workspace.report))
    table.add_row("registry", f"models:/{decision.model}/{decision.version}, alias {' and '.join(_aliases(decision))}")
    for reason in decision.refused:
        table.add_row("", f"not champion: {reason}")
    served = uri.startswith("http")
    table.add_row("run record", page_of_runs(without_password(uri) if served else MLFLOW_UI, mlflow_client(uri)))
    if not served:
        table.add_row("", f"served by {_relative(_bin('mlflow'))} ui --backend-store-uri {without_password(uri)}")
    return table


def _aliases(decision: Decision) -> tuple[str, ...]:
    return (CHALLENGER, CHAMPION) if decision.state in ("promoted", "unchanged") else (CHALLENGER,)


def _use(workspace: Workspace, decision: Decision, manifest: dict[str, Any], uri: str) -> str:
    export = _relative(workspace.export)
    command, call = usage(manifest, export)
    python = f"import ffn2moe; export = ffn2moe.open_export('{export}'); print({call})"
    return "\n".join(
        (
            "Use it:",
            f"  {_relative(_bin('ffn2moe'))} {command}",
            f'  {_relative(Path(sys.executable))} -c "{python}"',
            f"  MLFLOW_TRACKING_URI={without_password(uri)} {_relative(_bin('mlflow'))} models serve "
            f"-m models:/{decision.model}@{_aliases(decision)[-1]} --env-manager local --port 5001",
        )
    )


def _bin(name: str) -> Path:
    return Path(sys.executable).parent / name


def _relative(path: Path) -> str:
    """Return a path as a person in the current folder would type it."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
