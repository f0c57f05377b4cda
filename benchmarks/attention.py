"""Time plans of OpenVINO with the attention of the operator's library, and with OpenVINO's own.

    python -m benchmarks.attention models/exported --plans ov-dense8s ov-native4s --shapes 1x128 32x128 \\
        --texts data/corpus/evaluation.jsonl --out docs/results/attention.md

Both are timed in turn on the same batches of real text without padding. The last column compares the plans with the
first one of them, each as it is used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from benchmarks.page import (
    Grid,
    Page,
    about,
    add_texts,
    load_average,
    parser_of,
    read_texts,
    report,
    rounds_of,
    shape_of,
)
from benchmarks.race import Spread, race, stopwatch
from ffn2moe.planning import timing
from ffn2moe.runtime import native
from ffn2moe.runtime.engines._openvino_attention import has_attention
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.plans import plan_of

FUSE = "ffn2moe.runtime.engines.openvino.fuse_attention"
OWN, ITS = "the operator's", "OpenVINO's"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.attention", __doc__)
    parser.add_argument("export", type=Path, help="the export, for example models/exported, which has every plan")
    parser.add_argument(
        "--plans", nargs="+", default=["ov-dense8s", "ov-native4s"], help="the first one is the baseline"
    )
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(1, 16), (1, 128), (32, 32), (32, 128)])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    add_texts(parser)
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Time each plan both ways at each shape; return the page. ValueError where there is nothing to compare."""
    for plan in options.plans:
        if plan_of(plan).engine != "openvino":
            raise ValueError(f"{plan} runs in {plan_of(plan).engine}: name plans of OpenVINO with --plans")
    if not has_attention(native.library()):
        raise ValueError("this processor has no AMX, or FFN2MOE_NATIVE names another path: both ways are OpenVINO's")
    texts = read_texts(options.texts)
    opened: dict[tuple[str, str], Any] = {}
    for plan in options.plans:
        opened[plan, OWN] = open_export(options.export, plan, options.threads)
        with patch(FUSE, lambda model, library: 0):
            opened[plan, ITS] = open_export(options.export, plan, options.threads)
    rows, raw = [], []
    with rounds_of(console) as track:
        for batch, sequence in options.shapes:
            timing.fix({" ".join(key): export for key, export in opened.items()}, [(batch, sequence)])
            batches = timing.full_batches(next(iter(opened.values())), texts, batch, sequence)

            def call(export: Any, index: int, batches: Sequence[timing.Batch] = batches) -> None:
                export.run(*batches[index % len(batches)])

            entries = {" ".join(key): stopwatch(partial(call, export)) for key, export in opened.items()}
            label = f"{batch} x {sequence}"
            [samples] = race(entries, rounds=options.rounds, warm_up=2, label=label, track=track).values()
            for plan in options.plans:
                own, its = f"{plan} {OWN}", f"{plan} {ITS}"
                gain = samples.speed(own, its)
                over = samples.speed(own, f"{options.plans[0]} {OWN}")
                times = [1000 * samples.median(name) for name in (its, own)]
                rows.append([label, plan, *(f"{one:.2f}" for one in times), _times(gain), _times(over)])
                raw.append({"shape": label, "plan": plan, "ms": times, "gain": gain.median, "over_first": over.median})
    header = ["batch x sequence", "plan", "OpenVINO's, ms", "the operator's, ms", "gain", f"over `{options.plans[0]}`"]
    return Page(
        "Attention by the operator's library, and by OpenVINO",
        [
            f"{about()}. {options.threads} thread(s), medians of {options.rounds} rounds in turn, quartiles of the "
            f"ratios in brackets. {load_average()}"
        ],
        [Grid("Milliseconds of a batch", header, rows)],
        result={"rows": raw},
    )


def _times(speed: Spread) -> str:
    return f"{speed.median:.2f}x ({speed.low:.2f} to {speed.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
