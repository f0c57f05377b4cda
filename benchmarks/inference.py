"""Time the plans of an export side by side: the whole model, and its FFNs alone.

    python -m benchmarks.inference models/exported --texts data/corpus/evaluation.jsonl --out docs/results/inference.md

Every plan of every engine, dense or mixture, runs in every round on the same real texts. The baseline is the best dense
plan: the fastest of all engines at that shape, in the same rounds, that keeps its quality. For the FFNs alone, each
layer is a graph of its own that reads the inputs of that layer in the model; the time is the sum over the layers.
OpenVINO compiles its plans for each shape, as `ffn2moe.runtime.engines` does in use.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.ffn import Layers
from benchmarks.page import (
    Grid,
    Page,
    about,
    add_texts,
    chosen,
    parser_of,
    read_texts,
    report,
    rounds_of,
    shape_of,
    some,
    verdict,
)
from benchmarks.plot import bars
from benchmarks.race import Compared, Sample, Samples, race, stopwatch
from ffn2moe import metrics
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import moe_layers
from ffn2moe.planning import timing
from ffn2moe.runtime.engines import Graph
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import no_such_plan, read_manifest
from ffn2moe.runtime.plans import PLANS, form_of, is_dense, plan_of

SHAPES = [(1, 16), (1, 128), (32, 32), (32, 128)]
MODEL, FFN = "model", "ffn"
KEPT = 0.97  # least retention of a plan that keeps its quality
TARGETS = {(1, 16): 1.0, (1, 128): 1.2, (32, 128): 1.4}  # target speeds over the best dense plan


@dataclass(frozen=True, kw_only=True)
class Row(Compared):
    """Hold one plan at one shape."""

    part: str  # MODEL or FFN
    phase: str
    batch: int
    sequence: int
    threads: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.inference", __doc__)
    parser.add_argument("export", type=Path, help="the export, for example models/exported, which has every plan")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, help="batch x sequence: 1x16 32x128")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=15.0, help="limit for one shape, after the first 5 rounds")
    parser.add_argument("--plans", nargs="+", help="only these plans, and dense")
    parser.add_argument("--min-retention", type=float, default=KEPT, help="least retention of a plan in bold")
    add_texts(parser)
    return report(parser, lambda options, console: page(measure(options, console)), arguments)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return all figures of the page, ready for JSON."""
    manifest = read_manifest(options.export)
    texts = read_texts(options.texts)
    if min(options.threads) < 1:
        raise ValueError(f"--threads {min(options.threads)}: a plan needs at least one thread")
    if "dense" not in manifest["plans"]:
        raise ValueError(no_such_plan(options.export, manifest, "dense"))
    plans = chosen(manifest["plans"], options.plans)
    retention = {plan: float(manifest["plans"][plan]["retention"]) for plan in plans}
    kept = [plan for plan in plans if plan == "dense" or retention[plan] >= options.min_retention]
    rows: list[Row] = []
    missing: dict[str, str] = {}
    refused = None
    try:
        model, layers = ffns_of(options.export, manifest)
    except ValueError as error:
        refused = str(error)
    limits = {"rounds": options.rounds, "limit": options.seconds}
    with rounds_of(console) as track, tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            exports = open_plans(options.export, plans, threads, missing)
            alone = [plan for plan in exports if form_of(plan) == plan and refused is None]
            opened = {plan: layers.open(plan, threads, Path(folder)) for plan in alone}
            for batch, sequence in options.shapes:
                timing.fix(exports, [(batch, sequence)])
                batches = timing.full_batches(exports["dense"], texts, batch, sequence)
                where = f"{batch} x {sequence}, {some(threads, 'thread')}"
                timed = {plan: sample_of(export, batches) for plan, export in exports.items()}
                found = race(timed, **limits, label=where, track=track)
                rows += _rows(MODEL, (batch, sequence, threads), found, kept)
                if opened:
                    timed = samples_alone(model, opened, batches)
                    found = race(timed, **limits, label=f"{where}, FFNs alone", track=track)
                    rows += _rows(FFN, (batch, sequence, threads), found, kept)
    spec = manifest["spec"]
    return {
        "export": options.export.name,
        "machine": timing.machine(),
        "mixture": f"{spec['num_active']} of {spec['num_experts']} experts active",
        "min_retention": options.min_retention,
        "retention": retention,
        "missing": missing,
        "ffn_alone_refused": refused,
        "bounds": {str(sequence): bounds(options.export, sequence) for sequence in {s for _, s in options.shapes}},
        "rows": [asdict(row) for row in rows],
    }


