"""The page of results: tables by group, and the plot of quality against active FLOPs. Made of finished cells alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ablation import plot
from benchmarks.ablation.bench import PROBE_DEV, PROBE_TRAIN, Bench
from benchmarks.ablation.grid import Store, cells, write_json
from benchmarks.ablation.method import GROUPS, STAGE_TITLES, STAGES, Method
from benchmarks.ablation.rows import FIGURES, means
from ffn2moe.planning.timing import machine


def grid(
    bench: Bench,
    store: Store,
    methods: Iterable[Method],
    shares: Sequence[float],
    seeds: Sequence[int],
    arguments: Sequence[str],
) -> dict[str, Any]:
    """All finished cells of one model and budget, with what is the same for all of them."""
    methods = list(methods)
    wanted = cells(methods, shares, STAGES, seeds, bench.budget.experts)
    found = [kept for cell in wanted if (kept := store.read(cell)) is not None]
    order = {method.name: place for place, method in enumerate(methods)}
    found.sort(key=lambda cell: (order[cell["method"]], -cell["share"], STAGES.index(cell["stage"]), cell["seed"]))
    return {
        "model": model_name(bench),
        "head": bench.head,
        "command": " ".join(["python -m benchmarks.ablation", *_shown(arguments)]),
        "budget": asdict(bench.budget),
        "machine": machine(),
        "judged": judged(bench),
        "teacher": bench.dense,
        "methods": {
            method.name: {"title": method.title, "group": method.group, "source": method.source} for method in methods
        },
        "cells": found,
    }


def model_name(bench: Bench) -> str:
    """What the model is called, from what the stage `prepare` knows of it."""
    name = bench.setup.name
    return name.removeprefix("package:").rstrip("/").rpartition("/")[2]


def _shown(arguments: Sequence[str]) -> list[str]:
    """The command's arguments, without folders that only this machine has."""
    shown: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        local = before in ("--workspace", "--work", "--out") or argument in ("--workspace", "--work", "--out")
        if not local:
            shown.append(argument)
    return shown


def judged(bench: Bench) -> str:
    """What the figures are of."""
    if bench.head != "embedding":
        texts = len(bench.tokens("evaluation", packed=False).ids)
        return f"the first {bench.budget.max_length} tokens of {texts} texts that nothing here was trained on"
    found = bench.benchmarks
    parts = [f"{len(found.pairs)} retrieval pairs"]
    if found.stsb:
        parts.append(f"{len(found.stsb)} pairs of STS-B dev")
    parts += [f"{len(dev)} texts of {FIGURES[name][0]}" for name, (_, dev) in found.classification.items()]
    told = ", ".join(parts)
    if found.classification:
        told += (
            f"; a set's probe is fitted on at most {PROBE_TRAIN} and asked about at most {PROBE_DEV} of its texts, "
            "chosen once by content"
        )
    return told


# --- files --------------------------------------------------------------------------------------------


def data_of(out: Path) -> Path:
    """Where a page's cells are: docs/results/ablation.json for docs/results.md."""
    return out.with_suffix("") / "ablation.json"


def read(out: Path) -> dict[str, Any]:
    """The grids of a page. FileNotFoundError where there is none."""
    path = data_of(out)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run the grid once without --page-only")
    return json.loads(path.read_text(encoding="utf-8"))


def joined(out: Path, one: Mapping[str, Any]) -> dict[str, Any]:
    """The grids of a page with this one in place of an older one of its model."""
    old = read(out)["grids"] if data_of(out).is_file() else {}
    return {"grids": {**old, one["model"]: one}}


def write(out: Path, content: Mapping[str, Any]) -> None:
    """The page, its plots and its data."""
    write_json(data_of(out), content)
    sections = []
    for index, one in enumerate(sorted(content["grids"].values(), key=lambda grid: grid["head"] != "embedding")):
        picture = data_of(out).with_name("ablation.png" if index == 0 else f"ablation-{one['model']}.png")
        plot.draw(one, picture)
        sections.append(section(one, f"{picture.parent.name}/{picture.name}"))
    text = "\n".join([INTRODUCTION, *sections])
    out.write_text(text, encoding="utf-8")


# --- text ---------------------------------------------------------------------------------------------

INTRODUCTION = """# Methods on the same work

Every method is an option of one program and runs on the same model, texts, order of batches and number of steps;
`benchmarks/ablation/methods/` says what each changes. *Training-free*: experts, a router in closed form, scale and
mean. *Router trained*: the router's steps, too. *Distilled*: both, and the steps of distillation, the same number for
every row.

A figure is the mean over seeds ± their standard deviation, with the number of seeds in the last column; in brackets
what is kept of the teacher's. *Kept* is the mean of these shares over the judges. *Error* is `||y - layer(x)|| / ||y||`
of the FFNs as they stand, mean over the layers. *Of the choice* is `||y - a y_S|| / ||y||`, y being the sum of all
experts, for the experts that the router chooses, before their outputs are fitted, beside that of the best choice of as
many (the oracle); of a distilled mixture it is against all of its own experts. *Active* counts neurons, as many as the
tokens were seen to use; *FLOPs* are the whole model's, as a share of the teacher's. *Seconds* are the processor's, of
making and judging a cell.
"""


