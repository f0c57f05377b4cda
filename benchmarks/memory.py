"""File size and peak memory of every plan of an export, on all engines, against dense int8.

    python -m benchmarks.memory exports/minilm --shapes 1x16 1x128 32x128 --threads 1 --out docs/results/memory.md

Each plan is opened in a fresh process, which then serves the shapes in order; what is read from /proc is the most
memory that the process ever had (VmHWM: pages of mapped files count). Plans of OpenVINO are compiled for each of the
shapes, as they are where they were chosen for them. Texts are real, because routing decides what is used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ffn2moe.planning.timing import fix, full_batches, machine, sample
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import checked_files, read_manifest

DENSE_INT8 = "dense8"
DEFAULT_TEXTS = Path("data/corpus/evaluation.jsonl")
DECODE_TOKENS = 4  # of a model that generates, after each batch
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(run(options)))
        return 0
    console = Console(highlight=False)
    try:
        rows, refused = measure(options, console)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2
    shown = Table(title="File size and peak memory", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "plan" else "right")
    for cells in table_rows(rows):
        shown.add_row(*cells)
    console.print(shown)
    for plan, reason in refused.items():
        console.print(f"not measured: {plan}: {reason}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options, rows, refused), encoding="utf-8")
        told = {"rows": rows, "refused": refused, "machine": machine()}
        options.out.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="the export, for example exports/minilm")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(1, 16), (1, 128), (32, 128)])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", nargs="+", help="those only (dense8 is always measured)")
    parser.add_argument("--texts", type=Path, default=DEFAULT_TEXTS, help="JSON lines with a text each, or plain lines")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/memory.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def _shape(text: str) -> tuple[int, int]:
    batch, cross, sequence = text.partition("x")
    if not (cross and batch.isdecimal() and sequence.isdecimal() and int(batch) and int(sequence)):
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxSEQUENCE, for example 32x128")
    return int(batch), int(sequence)


def measure(options: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The figures of each plan, and of those that cannot be opened here why."""
    if not options.texts.is_file():
        raise FileNotFoundError(f"{options.texts} does not exist: name a file of texts with --texts")
    plans = read_manifest(options.export)["plans"]
    unknown = sorted(set(options.plans or ()) - set(plans))
    if unknown:
        raise ValueError(f"{options.export} has no plan {', '.join(unknown)}; it has {', '.join(plans)}")
    rows, refused = [], {}
    for plan, entry in plans.items():
        if options.plans and plan not in {*options.plans, DENSE_INT8}:
            continue
        command = [sys.executable, "-m", "benchmarks.memory", str(options.export), "--worker", plan]
        command += ["--threads", str(options.threads), "--texts", str(options.texts), "--shapes"]
        command += [f"{batch}x{sequence}" for batch, sequence in options.shapes]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        with console.status(plan):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        told = json.loads(done.stdout.splitlines()[-1])
        if "refused" in told:
            refused[plan] = told["refused"]
            continue
        checked_files(options.export, entry)
        size = sum((options.export / name).stat().st_size for name in (entry["file"], *entry.get("more", {})))
        rows.append({"plan": plan, "file_bytes": size, **told})
    if not rows:
        raise ValueError(f"no plan of {options.export} can be opened here: {refused}")
    return rows, refused


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Open one plan in this process and serve the shapes; bytes after importing, at most when open, and at most."""
    texts = _texts(options.texts)
    imported = _status("VmRSS")
    try:
        export = open_export(options.export, options.worker, options.threads)
    except ValueError as error:
        return {"refused": str(error)}
    opened = _status("VmHWM")
    fix({options.worker: export}, options.shapes)
    peaks = []
    for batch, sequence in options.shapes:
        for tokens in full_batches(export, texts, batch, sequence):
            sample(export, tokens, DECODE_TOKENS)
        peaks.append(_status("VmHWM"))
    return {"imported_bytes": imported, "opened_bytes": opened, "peak_bytes": peaks}


def _texts(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines


def _status(key: str) -> int:
    """A figure of this process that Linux keeps, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


COLUMNS = ("plan", "file", "when open", "peak", "peak less imports", "file / int8", "peak / int8", "net / int8")


def table_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A plan a row, beside dense int8 where the export has it."""
    int8 = next((row for row in rows if row["plan"] == DENSE_INT8), None)
    for row in rows:
        peak, net = row["peak_bytes"][-1], row["peak_bytes"][-1] - row["imported_bytes"]
        yield [
            row["plan"],
            *(f"{size / MIB:.1f} MiB" for size in (row["file_bytes"], row["opened_bytes"], peak, net)),
            *(
                ["-"] * 3
                if int8 is None
                else [
                    f"{row['file_bytes'] / int8['file_bytes']:.2f}",
                    f"{peak / int8['peak_bytes'][-1]:.2f}",
                    f"{net / (int8['peak_bytes'][-1] - int8['imported_bytes']):.2f}",
                ]
            ),
        ]


def page(options: argparse.Namespace, rows: Sequence[dict[str, Any]], refused: dict[str, str]) -> str:
    """The table as Markdown, under the command that made it."""
    here = machine()
    shapes = " ".join(f"{batch}x{sequence}" for batch, sequence in options.shapes)
    command = f"python -m benchmarks.memory {options.export} --shapes {shapes} --threads {options.threads}"
    command += f"{' --plans ' + ' '.join(options.plans) if options.plans else ''} --out docs/results/memory.md"
    spec = read_manifest(options.export)["spec"]
    return "\n".join(
        [
            "# File size and peak memory of the plans",
            "",
            f"`{options.export}`: {spec['num_active']} of {spec['num_experts']} experts active. A fresh process a plan "
            f"opens it and serves batches of {', '.join(shapes.split())} tokens;",
            "`peak` is the most memory it ever had, mapped files counted, `peak less imports` without what Python and "
            "the libraries take before",
            "anything is opened. OpenVINO's plans are compiled for each of the shapes apart, which costs memory each.",
            f"Ratios to `{DENSE_INT8}`; {options.threads} threads, {here['cpu']}, "
            f"{', '.join(f'{engine} {here[engine]}' for engine in ('onnxruntime', 'openvino') if engine in here)}.",
            "",
            "```",
            command,
            "```",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *(f"| {' | '.join(cells)} |" for cells in table_rows(rows)),
            *([""] if refused else []),
            *(f"Not measured: `{plan}`: {reason}" for plan, reason in refused.items()),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
