"""Time the plans of an export side by side: the whole model, and its FFNs alone.

    python -m benchmarks.inference exports/minilm --texts data/corpus/evaluation.jsonl --out docs/results/inference.md

Each plan of each engine, dense and mixture, takes its turn in every round, on the same real texts. What counts is the
speed against the best dense plan: the fastest of all engines, at that shape and on those threads, in the same rounds,
that keeps its quality. The FFNs alone are each layer's as a graph of its own, reading what that layer reads in the
model; the time is the sum over the layers. Plans of OpenVINO, dense ones and mixtures, are compiled for the shape that
is timed, as they are where they are used (`ffn2moe.runtime.engines`). With `--out` the table is kept as a page, the
figures beside it as JSON and the plot as PNG.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.race import Sample, Samples, Spread, Track, race, stopwatch
from benchmarks.show import Rounds, about, complain, verdict, write
from ffn2moe import metrics
from ffn2moe.planning import timing
from ffn2moe.runtime.engines import Graph
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import read_manifest
from ffn2moe.runtime.plans import DENSE_PLANS, engine_of, form_of

DEFAULT_TEXTS = Path("data/corpus/evaluation.jsonl")
SHAPES = [(1, 16), (1, 128), (32, 32), (32, 128)]
MODEL, FFN = "model", "ffn"
KEPT = 0.97  # retention of a plan that keeps its quality
TARGETS = {(1, 16): 1.0, (1, 128): 1.2, (32, 128): 1.4}  # speed over the best dense plan that is aimed at


@dataclass(frozen=True)
class Row:
    """One plan at one shape. `speed` is over the best dense plan, with the quartiles of the rounds."""

    part: str  # MODEL or FFN
    phase: str
    batch: int
    sequence: int
    threads: int
    plan: str
    milliseconds: float
    speed: float
    low: float
    high: float
    best_dense: str
    rounds: int

    @property
    def cell(self) -> tuple[str, str, int, int, int]:
        """What it is compared within."""
        return self.part, self.phase, self.batch, self.sequence, self.threads


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        result = measure(options, console)
    except (ValueError, OSError, RuntimeError) as error:
        return complain(error)
    for shown in tables(result):
        console.print(shown)
    console.print(about())
    if options.out:
        result["image"] = options.out.with_suffix(".png").name
        write(options.out, page(result), result, lambda: figure(result), console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="the export, for example exports/minilm")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, help="batch x sequence: 1x16 32x128")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=15.0, help="the most for one shape, beyond the first 5 rounds")
    parser.add_argument("--plans", nargs="+", help="those only (dense is always timed)")
    parser.add_argument("--min-retention", type=float, default=KEPT, help="of a plan that keeps its quality")
    parser.add_argument("--texts", type=Path, default=DEFAULT_TEXTS, help="JSON lines with a text each, or plain lines")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/inference.md")
    return parser


def shape_of(text: str) -> tuple[int, int]:
    try:
        batch, sequence = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxSEQUENCE, for example 32x128") from None
    if min(batch, sequence) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: batch and sequence start at 1")
    return batch, sequence


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that the page tells, as it goes into JSON."""
    manifest = read_manifest(options.export)
    texts = read_texts(options.texts)
    if min(options.threads) < 1:
        raise ValueError(f"--threads {min(options.threads)}: there must be one at least")
    plans = _chosen(manifest["plans"], options.plans)
    retention = {plan: float(manifest["plans"][plan]["retention"]) for plan in plans}
    kept = [plan for plan in plans if plan == "dense" or retention[plan] >= options.min_retention]
    rows: list[Row] = []
    missing: dict[str, str] = {}
    alone = _Alone(options.export, manifest)
    cells = len(options.threads) * len(options.shapes) * (1 if alone.refused else 2)
    with Rounds(console, cells) as rounds, tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            exports = {}
            for plan in plans:
                try:
                    exports[plan] = open_export(options.export, plan, threads)
                except ValueError as error:
                    if plan == "dense":
                        raise
                    missing[plan] = str(error)
            if alone.refused is None:
                alone.open([plan for plan in exports if form_of(plan) == plan], threads, folder)
            for batch, sequence in options.shapes:
                timing.fix(exports, [(batch, sequence)])
                alone.fix(batch * sequence)
                batches = timing.full_batches(exports["dense"], texts, batch, sequence)
                where = f"{batch} x {sequence}, {threads} {'thread' if threads == 1 else 'threads'}"
                timed = {plan: sample_of(export, batches) for plan, export in exports.items()}
                rows += _rows(MODEL, (batch, sequence, threads), _race(timed, options, where, rounds.track), kept)
                if alone.refused is None:
                    found = _race(alone.samples(batches), options, f"{where}, FFNs alone", rounds.track)
                    rows += _rows(FFN, (batch, sequence, threads), found, kept)
    return {
        "command": command(options),
        "export": options.export.name,
        "machine": timing.machine(),
        "mixture": _mixture(manifest["spec"]),
        "min_retention": options.min_retention,
        "retention": retention,
        "missing": missing,
        "ffn_alone_refused": alone.refused,
        "bounds": {str(sequence): bounds(options.export, sequence) for sequence in {s for _, s in options.shapes}},
        "rows": [asdict(row) for row in rows],
    }


