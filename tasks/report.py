"""Stage 8: write the report, one page that needs no network and no other file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffn2moe.planning.shipping import Size
from ffn2moe.spec import MoESpec
from tasks import figures, front
from tasks.front_beside import beside
from tasks.measures import GENERAL, SHOWN, TASKS_KEPT, at, headline, usage
from tasks.params import Gate, Params
from tasks.stage import StageRun, main
from tasks.timings import timings

# The columns of the table of layers: key in a row of `layers` or of `agreement`, heading, format.
LAYER_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("oracle_error", "error, oracle", "{:.3f}"),
    ("router_error", "error, router", "{:.3f}"),
    ("gap", "gap", "{:.3f}"),
    ("captured_energy", "energy captured", "{:.3f}"),
    ("router_recall", "recall", "{:.2f}"),
    ("mean_active", "experts a token", "{:.2f}"),
    ("max_over_mean_load", "largest load over mean", "{:.2f}"),
    ("dead_experts", "dead experts", "{}"),
    ("tokens", "agreement, tokens", "{:.3f}"),
    ("texts", "agreement, texts", "{:.3f}"),
)


def run(stage: StageRun) -> None:
    """Write reports/report.html."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    root, params = stage.root, stage.params
    export = root / "exports" / params.name
    quality, plan = _json(root / "metrics/evaluate.json"), _json(export / "plan.json")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,  # a missing key is an error, not a gap in the page
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: f"{100 * share:.1f}\N{NO-BREAK SPACE}%",
        "group": lambda n: f"{n:,}",
        # Text between backticks becomes <code>; everything else is escaped.
        "code": lambda text: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))),
    }
    rows = benchmark_rows(quality)
    timed = timings(plan)
    exported = root / "models/exported"  # with the plans that lost, too
    head, manifest = quality.get("head", "embedding"), _json(exported / "manifest.json")
    page = environment.get_template("report.html.j2").render(
        params=params,
        settings=params.flat(),
        quality=quality,
        rows=rows,
        head=head,
        words=headline(quality),
        usage=usage(manifest, f"exports/{params.name}"),
        headline=headline(quality),
        verdict=verdict(params.gate, quality, timed, plan),
        advice=advice(params, quality, timed, trained=_json(root / "metrics/distill.json")["steps"]),
        sizes=sizes(exported, manifest, timed),
        shipped=str(Size(**_json(export / "manifest.json")["bytes"])),
        timed=timed,
        beside=beside(front.committed(root), params.teacher.source, quality, plan),
        prepared=_json(root / "metrics/prepare.json"),
        manifest=manifest,
        shape=shape_of(manifest["spec"]),
        made=made_of(manifest["spec"]),
        layers=layer_table(quality),
        figures={
            "retention": figures.retention([row for row in rows if "student" in row], params.gate.min_retention),
            "speed": figures.speed(timed["drawn"]["plans"], timed["drawn"]["shapes"], quality["amdahl_bound"]),
            **experts(_json(root / "metrics/train_router.json")["layers"], quality),
            **loss_curves(root / "metrics/plots"),
        },
    )
    stage.write_text("reports/report.html", page)
    stage.say(f"reports/report.html, {len(page) / 1024:.0f} KiB")


