"""Stage 8: one page that says what came of it, and shows it; it needs no network and no other file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffn2moe.runtime.plans import is_dense
from tasks import figures
from tasks.measures import at, headline
from tasks.params import Gate, Params
from tasks.stage import StageRun, main

BENCHMARKS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("language", "perplexity"), "Perplexity", "{:.3f}"),
    (("to_teacher", "agreement"), "Agreement with the teacher", "{:.4f}"),
    (("retrieval", "ndcg_at_10"), "Retrieval, nDCG@10", "{:.4f}"),
    (("retrieval", "mrr"), "Retrieval, MRR", "{:.4f}"),
    (("stsb", "spearman"), "STS-B, Spearman × 100", "{:.2f}"),
    (("classification", "ag_news", "accuracy"), "AG News, accuracy", "{:.4f}"),
    (("classification", "sst2", "accuracy"), "SST-2, accuracy", "{:.4f}"),
)

# How the page speaks of models with each head: what is kept, what distillation looks at, and what examples show.
WORDS = {
    "embedding": {
        "kept": "retrieval quality",
        "learnt": "Hidden states and embeddings against the dense teacher’s",
        "examples": "What held-out queries find",
    },
    "causal": {
        "kept": "perplexity",
        "learnt": "The distribution of the next token against the dense teacher’s",
        "examples": "How each model goes on, always with its likeliest token, after the beginning of a held-out text.",
    },
    "seq2seq": {
        "kept": "choice of tokens",
        "learnt": "The distribution of the next token against the dense teacher’s, in the teacher’s own answers",
        "examples": "What each model answers to a held-out text, always with its likeliest token.",
    },
    "classification": {
        "kept": "choice of classes",
        "learnt": "The distribution over the classes against the dense teacher’s",
        "examples": "The most probable class of held-out texts.",
    },
}
# What is known of each layer: where it stands in a row of `layers`, or of `agreement`, its heading, how it is written.
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
PHASES = {"whole": "", "prefill": "prefill", "decode": "decode, a token", "request": "whole request"}


def run(stage: StageRun) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    root, params = stage.root, stage.params
    export = root / "exports" / params.name
    quality, plan = _json(root / "metrics/evaluate.json"), _json(export / "plan.json")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,  # a key that is missing is an error, not a hole in the page
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: f"{100 * share:.1f}\N{NO-BREAK SPACE}%",
        "group": lambda n: f"{n:,}",
        # `code` of a text as HTML; everything else is escaped.
        "code": lambda text: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))),
    }
    rows = benchmark_rows(quality)
    timed = timings(plan)
    head, manifest = quality.get("head", "embedding"), _json(export / "manifest.json")
    page = environment.get_template("report.html.j2").render(
        params=params,
        settings=params.flat(),
        quality=quality,
        rows=rows,
        head=head,
        words=WORDS[head],
        headline=headline(quality),
        verdict=verdict(params.gate, quality, timed, plan),
        advice=advice(params, quality, timed),
        sizes=sizes(export, manifest, timed),
        timed=timed,
        prepared=_json(root / "metrics/prepare.json"),
        manifest=manifest,
        shape=shape_of(manifest["spec"]),
        layers=layer_table(quality),
        figures={
            "retention": figures.retention(rows, params.gate.min_retention),
            "speed": figures.speed(timed["drawn"]["plans"], timed["drawn"]["shapes"], quality["amdahl_bound"]),
            "layers_before": figures.layers(_json(root / "metrics/train_router.json")["layers"]),
            "layers_after": figures.layers(quality["layers"]),
            "load": figures.load([row["load"] for row in quality["layers"]]),
            **domains(quality),
            **loss_curves(root / "metrics/plots"),
        },
    )
    stage.write_text("reports/report.html", page)
    stage.say(f"reports/report.html, {len(page) / 1024:.0f} KiB")


def verdict(
    gate: Gate, quality: Mapping[str, Any], timed: Mapping[str, Any], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """What a person must know first: is it worth having, and if not, why."""
    path = headline(quality).path
    kept = at(quality["retention"], path)
    shown = timed["shown"]
    # As the gate does: over the whole workload, on the least favourable number of threads.
    gained = min((row["speedup_vs_best_dense"] for row in plan.get("by_threads", [])), default=shown["vs_best_dense"])
    reasons = []
    if kept < gate.min_retention:
        reasons.append(f"it keeps {100 * kept:.1f} % of the teacher, and {100 * gate.min_retention:g} % is asked")
    if not shown["chosen"]:
        reasons.append(plan["reason"])
    elif gained <= gate.min_speedup:
        reasons.append(
            f"at {gained:.2f} times the speed of the best dense plan ({timed['best_dense']}) "
            f"it is not above the {gate.min_speedup:g} that is asked"
        )
    return {
        "passed": not reasons,
        "reasons": reasons,
        "kept": kept,
        "interval": at(quality["retention_interval"], path),
        "workload": next((row for row in plan.get("by_threads", []) if row["speedup_vs_best_dense"] == gained), None),
    }


def advice(params: Params, quality: Mapping[str, Any], timed: Mapping[str, Any]) -> list[str]:
    """What to do next, by the verdict: code among it is between backticks."""
    kept = at(quality["retention"], headline(quality).path)
    folder = f"exports/{params.name}"
    told = []
    if kept < params.gate.min_retention:
        more = min(params.decompose.num_experts, 2 * params.decompose.num_active)
        told.append(
            f"To keep more: train longer (`distill.steps={2 * params.distill.steps or 700}`) or run more experts "
            f"(`decompose.num_active={more}`), and distil on texts like those it is for (`data.corpus`)."
        )
    if not timed["shown"]["chosen"]:
        told.append(
            f'Until then serve the dense model: `ffn2moe.open_export("{folder}")` opens the dense plan that is '
            "fastest here."
        )
        told.append(
            "For more speed: fewer active neurons (`decompose.num_active`, `decompose.num_experts`); "
            "`make sweep` tries several at once."
        )
    elif kept >= params.gate.min_retention:
        told.append(
            f'Use it: `ffn2moe.open_export("{folder}")` opens the fastest plan for this machine. Another processor '
            f"may prefer another: `ffn2moe plan {folder}` measures there."
        )
    return told


def sizes(export: Path, manifest: Mapping[str, Any], timed: Mapping[str, Any]) -> dict[str, float]:
    """MiB of the graphs of the plan that is shown and of dense ones, with weights that lie beside a graph."""

    def of(plan: str) -> float:
        file = export / manifest["plans"][plan]["file"]
        return sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*")) / 2**20

    return {"shown": of(timed["shown"]["name"]), "best_dense": of(timed["best_dense"]), "dense": of("dense")}


def benchmark_rows(quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each benchmark that was run: the three figures as text, and what each mixture keeps, with its interval."""
    rows = []
    for path, label, form in BENCHMARKS:
        if at(quality["student"], path) is None:
            continue
        row: dict[str, Any] = {"label": label, "figures": {}}
        for model in ("teacher", "training_free", "student"):
            figure = at(quality[model], path)
            row["figures"][model] = "" if figure is None else form.format(figure)
        for model, suffix in (("training_free", "_training_free"), ("student", "")):
            interval = at(quality[f"retention_interval{suffix}"], path)
            row[model] = {"value": at(quality[f"retention{suffix}"], path), **interval}
        rows.append(row)
    return rows


