"""Write the page of results from finished cells: tables by group, and the plot of quality against active FLOPs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ablation import plot
from benchmarks.ablation.bench import PROBE_DEV, PROBE_TRAIN, Bench
from benchmarks.ablation.grid import Store, cells, write_text
from benchmarks.ablation.method import GROUPS, STAGE_TITLES, STAGES, Method
from benchmarks.ablation.rows import FIGURES, means
from benchmarks.page import Grid
from ffn2moe.planning.timing import machine


def grid(
    bench: Bench,
    store: Store,
    methods: Iterable[Method],
    shares: Sequence[float],
    seeds: Sequence[int],
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Return all finished cells of one model and budget, and what they share."""
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
    """Return the name of the model, without the folder or the word package before it."""
    name = bench.setup.name
    return name.removeprefix("package:").rstrip("/").rpartition("/")[2]


def _shown(arguments: Sequence[str]) -> list[str]:
    """Return the command's arguments without the folders of this machine."""
    local = ("--workspace", "--work", "--out")
    pairs = zip(["", *arguments], arguments, strict=False)
    return [argument for before, argument in pairs if before not in local and argument not in local]


def judged(bench: Bench) -> str:
    """Say on which texts the figures are measured."""
    if bench.head != "embedding":
        texts = len(bench.tokens("evaluation", packed=False).ids)
        return f"the first {bench.budget.max_length} tokens of {texts} texts that no training saw"
    found = bench.benchmarks
    parts = [f"{len(found.pairs)} retrieval pairs"]
    if found.stsb:
        parts.append(f"{len(found.stsb)} pairs of STS-B dev")
    parts += [f"{len(dev)} texts of {FIGURES[name][0]}" for name, (_, dev) in found.classification.items()]
    probe = (
        f"; the probe of a set is fitted on at most {PROBE_TRAIN} of its texts and judged on at most {PROBE_DEV}, "
        "chosen once by content"
    )
    return ", ".join(parts) + (probe if found.classification else "")


def data_of(out: Path) -> Path:
    """Return the file of a page's cells: docs/results/ablation.jsonl for docs/results.md."""
    return out.with_suffix("") / "ablation.jsonl"


def read(out: Path) -> dict[str, Any]:
    """Return the grids of a page, by model. FileNotFoundError if there is none."""
    path = data_of(out)
    if not path.is_file() and path.with_suffix(".json").is_file():
        return _read_first_form(path.with_suffix(".json"))
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run the grid once without --page-only")
    grids: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "cell" in row:
            grids[row["model"]]["cells"].append(row["cell"])
        else:
            grids[row["model"]] = {**row, "cells": []}
    return grids


def _read_first_form(path: Path) -> dict[str, Any]:
    """Return the grids of the file that version 0.1.0 wrote: one JSON object, in which baselines are rivals."""
    grids: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["grids"]
    for one in grids.values():
        for method in one["methods"].values():
            method["group"] = {"rivals": "baselines"}.get(method["group"], method["group"])
    return grids