def section(one: Mapping[str, Any], picture: str) -> str:
    """One model's results."""
    budget = one["budget"]
    rows = means(one)
    threads = sorted({cell["threads"] for cell in one["cells"]})
    commits = sorted({cell["commit"] for cell in one["cells"]})
    kinds = sorted({"bfloat16" if cell["bf16"] else "float32" for cell in one["cells"]})
    devices = sorted({cell["machine"] for cell in one["cells"]} | {c["device"] for c in one["cells"]} - {"cpu"})
    lines = [
        f"## {one['model']}",
        "",
        f"    {one['command']}",
        "",
        f"E = {budget['experts']}. {len(one['cells'])} cells. Distillation: {budget['steps']} steps of "
        f"{budget['batch_tokens']} tokens, learning rate {budget['learning_rate']:g}. Routers: "
        f"{budget['router_steps']} steps on {budget['router_tokens']} tokens. Partition: "
        f"{budget['calibration_tokens']} tokens. Judged: "
        f"{one['judged']}. Trained and judged in {' and '.join(kinds)}. {', '.join(devices)}, "
        f"{' or '.join(map(str, threads))} thread a cell; commit {', '.join(commits)} (+: with changes).",
        "",
        f"Teacher: {', '.join(f'{FIGURES[name][0]} {_written(name, [f])}' for name, f in ordered(one['teacher']))}.",
        "",
        f"![quality kept against active FLOPs]({picture})",
        "",
        *summary(one, rows),
    ]
    default = [row for row in rows if row["group"] == "default"]
    for group in GROUPS:
        own = [row for row in rows if row["group"] == group]
        if not own or group == "default":
            continue
        lines += [f"### {group[0].upper()}{group[1:]}", "", *table(one, [*default, *own]), ""]
        sources = {row["title"]: row["source"] for row in own}
        lines += ["; ".join(f"{title}: {source}" for title, source in sources.items()) + ".", ""]
    if all(row["group"] == "default" for row in rows):
        lines += [*table(one, default), ""]
    return "\n".join(lines)


def ordered(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, figures[name]) for name in FIGURES if name in figures]


def summary(one: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ours, the best other options, FactorLLM and the best rival at each share and stage, by what is kept."""
    wanted = (
        ("ours, as by default", lambda row: row["group"] == "default"),
        ("best option of ours", lambda row: row["group"] not in ("FactorLLM", "baselines", "after conversion")),
        ("best other compressor", lambda row: row["group"] == "baselines"),
        ("best FactorLLM", lambda row: row["group"] == "FactorLLM"),
    )
    places = sorted(
        {(row["share"], row["stage"]) for row in rows}, key=lambda place: (-place[0], STAGES.index(place[1]))
    )
    lines = [
        "What is kept of the teacher, mean over the judges; the best by that mean:",
        "",
        "| active | stage | " + " | ".join(name for name, _ in wanted) + " |",
        "|---|---|" + "---|" * len(wanted),
    ]
    for share, stage in places:
        here = [row for row in rows if (row["share"], row["stage"]) == (share, stage)]
        told = []
        for name, belongs in wanted:
            those = [row for row in here if belongs(row)]
            best = max(those, key=lambda row: statistics.mean(row["quality"]), default=None)
            title = "" if best is None or name.startswith("ours") else f" ({best['title']})"
            told.append("" if best is None else _percent(best["quality"]) + title)
        lines.append(f"| {100 * share:g} % | {STAGE_TITLES[stage]} | " + " | ".join(told) + " |")
    return [*lines, ""]


def table(one: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of a group beside the default, stage by stage and share by share."""
    names = [name for name, _ in ordered(rows[0]["figures"])]
    headings = ["method", "active", *(FIGURES[name][0] for name in names), "kept"]
    headings += ["error", "of the choice", "of the oracle's", "recall", "FLOPs", "seconds", "seeds"]
    lines = []
    compared = {row["stage"] for row in rows if row["group"] != "default"} or {row["stage"] for row in rows}
    for stage in filter(compared.__contains__, STAGES):
        here = [row for row in rows if row["stage"] == stage]
        lines += [f"**{STAGE_TITLES[stage]}**", "", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        for row in sorted(here, key=lambda row: -row["share"]):
            errors = row["errors"]
            figures = [_written(name, row["figures"][name]) + _share(row, name) for name in names]
            told = [
                f"**{row['title']}**" if row["group"] == "default" else row["title"],
                _percent(row["cost"]["active_share"], spread=False),
                *figures,
                _percent(row["quality"]),
                _spread("{:.3f}", errors.get("error")),
                _spread("{:.3f}", errors.get("router_error")),
                _spread("{:.3f}", errors.get("oracle_error")),
                _spread("{:.2f}", errors.get("router_recall")),
                _percent(row["cost"]["flops"], spread=False),
                _spread("{:.0f}", row["seconds"]["processor"], spread=False),
                str(row["seeds"]),
            ]
            lines.append(f"| {' | '.join(told)} |")
        lines.append("")
    return lines[:-1]


def _share(row: Mapping[str, Any], name: str) -> str:
    """What is kept of a figure, in brackets behind it."""
    return f" ({100 * statistics.mean(row['kept'][name]):.1f} %)" if name in row["kept"] and name != "agreement" else ""


def _percent(values: Sequence[float], *, spread: bool = True) -> str:
    return _spread("{:.1f}", [100 * value for value in values], spread=spread) + " %"


def _written(name: str, values: Sequence[float]) -> str:
    return _spread(FIGURES[name][1], values)


def _spread(form: str, values: Sequence[float] | None, *, spread: bool = True) -> str:
    """Mean ± standard deviation over the seeds; nothing where there is no such value."""
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if spread and len(values) > 1 else mean