def layer_table(quality: Mapping[str, Any]) -> list[list[str]]:
    """What is known of every layer, as rows of text under a row of headings."""
    rows = quality["layers"]
    if quality["agreement"]:
        rows = [{**row, **more} for row, more in zip(rows, quality["agreement"]["layers"], strict=True)]
    columns = [column for column in LAYER_COLUMNS if column[0] in rows[0]]
    table = [["layer", *(heading for _, heading, _ in columns)]]
    for row in rows:
        table.append([str(row["layer"]), *(form.format(row[key]) for key, _, form in columns)])
    return table


def domains(quality: Mapping[str, Any]) -> dict[str, str]:
    """The drawing of which experts the texts of each source use, in the layer whose experts tell most of it."""
    agreement = quality["agreement"]
    if not agreement:
        return {}
    telling = max(agreement["layers"], key=lambda row: row["tokens"])
    return {"domains": figures.load(telling["load_CE"], list(agreement["texts"]))}


def shape_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Sizes of the FFNs, and how many experts a token runs, as text; of several stacks one after the other."""

    def each(key: str) -> str:
        return " and ".join(dict.fromkeys(str(stack[key]) for stack in spec["stacks"]))

    varied = spec.get("active_per_layer")
    return {
        "active": f"{', '.join(map(str, varied))} in the layers in turn" if varied else str(spec["num_active"]),
        "layers": " + ".join(str(stack["num_layers"]) for stack in spec["stacks"]),
        **{key: each(key) for key in ("width", "ffn_width", "expert_width", "shared_width", "activation")},
        "gated": "gated " if all(stack["gated"] for stack in spec["stacks"]) else "",
    }


def timings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Every plan at every shape, in the order they were timed; dense plans first."""
    default = plan["default_plan"]
    keys = [_key(row) for row in plan["timings"][default]]
    # One plan for all, or for each shape its own.
    choices = plan.get("choices") or [{**row, "plan": default} for row in plan["timings"][default]]
    chosen_at = {_key(row): row["plan"] for row in choices}
    several_threads = len({threads for _, _, threads, _ in keys}) > 1
    names = sorted(plan["timings"], key=lambda name: (not is_dense(name), name not in chosen_at.values(), name))
    plans = []
    for name in names:
        by_shape = {_key(row): row for row in plan["timings"][name]}
        if not by_shape.keys() >= set(keys):  # it gave up at some shape: no plan to compare
            continue
        rows = [by_shape[key] for key in keys]
        plans.append(
            {
                "name": name,
                "dense": is_dense(name),
                "chosen": name in chosen_at.values(),
                "chosen_at": [chosen_at.get(key, default) == name for key in keys],
                "milliseconds": [row["median_ms"] for row in rows],
                "speedups": [row["speedup_vs_dense"] for row in rows],
                "vs_best_dense": [row["speedup_vs_best_dense"] for row in rows],
            }
        )
    # The gate looks at all the work of the largest shape, and at the least favourable number of threads there. Shown
    # is the plan that was chosen or, where dense won, the mixture that came nearest.
    whole = [place for place, key in enumerate(keys) if key[3] in ("whole", "request")]
    largest = max(keys[place][0] * keys[place][1] for place in whole)
    places = [place for place in whole if keys[place][0] * keys[place][1] == largest]
    mixtures = [one for one in plans if not one["dense"]]
    best = next(
        (one for one in mixtures if any(one["chosen_at"][place] for place in places)),
        min(mixtures, key=lambda one: (not one["chosen"], min(one["milliseconds"][place] for place in places))),
    )
    place = min(places, key=lambda index: best["vs_best_dense"][index])
    decoded = [index for index, key in enumerate(keys) if key[3] == "decode"]

    def label(index: int) -> str:
        batch, sequence, threads, phase = keys[index]
        name = f"{batch} × {sequence}" + (f", {threads} thr." if several_threads else "")
        return f"{name}, {PHASES[phase]}" if PHASES[phase] else name

    # A request is the sum of the other two: it is in the table, and drawn it would say nothing new.
    drawn = [index for index, key in enumerate(keys) if key[3] != "request"]
    return {
        "plans": plans,
        "shapes": [label(index) for index in range(len(keys))],
        "drawn": {
            "shapes": [label(index) for index in drawn],
            "plans": [
                one | {key: [one[key][index] for index in drawn] for key in ("speedups", "chosen_at")} for one in plans
            ],
        },
        "decode": {
            "shapes": [f"{keys[index][0]} after {keys[index][1]} tokens" for index in decoded],
            "rates": {
                one["name"]: [1000 * keys[index][0] / one["milliseconds"][index] for index in decoded] for one in plans
            },
        },
        "shown": {
            "name": best["name"],
            "chosen": best["chosen"],
            "vs_dense": best["speedups"][place],
            "vs_best_dense": best["vs_best_dense"][place],
            "shape": f"{keys[place][0]} × {keys[place][1]} tokens"
            + (" and what is written after them" if keys[place][3] == "request" else ""),
            "threads": keys[place][2],
        },
        "one_for_all": len(set(chosen_at.values())) == 1,
        "best_dense": plan["best_dense_plan"],
        "machine": plan["machine"],
    }


def _key(row: Mapping[str, Any]) -> tuple[int, int, int, str]:
    return row["batch"], row["sequence"], row["threads"], row.get("phase", "whole")


def loss_curves(folder: Path) -> dict[str, str]:
    """The drawings of the losses; a stage that was told to make no step has none."""
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