def verdict(
    gate: Gate, quality: Mapping[str, Any], timed: Mapping[str, Any], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Return whether the student passes the gate, the reasons if not, and the figures behind them."""
    path = headline(quality).path
    kept = at(quality["retention"], path)
    shown = timed["shown"]
    # The gate judges the whole workload, with the least favourable number of threads.
    gained = min((row["speedup_vs_best_dense"] for row in plan.get("by_threads", [])), default=shown["vs_best_dense"])
    reasons = []
    if kept < gate.min_retention:
        reasons.append(f"it keeps {100 * kept:.1f} % of the teacher, and {100 * gate.min_retention:g} % is required")
    tasks = at(quality["retention"], TASKS_KEPT)
    if tasks is not None and tasks < gate.min_tasks_kept:
        reasons.append(
            f"it keeps {100 * tasks:.1f} % of the teacher's accuracy above chance, and {100 * gate.min_tasks_kept:g} % "
            "is required"
        )
    general = at(quality["student"], GENERAL)
    if general is not None and general < gate.min_general:
        reasons.append(
            f"on general sentences, which it did not learn from, its rank correlation with the teacher is "
            f"{general:.3f}, and {gate.min_general:g} is required"
        )
    if not shown["chosen"]:
        reasons.append(plan["reason"])
    elif gained <= gate.min_speedup:
        reasons.append(
            f"its speed is {gained:.2f} times that of the best dense plan ({timed['best_dense']}), and more than "
            f"{gate.min_speedup:g} times is required"
        )
    return {
        "passed": not reasons,
        "reasons": reasons,
        "kept": kept,
        "interval": at(quality["retention_interval"], path),
        "workload": next((row for row in plan.get("by_threads", []) if row["speedup_vs_best_dense"] == gained), None),
    }


def advice(params: Params, quality: Mapping[str, Any], timed: Mapping[str, Any], *, trained: int) -> list[str]:
    """Return what to do next, by the verdict and the `trained` steps; code stands between backticks."""
    kept = at(quality["retention"], headline(quality).path)
    folder = f"exports/{params.name}"
    steps = []
    if kept < params.gate.min_retention:
        steps.append(
            f"To keep more: train longer (`distill.steps={2 * trained or 700}`) or {_keep_more(params)}, "
            "and distil on texts like those of its use (`data.corpus`)."
        )
    if not timed["shown"]["chosen"]:
        steps.append(
            f'Until then serve the dense model: `ffn2moe.open_export("{folder}")` opens the fastest dense '
            "plan on this machine."
        )
        steps.append(
            "For more speed: fewer active neurons (`decompose.num_active`, `decompose.num_experts`) or fewer layers "
            "(`decompose.keep_layers`); `make sweep` tries several at once."
        )
    elif kept >= params.gate.min_retention:
        steps.append(
            f'Use it: `ffn2moe.open_export("{folder}")` opens the fastest plan on this machine. On another '
            f"processor another plan may be faster: `make plans NAME={params.name}` puts all of them into the folder, "
            f"and `ffn2moe plan {folder}` measures them there."
        )
    return steps


def _keep_more(params: Params) -> str:
    """Return how a student can be larger."""
    settings = params.decompose
    if settings.num_experts == 1:
        return "keep more layers and neurons (`decompose.keep_layers`, `decompose.ffn_width`)"
    return f"run more experts (`decompose.num_active={min(settings.most_experts, 2 * settings.num_active)}`)"


def sizes(export: Path, manifest: Mapping[str, Any], timed: Mapping[str, Any]) -> dict[str, float]:
    """Return the MiB of the graphs of the shown plan and of dense ones, with the weights beside a graph."""

    def of(plan: str) -> float:
        file = export / manifest["plans"][plan]["file"]
        return sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*")) / 2**20

    return {"shown": of(timed["shown"]["name"]), "best_dense": of(timed["best_dense"]), "dense": of("dense")}


def benchmark_rows(quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each figure of the run: numbers as text and, where a share is kept, it with its interval."""
    rows = []
    for shown in SHOWN:
        if at(quality["student"], shown.path) is None:
            continue
        row: dict[str, Any] = {"label": shown.label, "figures": {}}
        for model in ("teacher", "training_free", "student"):
            figure = at(quality[model], shown.path)
            row["figures"][model] = "" if figure is None else shown.form.format(figure)
        if at(quality["retention"], shown.path) is not None:
            for model, suffix in (("training_free", "_training_free"), ("student", "")):
                interval = at(quality[f"retention_interval{suffix}"], shown.path)
                row[model] = {"value": at(quality[f"retention{suffix}"], shown.path), **interval}
        rows.append(row)
    return rows


def layer_table(quality: Mapping[str, Any]) -> list[list[str]]:
    """Return the figures of every layer as rows of text, below a row of headings; nothing without experts."""
    rows = quality["layers"]
    if not rows:
        return []
    if quality["agreement"]:
        rows = [{**row, **more} for row, more in zip(rows, quality["agreement"]["layers"], strict=True)]
    columns = [column for column in LAYER_COLUMNS if column[0] in rows[0]]
    table = [["layer", *(heading for _, heading, _ in columns)]]
    for row in rows:
        table.append([str(row["layer"]), *(form.format(row[key]) for key, _, form in columns)])
    return table


def experts(routed: Sequence[Mapping[str, Any]], quality: Mapping[str, Any]) -> dict[str, str]:
    """Draw the errors of the layers and the load of their experts; a student without experts has no drawing.

    `domains` shows which experts the texts of each source use, in the layer whose experts agree most with the sources.
    """
    if not quality["layers"]:
        return {}
    drawn = {
        "layers_before": figures.layers(routed),
        "layers_after": figures.layers(quality["layers"]),
        "load": figures.load([row["load"] for row in quality["layers"]]),
    }
    agreement = quality["agreement"]
    if not agreement:
        return drawn
    telling = max(agreement["layers"], key=lambda row: row["tokens"])
    return drawn | {"domains": figures.load(telling["load_CE"], list(agreement["texts"]))}


def shape_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the sizes of the FFNs and the experts a token runs, as text; several stacks follow each other."""

    shapes = MoESpec.from_dict(dict(spec)).stacks

    def each(key: str) -> str:
        return " and ".join(dict.fromkeys(str(getattr(shape, key)) for shape in shapes))

    def widths(key: str) -> str:
        return " and ".join(dict.fromkeys(shape.describe(key) for shape in shapes))

    varied = spec.get("active_per_layer")
    return {
        "active": f"{', '.join(map(str, varied))} in the layers in turn" if varied else str(spec["num_active"]),
        "layers": " + ".join(str(stack["num_layers"]) for stack in spec["stacks"]),
        **{key: each(key) for key in ("width", "activation")},
        **{key: widths(key) for key in ("ffn_width", "expert_width", "shared_width")},
        "gated": "gated " if all(stack["gated"] for stack in spec["stacks"]) else "",
    }


def made_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the student is in words: a mixture or a dense model, and of which parts of its teacher."""
    whole = MoESpec.from_dict(dict(spec))
    layers = " and ".join(shape.describe_layers() for shape in whole.stacks)
    neurons = " and ".join(dict.fromkeys(shape.describe_neurons() for shape in whole.stacks))
    if whole.is_dense:
        title = f"a dense model of {layers}, with FFNs of {neurons}"
    else:
        title = (
            f"{layers}, each FFN of {neurons} decomposed into {whole.num_experts} experts; a token runs "
            f"{shape_of(spec)['active']}"
        )
    return {"dense": whole.is_dense, "kind": "student" if whole.is_dense else "mixture", "title": title}


def loss_curves(folder: Path) -> dict[str, str]:
    """Draw the losses; a stage that made no step has no drawing."""
    drawings = {}
    for name, label in (("train_router", "router loss"), ("distill", "distillation loss")):
        series: dict[str, tuple[list[float], list[float]]] = {}
        for row in _csv(folder / f"{name}.csv"):
            steps, losses = series.setdefault(row.get("layer", ""), ([], []))
            steps.append(float(row["step"]))
            losses.append(float(row["loss"]))
        if any(len(steps) > 1 for steps, _ in series.values()):
            drawings[name] = figures.curves(series, label)
    return drawings


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _csv(path: Path) -> Sequence[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


if __name__ == "__main__":
    main("report", run, torch=False)