def read_texts(path: Path) -> list[str]:
    """The texts of a file of lines, or of JSON lines with a `text` each."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a file of texts with --texts")
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} has no text to time the plans on")
    return texts


def _chosen(known: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    known = list(known)
    unknown = [plan for plan in wanted or () if plan not in known]
    if unknown:
        raise ValueError(f"the export has no plan {unknown[0]!r}; it has: {', '.join(sorted(known))}")
    return [plan for plan in known if wanted is None or plan in wanted or plan == "dense"]


def sample_of(export: timing.AnyExport, batches: Sequence[timing.Batch]) -> Sample:
    """A sample of a whole export: of one that generates, by phase."""
    timing.sample(export, batches[0])
    seconds = max(timing.sample(export, batches[0]).values())
    calls = max(1, int(timing.SHORTEST_SAMPLE / max(seconds, 1e-9)))

    def sample(index: int) -> Mapping[str, float]:
        batch = batches[index % len(batches)]
        if calls > 1:
            timing.sample(export, batch)
        return {str(phase): seconds for phase, seconds in timing.sample(export, batch, calls=calls).items()}

    return sample


def _race(timed: Mapping[str, Sample], options: argparse.Namespace, label: str, track: Track) -> dict[str, Samples]:
    return race(timed, rounds=options.rounds, limit=options.seconds, label=label, track=track)


class _Alone:
    """The FFNs of an export, each alone; `refused` says why where that cannot be."""

    def __init__(self, export: Path, manifest: Mapping[str, Any]) -> None:
        from benchmarks.ffn import Layers
        from ffn2moe.moe import checkpoint
        from ffn2moe.moe.layer import moe_layers

        spec = manifest["spec"]
        self._open: dict[str, list[Graph]] = {}
        self.refused: str | None = None
        if spec["head"] == "seq2seq" or manifest.get("model", {}).get("reads", "text") != "text":
            self.refused = "what their FFNs read is not known from token ids alone"
            return
        self._model = checkpoint.load(export / "checkpoint")
        widths = [stack["ffn_width"] for stack in spec["stacks"] for _ in range(stack["num_layers"])]
        try:
            self._layers = Layers(moe_layers(self._model), widths)
        except ValueError as error:
            self.refused = str(error)

    def open(self, plans: Sequence[str], threads: int, folder: str) -> None:
        """Open the layers by these plans; those that were open are closed."""
        self._open = {plan: self._layers.open(plan, threads, Path(folder)) for plan in plans}

    def fix(self, tokens: int) -> None:
        """Compile for so many tokens, as the whole model is for its batches."""
        for graph in chain.from_iterable(self._open.values()):
            graph.fix([(tokens,)])

    def samples(self, batches: Sequence[timing.Batch]) -> dict[str, Sample]:
        """One sample a plan: all layers one after the other, as in the model."""
        from benchmarks.ffn import inputs_of, runner

        read = [inputs_of(self._model, *batch) for batch in batches[:2]]
        return {plan: stopwatch(runner(graphs, read)) for plan, graphs in self._open.items()}


def _rows(part: str, shape: tuple[int, int, int], phases: Mapping[str, Samples], kept: Sequence[str]) -> Iterator[Row]:
    """Every plan beside the best dense one."""
    for phase, samples in phases.items():
        best = samples.fastest(plan for plan in kept if plan in DENSE_PLANS)
        for plan in samples.seconds:
            speed = samples.speed(plan, best)
            yield Row(
                part,
                phase,
                *shape,
                plan=plan,
                milliseconds=round(1000 * samples.median(plan), 4),
                speed=round(speed.median, 4),
                low=round(speed.low, 4),
                high=round(speed.high, 4),
                best_dense=best,
                rounds=samples.rounds,
            )


def bounds(export: Path, sequence: int) -> dict[str, float]:
    """How much faster the mixture could be than the same engine's dense model: by FLOPs, and by Amdahl's law."""
    from transformers import AutoConfig

    from ffn2moe.moe import checkpoint

    spec = checkpoint.load_spec(export / "checkpoint")
    config = AutoConfig.from_pretrained(export / "checkpoint")
    teacher, student = metrics.flops_per_token(spec, config, sequence)
    return {
        "flops": round(teacher.total / student.total, 3),
        "amdahl": round(metrics.amdahl_bound(teacher, spec.active_share), 3),
        "ffn_flops": round(teacher.ffn / (student.ffn + student.router), 3),
        "ffn_share": round(teacher.ffn / teacher.total, 3),
    }


def _mixture(spec: Mapping[str, Any]) -> str:
    return f"{spec['num_active']} of {spec['num_experts']} experts active"


def command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.inference", str(options.export)]
    words += ["--shapes", *(f"{batch}x{sequence}" for batch, sequence in options.shapes)]
    words += ["--threads", *map(str, options.threads), "--rounds", str(options.rounds)]
    words += ["--seconds", f"{options.seconds:g}", "--texts", shlex.quote(str(options.texts))]
    if options.plans:
        words += ["--plans", *options.plans]
    return " ".join([*words, *(["--out", str(options.out)] if options.out else [])])


# --- telling --------------------------------------------------------------------------------------------------------


def _cells(result: Mapping[str, Any]) -> dict[tuple[str, str, int], dict[tuple[int, int], dict[str, Row]]]:
    """Rows by (part, phase, threads), then by shape, then by plan."""
    cells: dict[tuple[str, str, int], dict[tuple[int, int], dict[str, Row]]] = {}
    for values in result["rows"]:
        row = Row(**values)
        shapes = cells.setdefault((row.part, row.phase, row.threads), {})
        shapes.setdefault((row.batch, row.sequence), {})[row.plan] = row
    return cells


def _title(part: str, phase: str, threads: int) -> str:
    what = "The whole model" if part == MODEL else "The FFNs alone"
    return f"{what}{'' if phase == 'whole' else f', {phase}'}, {threads} {'thread' if threads == 1 else 'threads'}"


def _grid(
    result: Mapping[str, Any], part: str, shapes: Mapping[tuple[int, int], dict[str, Row]]
) -> Iterator[list[str]]:
    """The table of one part, phase and number of threads, a row at a time, the names of its columns first."""
    yield ["plan", "engine", "kept", *(f"{batch} x {sequence}" for batch, sequence in shapes)]
    plans = sorted(
        {plan for rows in shapes.values() for plan in rows}, key=lambda plan: (plan not in DENSE_PLANS, plan)
    )
    fastest = {shape: min(_able(result, rows), key=lambda row: row.milliseconds).plan for shape, rows in shapes.items()}
    for plan in sorted(plans, key=lambda plan: (plan not in DENSE_PLANS, plan)):
        told = []
        for shape, rows in shapes.items():
            row = rows.get(plan)
            if row is None:
                told.append("")
                continue
            if plan == row.best_dense:
                text = f"{row.milliseconds:.2f} ms, best dense"
            else:
                text = f"{row.milliseconds:.2f} ms, {row.speed:.2f}x ({row.low:.2f} to {row.high:.2f})"
            told.append(f"**{text}**" if plan == fastest[shape] else text)
        kept = result["retention"].get(plan)
        yield [plan, engine_of(plan), "" if kept is None else f"{100 * kept:.1f} %", *told]
    name = "flops" if part == MODEL else "ffn_flops"
    limits = [f"{result['bounds'][str(sequence)][name]:.2f}x" for _, sequence in shapes]
    yield ["bound by FLOPs", "", "", *limits]
    if part == MODEL:
        amdahl = [f"{result['bounds'][str(sequence)]['amdahl']:.2f}x" for _, sequence in shapes]
        yield ["bound by Amdahl's law", "", "", *amdahl]


def _able(result: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Row]:
    """Those that keep their quality."""
    return [
        row
        for plan, row in rows.items()
        if plan == "dense" or result["retention"].get(plan, 0.0) >= result["min_retention"]
    ]


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    for (part, phase, threads), shapes in _cells(result).items():
        header, *rows = _grid(result, part, shapes)
        shown = Table(title=f"{_title(part, phase, threads)}: median, speed over best dense", title_justify="left")
        for column in header:
            shown.add_column(column, justify="right" if " x " in column else "left")
        for row in rows:
            shown.add_row(*(f"[bold]{text[2:-2]}[/bold]" if text.startswith("**") else text for text in row))
        yield shown


def page(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, under the command that made them."""
    some = next(iter(_cells(result).values()))
    rounds = [next(iter(rows.values())).rounds for rows in some.values()]
    lines = [
        "# Inference: the plans of all engines side by side",
        "",
        f"`{result['export']}`, {result['mixture']}. {about(result['machine'])}.",
        "",
        f"Median time of a batch (batch x sequence) in {min(rounds)} to {max(rounds)} interleaved rounds, and how many "
        "times as fast that is as the best",
        "dense plan in the same rounds: the median of the rounds and its quartiles. The best dense plan is the fastest "
        "of all engines that keeps",
        f"{100 * result['min_retention']:g} % of the teacher's quality or more (`kept`: the manifest's retention). In "
        "bold: the fastest plan of all that keeps it.",
        "OpenVINO's plans, dense ones and mixtures, are compiled for the shape that is timed.",
        "A bound is on the speed over the same engine's dense plan in the same precision.",
        "",
        f"![Speed of each plan over the best dense plan]({result['image']})",
        "",
        "```",
        result["command"],
        "```",
        "",
    ]
    for (part, phase, threads), shapes in _cells(result).items():
        header, *rows = _grid(result, part, shapes)
        lines += [f"## {_title(part, phase, threads)}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += [""]
    lines += ["## Mixture against best dense", "", "| | " + " | ".join(("best mixture", "speed", "target")) + " |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {' | '.join(told)} |" for told in summary(result)]
    lines += [""]
    for plan, reason in result["missing"].items():
        lines += [f"Not timed: `{plan}` ({reason}).", ""]
    if result["ffn_alone_refused"]:
        lines += [f"FFNs alone are not timed: {result['ffn_alone_refused']}.", ""]
    return "\n".join(lines)


def summary(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """The fastest mixture that keeps its quality, beside what is aimed at."""
    for (part, phase, threads), shapes in _cells(result).items():
        for shape, rows in shapes.items():
            mixtures = [row for row in _able(result, rows) if row.plan not in DENSE_PLANS]
            if not mixtures:
                continue
            best = min(mixtures, key=lambda row: row.milliseconds)
            target = TARGETS.get(shape) if part == MODEL and phase == "whole" else None
            yield [
                f"{_title(part, phase, threads)}, {shape[0]} x {shape[1]}",
                f"{best.plan} against {best.best_dense}",
                f"{best.speed:.2f}x ({best.low:.2f} to {best.high:.2f})",
                "" if target is None else verdict(Spread(best.speed, best.low, best.high), target),
            ]


def figure(result: Mapping[str, Any]) -> Any:
    """Speed over the best dense plan with quartiles, a panel a part and number of threads, a group a shape."""
    from benchmarks.show import bars

    panels = []
    for (part, phase, threads), shapes in _cells(result).items():
        groups = {
            f"{batch} x {sequence}": {
                plan: Spread(row.speed, row.low, row.high) for plan, row in rows.items() if plan != "dense"
            }
            for (batch, sequence), rows in shapes.items()
        }
        name = "flops" if part == MODEL else "ffn_flops"
        limits = [result["bounds"][str(sequence)][name] for _, sequence in shapes]
        panels.append((_title(part, phase, threads), groups, limits))
    return bars(panels, hollow=DENSE_PLANS, ylabel="speed over best dense")


if __name__ == "__main__":
    sys.exit(main())
