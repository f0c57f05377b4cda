"""Time the plans of an export side by side on this machine.

    python -m benchmarks.inference exports/minilm --shapes 1x16 32x128 --threads 1 2

The same measurement as the stage `benchmark`, at any shapes; `--out` keeps the table as a page with its command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track as progress
from rich.table import Table

from ffn2moe.runtime import read_manifest, read_plan
from ffn2moe.timing import Timing, machine, time_export

DEFAULT_TEXTS = Path("data/corpus/evaluation.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        rows = measure(options, console)
    except (ValueError, OSError, RuntimeError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2
    console.print(table(rows))
    console.print(about(options.export))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options, rows), encoding="utf-8")
        console.print(f"written to {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="the export, for example exports/minilm")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(1, 16), (1, 128), (32, 32), (32, 128)])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plans", nargs="+", help="those only (dense is always timed)")
    parser.add_argument("--texts", type=Path, default=DEFAULT_TEXTS, help="JSON lines with a text each, or plain lines")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/inference.md")
    return parser


def _shape(text: str) -> tuple[int, int]:
    try:
        batch, sequence = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxSEQUENCE, for example 32x128") from None
    if min(batch, sequence) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: batch and sequence start at 1")
    return batch, sequence


def measure(options: argparse.Namespace, console: Console) -> list[Timing]:
    """Every timing, in the order of threads and shapes."""
    if not options.texts.is_file():
        raise FileNotFoundError(f"{options.texts} does not exist: name a file of texts with --texts")
    lines = options.texts.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines] if options.texts.suffix == ".jsonl" else lines

    def track(label: str, rounds: range) -> Iterator[int]:
        yield from progress(rounds, description=label, console=console, transient=True, disable=not console.is_terminal)

    return [
        row
        for rows in time_export(
            options.export,
            [text for text in texts if text.strip()],
            shapes=options.shapes,
            threads=options.threads,
            rounds=options.rounds,
            plans=options.plans,
            track=track,
        )
        for row in rows
    ]


def table(rows: Sequence[Timing]) -> Table:
    """Median milliseconds and the speed over `dense`, a plan a row and a shape a column."""
    shown = Table(title="Median time, and speed over dense float32", title_justify="left")
    shown.add_column("plan")
    for label in _labels(rows):
        shown.add_column(label, justify="right")
    for plan, cells in _cells(rows).items():
        shown.add_row(plan, *cells)
    return shown


def _labels(rows: Sequence[Timing]) -> list[str]:
    """Batch x sequence of each column, with the threads where they differ."""
    several = len({row.threads for row in rows}) > 1
    labels = (
        f"{row.batch} x {row.sequence}"
        + (f", {row.threads} thr." if several else "")
        + ("" if row.phase == "whole" else f", {row.phase}")
        for row in rows
    )
    return list(dict.fromkeys(labels))


def _cells(rows: Sequence[Timing]) -> dict[str, list[str]]:
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row.plan, []).append(f"{row.median_ms:.2f} ms {row.speedup_vs_dense:.2f}x")
    return cells


def about(export: Path) -> str:
    """The machine, and what the mixture is; bounds where the stage `benchmark` has written them."""
    spec, measured, here = read_manifest(export)["spec"], read_plan(export), machine()
    text = (
        f"{here['cpu']}, {here['cores']} cores, onnxruntime {here['onnxruntime']}; "
        f"{spec['num_active']} of {spec['num_experts']} experts active"
    )
    if measured:
        bounds = measured["bounds"]
        text += f"; bounds by FLOPs {bounds['flops']:.2f}x, by Amdahl's law {bounds['amdahl']:.2f}x"
    return text


def page(options: argparse.Namespace, rows: Sequence[Timing]) -> str:
    """The table as Markdown, under the command that made it."""
    labels = _labels(rows)
    threads = " and ".join(map(str, options.threads)) + (" thread" if options.threads == [1] else " threads")
    command = f"python -m benchmarks.inference {options.export} --shapes " + " ".join(
        f"{batch}x{sequence}" for batch, sequence in options.shapes
    )
    command += f" --threads {' '.join(map(str, options.threads))} --rounds {options.rounds}"
    header = "| plan | " + " | ".join(labels) + " |"
    lines = [f"| {plan} | {' | '.join(cells)} |" for plan, cells in _cells(rows).items()]
    return "\n".join(
        [
            "# Inference: the plans side by side",
            "",
            f"Median time of a batch (batch x sequence, {threads}), and speed over dense float32 in the same run.",
            f"{about(options.export)}.",
            "",
            "```",
            command,
            "```",
            "",
            header,
            "|" + "---|" * (len(labels) + 1),
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
