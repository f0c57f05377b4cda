"""Measure the file size and the peak memory of every plan of an export, on all engines, against dense int8.

    python -m benchmarks.memory models/exported --shapes 1x16 1x128 32x128 --threads 1 --out docs/results/memory.md

A fresh process opens each plan and serves the shapes in order. The peak is the most memory that the process ever had
(VmHWM in /proc; pages of mapped files count). OpenVINO compiles its plans for each shape. The texts are real, because
routing decides which experts are used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.page import (
    Grid,
    Page,
    about,
    add_texts,
    chosen,
    in_process,
    parser_of,
    read_texts,
    report,
    shape_of,
    some,
    working,
)
from ffn2moe.planning.timing import fix, full_batches, machine, sample
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import checked_files, read_manifest

DENSE_INT8 = "dense8"
DECODE_TOKENS = 4  # tokens that a generating model writes after each batch
MIB = 2**20
COLUMNS = ("plan", "file", "when open", "peak", "peak less imports", "file / int8", "peak / int8", "net / int8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.memory", __doc__)
    parser.add_argument("export", type=Path, help="the export, for example models/exported, which has every plan")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(1, 16), (1, 128), (32, 128)])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", nargs="+", help=f"only these plans, and {DENSE_INT8}")
    add_texts(parser)
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Measure each plan in a process of its own."""
    texts = read_texts(options.texts)
    plans = read_manifest(options.export)["plans"]
    rows, refused = [], {}
    for plan in chosen(plans, options.plans, DENSE_INT8):
        with working(console, f"measuring {plan}"):
            arguments = (options.export, plan, options.threads, texts, options.shapes)
            found = in_process(options.threads, run, *arguments)
        if isinstance(found, str):
            refused[plan] = found
            continue
        checked_files(options.export, plans[plan])
        size = sum(
            (options.export / name).stat().st_size for name in (plans[plan]["file"], *plans[plan].get("more", {}))
        )
        rows.append({"plan": plan, "file_bytes": size, **found})
    if not rows:
        raise ValueError(f"no plan of {options.export} can be opened here: {refused}")
    return page(options, rows, refused)


def run(path: Path, plan: str, threads: int, texts: list[str], shapes: list[tuple[int, int]]) -> dict[str, Any] | str:
    """Open one plan in this process and serve the shapes; return the bytes after imports, when open, and at most.

    Return the reason instead if the plan cannot run here.
    """
    imported = status("VmRSS")
    try:
        export = open_export(path, plan, threads)
    except ValueError as error:
        return str(error)
    opened = status("VmHWM")
    fix({plan: export}, shapes)
    peaks = []
    for batch, sequence in shapes:
        for tokens in full_batches(export, texts, batch, sequence):
            sample(export, tokens, DECODE_TOKENS)
        peaks.append(status("VmHWM"))
    return {"imported_bytes": imported, "opened_bytes": opened, "peak_bytes": peaks}


def status(key: str) -> int:
    """Return a figure of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def table_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield a row for each plan, with its ratios to dense int8 if the export has it."""
    int8 = next((row for row in rows if row["plan"] == DENSE_INT8), None)
    for row in rows:
        peak, net = row["peak_bytes"][-1], row["peak_bytes"][-1] - row["imported_bytes"]
        ratios = ["-"] * 3
        if int8 is not None:
            int8_peak = int8["peak_bytes"][-1]
            shares = (
                row["file_bytes"] / int8["file_bytes"],
                peak / int8_peak,
                net / (int8_peak - int8["imported_bytes"]),
            )
            ratios = [f"{share:.2f}" for share in shares]
        sizes = (row["file_bytes"], row["opened_bytes"], peak, net)
        yield [row["plan"], *(f"{size / MIB:.1f} MiB" for size in sizes), *ratios]


def page(options: argparse.Namespace, rows: Sequence[dict[str, Any]], refused: dict[str, str]) -> Page:
    """Return the page."""
    spec = read_manifest(options.export)["spec"]
    shapes = ", ".join(f"{batch}x{sequence}" for batch, sequence in options.shapes)
    return Page(
        "File size and peak memory of the plans",
        [
            f"`{options.export}`: {spec['num_active']} of {spec['num_experts']} experts active. A fresh process opens "
            f"each plan and serves batches of {shapes} tokens. `peak` is the most memory it ever had, with mapped "
            "files; `peak less imports` subtracts Python and the libraries. OpenVINO compiles its plans for each "
            f"shape, and each copy needs memory. Ratios are to `{DENSE_INT8}`; {some(options.threads, 'thread')}. "
            f"{about()}.",
        ],
        [Grid("File size and peak memory", COLUMNS, list(table_rows(rows)))],
        notes="\n".join(f"Not measured: `{plan}`: {reason}" for plan, reason in refused.items()),
        result={"machine": machine(), "rows": rows, "refused": refused},
    )


if __name__ == "__main__":
    sys.exit(main())