def open_plans(
    export: Path, plans: Sequence[str], threads: int, missing: dict[str, str]
) -> dict[str, timing.AnyExport]:
    """Open the plans; put the reasons of those that cannot run here into `missing`. `dense` must open."""
    exports = {}
    for plan in plans:
        try:
            exports[plan] = open_export(export, plan, threads)
        except ValueError as error:
            if plan == "dense":
                raise
            missing[plan] = str(error)
    return exports


def sample_of(export: timing.AnyExport, batches: Sequence[timing.Batch]) -> Sample:
    """Return a sample of a whole export, by phase if it generates."""
    timing.sample(export, batches[0])
    seconds = max(timing.sample(export, batches[0]).values())
    calls = max(1, int(timing.SHORTEST_SAMPLE / max(seconds, 1e-9)))

    def sample(index: int) -> Mapping[str, float]:
        batch = batches[index % len(batches)]
        if calls > 1:
            timing.sample(export, batch)
        return {str(phase): seconds for phase, seconds in timing.sample(export, batch, calls=calls).items()}

    return sample


def ffns_of(export: Path, manifest: Mapping[str, Any]) -> tuple[Any, Layers]:
    """Return the model of an export and the graphs of its FFNs. ValueError if they cannot run alone."""
    spec = manifest["spec"]
    if spec["head"] == "seq2seq" or manifest.get("model", {}).get("reads", "text") != "text":
        raise ValueError("token ids alone do not determine the inputs of its FFNs")
    model = checkpoint.load(export / "checkpoint")
    return model, Layers(moe_layers(model))


