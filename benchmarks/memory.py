"""Measure the file size and the peak memory of every plan of an export, on all engines, against dense int8.

    python -m benchmarks.memory exports/minilm --shapes 1x16 1x128 32x128 --threads 1 --out docs/results/memory.md

A fresh process opens each plan and serves the shapes in order. The peak is the most memory that the process ever had
(VmHWM in /proc; pages of mapped files count). OpenVINO compiles its plans for each shape. The texts are real, because
routing decides which experts are used.
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

from benchmarks.page import (
    Grid,
    about,
    add_texts,
    command_of,
    complain,
    console_of,
    page_of,
    parser_of,
    read_texts,
    shape_of,
    working,
    write,
)
from ffn2moe.planning.timing import fix, full_batches, machine, sample
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import checked_files, read_manifest

DENSE_INT8 = "dense8"
DECODE_TOKENS = 4  # tokens that a generating model writes after each batch
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.memory", __doc__)
    parser.add_argument("export", type=Path, help="the export, for example exports/minilm")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(1, 16), (1, 128), (32, 128)])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", nargs="+", help=f"only these plans, and {DENSE_INT8}")
    add_texts(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(run(options)))
        return 0
    console = console_of()
    try:
        rows, refused = measure(options, console)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        return complain(error)
    grid = Grid("File size and peak memory", COLUMNS, list(table_rows(rows)))
    console.print(grid.table())
    for plan, reason in refused.items():
        console.print(f"not measured: {plan}: {reason}")
    if options.out:
        result = {"machine": machine(), "rows": rows, "refused": refused}
        write(options.out, page(options, grid, refused, command_of(parser, options)), result, console)
    return 0


def measure(options: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the figures of each plan, and the reasons of the plans that cannot run here."""
    read_texts(options.texts)
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
        with working(console, f"measuring {plan}"):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        if "refused" in found:
            refused[plan] = found["refused"]
            continue
        checked_files(options.export, entry)
        size = sum((options.export / name).stat().st_size for name in (entry["file"], *entry.get("more", {})))
        rows.append({"plan": plan, "file_bytes": size, **found})
    if not rows:
        raise ValueError(f"no plan of {options.export} can be opened here: {refused}")
    return rows, refused


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Open one plan in this process and serve the shapes; return the bytes after imports, when open, and at most."""
    texts = read_texts(options.texts)
    imported = status("VmRSS")
    try:
        export = open_export(options.export, options.worker, options.threads)
    except ValueError as error:
        return {"refused": str(error)}
    opened = status("VmHWM")
    fix({options.worker: export}, options.shapes)
    peaks = []
    for batch, sequence in options.shapes:
        for tokens in full_batches(export, texts, batch, sequence):
            sample(export, tokens, DECODE_TOKENS)
        peaks.append(status("VmHWM"))
    return {"imported_bytes": imported, "opened_bytes": opened, "peak_bytes": peaks}


def status(key: str) -> int:
    """Return a figure of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


COLUMNS = ("plan", "file", "when open", "peak", "peak less imports", "file / int8", "peak / int8", "net / int8")


def table_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield a row for each plan, with its ratios to dense int8 if the export has it."""
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


def page(options: argparse.Namespace, grid: Grid, refused: dict[str, str], command: str) -> str:
    """Return the page in Markdown."""
    spec = read_manifest(options.export)["spec"]
    shapes = ", ".join(f"{batch}x{sequence}" for batch, sequence in options.shapes)
    return page_of(
        "File size and peak memory of the plans",
        [
            f"`{options.export}`: {spec['num_active']} of {spec['num_experts']} experts active. A fresh process opens "
            f"each plan and serves batches of {shapes} tokens. `peak` is the most memory it ever had, with mapped "
            "files; `peak less imports` subtracts Python and the libraries. OpenVINO compiles its plans for each "
            f"shape, and each copy needs memory. Ratios are to `{DENSE_INT8}`; {options.threads} threads. {about()}.",
        ],
        command,
        [grid],
        notes="\n".join(f"Not measured: `{plan}`: {reason}" for plan, reason in refused.items()),
    )


if __name__ == "__main__":
    sys.exit(main())