def joined(out: Path, one: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grids of a page with this one in place of an older one of its model."""
    known = any(data_of(out).with_suffix(suffix).is_file() for suffix in (".jsonl", ".json"))
    old = read(out) if known else {}
    return {**old, one["model"]: one}


def lines_of(grids: Mapping[str, Any]) -> Iterator[str]:
    """Yield each grid as JSON lines: its common part, then a line for each cell."""
    for model, one in grids.items():
        rows = [{name: value for name, value in one.items() if name != "cells"}]
        rows += [{"model": model, "cell": cell} for cell in one["cells"]]
        yield from (json.dumps(row, sort_keys=True, allow_nan=False) for row in rows)


def write(out: Path, grids: Mapping[str, Any]) -> None:
    """Write the page, its plots and its data."""
    write_text(data_of(out), "".join(f"{line}\n" for line in lines_of(grids)))
    sections = []
    for index, one in enumerate(sorted(grids.values(), key=lambda grid: grid["head"] != "embedding")):
        picture = data_of(out).with_name("ablation.png" if index == 0 else f"ablation-{one['model']}.png")
        plot.draw(one, picture)
        sections.append(section(one, f"{picture.parent.name}/{picture.name}"))
    text = "\n".join([INTRODUCTION, *sections])
    out.write_text(text, encoding="utf-8")


INTRODUCTION = """# Methods compared on the same work

Which method keeps the most quality at the same active FLOPs? Every method runs on the same model, texts, order of
batches and number of steps; `benchmarks/ablation/methods/` says what each changes.

- *Training-free*: experts, a router in closed form, scale and mean. *Router trained*: the steps of the router, too.
  *Distilled*: both, and the same number of distillation steps for every row.
- A figure is the mean over the seeds ± their standard deviation; the last column counts the seeds. The share of the
  teacher's figure stands in brackets, and *kept* is the mean of these shares.
- *Error* is `||y - layer(x)|| / ||y||` of the FFNs after their last fit, mean over the layers. *Of the choice* is
  `||y - a y_S|| / ||y||` for the experts that the router chooses, where y is the sum of all experts before their
  outputs are fitted. *Of the oracle's* is the same for the best choice of as many experts. For a distilled mixture,
  both compare with all of its own experts.
- *Active* counts the neurons that the tokens used. *FLOPs* are the whole model's, as a share of the teacher's.
  *Seconds* are processor time to make and judge a cell.
"""


def section(one: Mapping[str, Any], picture: str) -> str:
    """Return the section of one model."""
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
        f"{budget['experts']} experts, {len(one['cells'])} cells. Distillation: {budget['steps']} steps of "
        f"{budget['batch_tokens']} tokens, learning rate {budget['learning_rate']:g}. Routers: "
        f"{budget['router_steps']} steps on {budget['router_tokens']} tokens. Partition: "
        f"{budget['calibration_tokens']} tokens. Judged: "
        f"{one['judged']}. Trained and judged in {' and '.join(kinds)}. {', '.join(devices)}, "
        f"{' or '.join(map(str, threads))} thread a cell; commit {', '.join(commits)} (+: with uncommitted changes).",
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
    """Compare ours, our best option, the best other compressor and FactorLLM at each share and stage."""
    wanted = (
        ("ours, as by default", lambda row: row["group"] == "default"),
        ("best option of ours", lambda row: row["group"] not in ("FactorLLM", "baselines", "after conversion")),
        ("best other compressor", lambda row: row["group"] == "baselines"),
        ("best FactorLLM", lambda row: row["group"] == "FactorLLM"),
    )
    cells = []
    places = {(row["share"], row["stage"]) for row in rows}
    for share, stage in sorted(places, key=lambda place: (-place[0], STAGES.index(place[1]))):
        here = [row for row in rows if (row["share"], row["stage"]) == (share, stage)]
        entries = [f"{100 * share:g} %", STAGE_TITLES[stage]]
        for name, belongs in wanted:
            those = filter(belongs, here)
            best = max(those, key=lambda row: statistics.mean(row["quality"]), default=None)
            title = "" if best is None or name.startswith("ours") else f" ({best['title']})"
            entries.append("" if best is None else _percent(best["quality"]) + title)
        cells.append(entries)
    table = Grid("", ["active", "stage", *(name for name, _ in wanted)], cells).markdown()
    return ["The share of the teacher's figures that is kept, and the best method by it:", "", *table, ""]


def table(one: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tables of a group beside the default: one for each stage, by falling share."""
    names = [name for name, _ in ordered(rows[0]["figures"])]
    headings = ["method", "active", *(FIGURES[name][0] for name in names), "kept"]
    headings += ["error", "of the choice", "of the oracle's", "recall", "FLOPs", "seconds", "seeds"]
    lines = []
    compared = {row["stage"] for row in rows if row["group"] != "default"} or {row["stage"] for row in rows}
    for stage in filter(compared.__contains__, STAGES):
        here = [row for row in rows if row["stage"] == stage]
        cells = [_entries(row, names) for row in sorted(here, key=lambda row: -row["share"])]
        lines += [f"**{STAGE_TITLES[stage]}**", "", *Grid("", headings, cells).markdown(), ""]
    return lines[:-1]


def _entries(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    errors = row["errors"]
    return [
        f"**{row['title']}**" if row["group"] == "default" else row["title"],
        _percent(row["cost"]["active_share"], spread=False),
        *(_written(name, row["figures"][name]) + _share(row, name) for name in names),
        _percent(row["quality"]),
        *(_spread("{:.3f}", errors.get(name)) for name in ("error", "router_error", "oracle_error")),
        _spread("{:.2f}", errors.get("router_recall")),
        _percent(row["cost"]["flops"], spread=False),
        _spread("{:.0f}", row["seconds"]["processor"], spread=False),
        str(row["seeds"]),
    ]


def _share(row: Mapping[str, Any], name: str) -> str:
    """Return the share of a figure that is kept, in brackets."""
    return f" ({100 * statistics.mean(row['kept'][name]):.1f} %)" if name in row["kept"] and name != "agreement" else ""


def _percent(values: Sequence[float], *, spread: bool = True) -> str:
    return _spread("{:.1f}", [100 * value for value in values], spread=spread) + " %"


def _written(name: str, values: Sequence[float]) -> str:
    return _spread(FIGURES[name][1], values)


def _spread(form: str, values: Sequence[float] | None, *, spread: bool = True) -> str:
    """Return mean ± standard deviation over the seeds; nothing if there is no value."""
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if spread and len(values) > 1 else mean