def samples_alone(
    model: Any, opened: Mapping[str, Sequence[Graph]], batches: Sequence[timing.Batch]
) -> dict[str, Sample]:
    """Return a sample for each plan: all layers in order, on their inputs in the model, compiled for these batches."""
    for graph in chain.from_iterable(opened.values()):
        graph.fix([(batches[0][0].size,)])
    read = []
    for ids_BL, mask_BL in batches[:2]:
        batch = Batch({"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL)}, None)
        with torch.no_grad():
            read.append([x_TD.numpy() for x_TD in layer_inputs(model, [batch], max_tokens=ids_BL.size)])

    def run(graphs: Sequence[Graph], index: int) -> None:
        for graph, x_TD in zip(graphs, read[index % len(read)], strict=True):
            graph.run(["y"], {"x": x_TD})

    return {plan: stopwatch(partial(run, graphs)) for plan, graphs in opened.items()}


def _rows(part: str, shape: tuple[int, int, int], phases: Mapping[str, Samples], kept: Sequence[str]) -> Iterator[Row]:
    """Yield a row for every plan, compared with the best dense plan."""
    at = dict(zip(("batch", "sequence", "threads"), shape, strict=True))
    for phase, samples in phases.items():
        best = samples.fastest(plan for plan in kept if is_dense(plan))
        yield from (Row(part=part, phase=phase, **at, **samples.compared(plan, best)) for plan in samples.seconds)


def bounds(export: Path, sequence: int) -> dict[str, float]:
    """Return the largest speed over the dense model in the same engine: by FLOPs, and by Amdahl's law."""
    from transformers import AutoConfig

    spec = checkpoint.load_spec(export / "checkpoint")
    config = AutoConfig.from_pretrained(export / "checkpoint")
    teacher, student = metrics.flops_per_token(spec, config, sequence)
    return {
        "flops": round(teacher.total / student.total, 3),
        "amdahl": round(metrics.amdahl_bound(teacher, student), 3),
        "ffn_flops": round(teacher.ffn / (student.ffn + student.router), 3),
        "ffn_share": round(teacher.ffn / teacher.total, 3),
    }


Shapes = dict[tuple[int, int], dict[str, Row]]  # (batch, sequence) -> plan -> row


def _cells(result: Mapping[str, Any]) -> dict[tuple[str, str, int], Shapes]:
    """Group the rows by (part, phase, threads), then by shape, then by plan."""
    cells: dict[tuple[str, str, int], Shapes] = {}
    for values in result["rows"]:
        row = Row(**values)
        shapes = cells.setdefault((row.part, row.phase, row.threads), {})
        shapes.setdefault((row.batch, row.sequence), {})[row.plan] = row
    return cells


def _title(part: str, phase: str, threads: int) -> str:
    name = "The whole model" if part == MODEL else "The FFNs alone"
    return f"{name}{'' if phase == 'whole' else f', {phase}'}, {some(threads, 'thread')}"


def grids(result: Mapping[str, Any]) -> Iterator[Grid]:
    """Yield a table for each part, phase and number of threads, and one of the best mixtures."""
    for key, shapes in _cells(result).items():
        header = ["plan", "engine", "kept", *(f"{batch} x {sequence}" for batch, sequence in shapes)]
        yield Grid(_title(*key), header, list(_grid_rows(result, key[0], shapes)))
    yield Grid("Mixture against best dense", ["case", "best mixture", "speed", "target"], list(summary(result)))


def _grid_rows(result: Mapping[str, Any], part: str, shapes: Shapes) -> Iterator[list[str]]:
    plans = {plan for rows in shapes.values() for plan in rows}
    fastest = {shape: min(_able(result, rows), key=lambda row: row.milliseconds).plan for shape, rows in shapes.items()}
    for plan in sorted(plans, key=lambda plan: (not is_dense(plan), plan)):
        cells = []
        for shape, rows in shapes.items():
            row = rows.get(plan)
            speed = "" if row is None else "best dense" if plan == row.best_dense else f"{row.speed:.2f}x"
            text = "" if row is None else f"{row.milliseconds:.2f} ms, {speed}"
            if row is not None and plan != row.best_dense:
                text += f" ({row.low:.2f} to {row.high:.2f})"
            cells.append(f"**{text}**" if plan == fastest[shape] else text)
        kept = result["retention"].get(plan)
        yield [plan, plan_of(plan).engine, "" if kept is None else f"{100 * kept:.1f} %", *cells]
    limits = {"bound by FLOPs": "flops", "bound by Amdahl's law": "amdahl"}
    for label, name in limits.items() if part == MODEL else [("bound by FLOPs", "ffn_flops")]:
        yield [label, "", "", *(f"{result['bounds'][str(sequence)][name]:.2f}x" for _, sequence in shapes)]


def _able(result: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Row]:
    """Return the rows of the plans that keep their quality."""
    least = result["min_retention"]
    return [row for plan, row in rows.items() if plan == "dense" or result["retention"].get(plan, 0.0) >= least]


def summary(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the fastest mixture that keeps its quality in each case, with its target."""
    for (part, phase, threads), shapes in _cells(result).items():
        for shape, rows in shapes.items():
            mixtures = [row for row in _able(result, rows) if not is_dense(row.plan)]
            if not mixtures:
                continue
            best = min(mixtures, key=lambda row: row.milliseconds)
            target = TARGETS.get(shape) if part == MODEL and phase == "whole" else None
            yield [
                f"{_title(part, phase, threads)}, {shape[0]} x {shape[1]}",
                f"{best.plan} against {best.best_dense}",
                f"{best.speed:.2f}x ({best.low:.2f} to {best.high:.2f})",
                "" if target is None else verdict(best.spread, target),
            ]


def page(result: Mapping[str, Any]) -> Page:
    """Return the page."""
    rounds = [row["rounds"] for row in result["rows"]]
    reasons = [f"Not timed: `{plan}` ({reason})." for plan, reason in result["missing"].items()]
    if result["ffn_alone_refused"]:
        reasons.append(f"FFNs alone are not timed: {result['ffn_alone_refused']}.")
    return Page(
        "Inference: the plans of all engines side by side",
        [
            f"`{result['export']}`, {result['mixture']}. {about(result['machine'])}.",
            f"Median time of a batch (batch x sequence) in {min(rounds)} to {max(rounds)} interleaved rounds, and its "
            "speed over the best dense plan in the same rounds: median and quartiles. The best dense plan is the "
            f"fastest of all engines that keeps {100 * result['min_retention']:g} % of the teacher's quality (`kept`: "
            "its retention in the manifest). Bold: the fastest plan that keeps it. OpenVINO compiles its plans for "
            "each shape. A bound limits the speed over the dense plan of the same engine and precision.",
        ],
        list(grids(result)),
        notes="\n\n".join(reasons),
        result=result,
        figure=lambda: figure(result),
    )


def figure(result: Mapping[str, Any]) -> Any:
    """Draw the speed over the best dense plan: a panel for each part and number of threads, a group for each shape."""
    panels = []
    for (part, phase, threads), shapes in _cells(result).items():
        groups = {
            f"{batch} x {sequence}": {plan: row.spread for plan, row in rows.items() if plan != "dense"}
            for (batch, sequence), rows in shapes.items()
        }
        name = "flops" if part == MODEL else "ffn_flops"
        limits = [result["bounds"][str(sequence)][name] for _, sequence in shapes]
        panels.append((_title(part, phase, threads), groups, limits))
    return bars(panels, hollow=[name for name, plan in PLANS.items() if plan.dense], ylabel="speed over best dense")


if __name__ == "__main__":
    sys.exit(main())
