"""`ffn2moe info`: show an export: its experts, plans, quality and speed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import PROBLEMS
from ffn2moe.commands._command import Command, add_path, bold, facts, milliseconds

if TYPE_CHECKING:
    from ffn2moe.spec import MoESpec

# What a plan's quality is measured by, in the order of preference, and the column's title.
QUALITY = {"retrieval_ndcg_at_10": "nDCG@10", "perplexity": "perplexity", "top1_agreement": "same choice"}
SHOWN_LABELS = 6
PHASES = {"whole": "a", "prefill": "reading", "decode": "a token after", "request": "a request of"}


def run(options: argparse.Namespace) -> int:
    from ffn2moe.progress import Screen
    from ffn2moe.runtime.files import read_manifest, read_plan
    from ffn2moe.runtime.plans import default_plan

    path: Path = options.path
    manifest, measured = read_manifest(path), read_plan(path)
    plans = manifest["plans"]
    chosen = default_plan(path, plans) if plans else "none: there are no ONNX graphs"
    screen = Screen()
    screen.print(facts(_facts(path, manifest, measured, chosen)))
    if plans:
        screen.print(_quality(path, plans, chosen))
    for reason in manifest.get("refused", {}).values():
        screen.say(f"not made: {reason}")
    if manifest.get("left_out"):
        screen.say(f"not in this export: {', '.join(manifest['left_out'])}; {manifest['bring_back']} brings them back")
    if measured:
        for phase in dict.fromkeys(row.get("phase", "whole") for row in measured["timings"][chosen]):
            screen.print(_speed(measured, phase, chosen))
        for reason in (measured["reason"], *dict.fromkeys(row["reason"] for row in measured.get("lists", ()))):
            screen.say(f"{reason} (on {measured['machine']['cpu']})")
    return 0


def _facts(path: Path, manifest: dict[str, Any], measured: dict[str, Any] | None, chosen: str) -> list[tuple[str, str]]:
    from ffn2moe.planning.shipping import Size
    from ffn2moe.spec import MoESpec

    spec = MoESpec.from_dict(manifest["spec"])
    widths = " and ".join(dict.fromkeys(str(shape.width) for shape in spec.stacks))
    rows = [
        ("export", str(path)),
        ("teacher", spec.teacher),
        ("model", f"{spec.model_class}, {' and '.join(one.describe_layers() for one in spec.stacks)}, width {widths}"),
        ("experts", _experts(spec)),
    ]
    if spec.elastic:
        rows.append(("budgets", _budgets(spec)))
    if not spec.is_dense:
        rows += [
            ("gate", spec.gate),
            ("partition", spec.partition + (f", then fitted to a task: {spec.shrunk}" if spec.shrunk else "")),
        ]
    rows += [
        ("gives", _output(spec, manifest.get("model", {}))),
        ("default plan", chosen + ("" if measured or not manifest["plans"] else " (not measured yet)")),
    ]
    if "portable" in manifest:
        rows.append(("any runtime", f"{manifest['portable']}: standard ONNX ops alone"))
    if "bytes" in manifest:
        rows.append(("size", str(Size(**manifest["bytes"]))))
    prompts = [name for name, text in spec.sentence.prompts if text] if spec.sentence else []
    if prompts:
        default = spec.sentence.default_prompt_name if spec.sentence else None
        rows.insert(-1, ("prompts", ", ".join(prompts) + (f" (by default {default})" if default else "")))
    by_shape = dict.fromkeys(row["plan"] for row in (measured or {}).get("choices", ()))
    if len(by_shape) > 1:
        rows.append(("by shape", " and ".join(by_shape)))
    lists = dict.fromkeys(row["plan"] for row in (measured or {}).get("lists", ()))
    if lists:
        rows.append(("lists of texts", " or ".join(lists)))
    return rows


def _experts(spec: MoESpec) -> str:
    if spec.is_dense:
        neurons = " and ".join(dict.fromkeys(shape.describe_neurons() for shape in spec.stacks))
        return f"none: a dense model, FFNs of {neurons}: {100 * spec.active_share:.0f} % of the teacher's FFNs"
    neurons = " or ".join(dict.fromkeys(shape.describe("expert_width") for shape in spec.stacks))
    shared = " and ".join(dict.fromkeys(shape.describe("shared_width") for shape in spec.stacks if shape.shared_width))
    return (
        f"{spec.num_experts} of {neurons} neurons a layer, {_choice(spec)}"
        + (f", and a shared one of {shared}" if shared else "")
        + f": {100 * spec.active_share:.0f} % of the FFN is active"
    )


def _choice(spec: MoESpec) -> str:
    """Return how many of its experts each token or text uses."""
    from ffn2moe.choices import ROUTINGS, SELECTIONS

    return f"{SELECTIONS[spec.selection].describe(spec)} chosen by each {ROUTINGS[spec.routing].unit}"


def _budgets(spec: MoESpec) -> str:
    """Return the numbers of experts that an elastic model serves, and their shares of the FFN."""
    shares = (f"{active} ({100 * spec.at(active).active_share:.0f} %)" for active in spec.budgets)
    return f"{', '.join(shares)} of the experts active, with the same weights"


def _output(spec: MoESpec, model: dict[str, Any]) -> str:
    """Return what the model computes."""
    if spec.head == "embedding":
        assert spec.sentence is not None
        width = spec.sentence.embedding_width(spec.width)
        return f"embeddings: {width} numbers, {spec.sentence.describe()}, up to {spec.max_length} tokens"
    if spec.head in ("causal", "seq2seq"):
        longest = model.get("positions")
        limit = f", up to {longest} tokens" if longest else ""
        return ("text that continues a prompt" if spec.head == "causal" else "text that answers a source") + limit
    read = model.get("reads", "text")
    if spec.problem is None:
        return f"hidden states of {read}"
    labels = model.get("labels", [])
    shown = ", ".join(labels[:SHOWN_LABELS]) + (", ..." if len(labels) > SHOWN_LABELS else "")
    of = f"each token of {read}" if spec.head == "token_classification" else read
    return f"{PROBLEMS[spec.problem].gives} ({shown}) of {of}"


def _quality(path: Path, plans: dict[str, Any], chosen: str) -> Any:
    """Return the table of plans: size, distance from PyTorch, and quality where it was measured."""
    from rich.table import Table

    key = next((key for key in QUALITY if all(key in entry for entry in plans.values())), None)
    table = Table(title="Plans", title_justify="left")
    table.add_column("plan")
    for column in ("size", "from PyTorch", *((QUALITY[key], "of the teacher's") if key else ())):
        table.add_column(column, justify="right")
    for plan, entry in plans.items():
        files = [path / name for name in (entry["file"], *entry.get("more", {}))]
        whole = all(file.is_file() for file in files)
        cells = [
            _mebibytes(sum(file.stat().st_size for file in files)) if whole else "missing",
            f"{entry['parity_max_abs']:.1e}",
        ]
        if key:
            cells += [f"{entry[key]:.4f}", f"{100 * entry['retention']:.1f} %"]
        table.add_row(bold(plan) if plan == chosen else plan, *cells)
    return table


def _speed(measured: dict[str, Any], phase: str, chosen: str) -> Any:
    """Return the table of times in one phase: a plan a row, a shape a column."""
    from rich.table import Table

    timings = measured["timings"]
    over = "dense" if "dense" in timings else measured["best_dense_plan"]
    title = f"Time of {PHASES[phase]} batch x sequence, and speed over {over}"
    table = Table(title=title, title_justify="left")
    table.add_column("plan")
    rows = {plan: [row for row in timed if row.get("phase", "whole") == phase] for plan, timed in timings.items()}
    for row in rows[chosen]:
        table.add_column(f"{row['batch']} x {row['sequence']}", justify="right")
    for plan, timed in rows.items():
        times = (f"{milliseconds(row['median_ms'])} {row['speedup_vs_dense']:.2f}x" for row in timed)
        table.add_row(bold(plan) if plan == chosen else plan, *times)
    return table


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.{0 if size >= 10 * 2**20 else 1}f} MiB"


ROW = Command("show an export: experts, plans, quality, speed", add_path, run)
