"""Decompose and route a checkpoint of TinyLlama's shape layer by layer; measure memory and time.

    python -m benchmarks.streaming /tmp/streaming --out docs/results/streaming.md

The checkpoints are random (bfloat16 shards; 22 layers are 1.1 B parameters, 2.2 GB). Its own process converts each.
The peak is VmHWM in /proc, which counts the pages of mapped shards. Weights and tokens are random, so the errors of the
layers say nothing and are not reported.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.memory import status
from benchmarks.page import GIB, Grid, Page, about, in_process, load_average, parser_of, report, some, working

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
EXPERTS, ACTIVE = 8, 2
LIMIT_GIB = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if a process needs more than LIMIT_GIB."""
    parser = parser_of("benchmarks.streaming", __doc__)
    parser.add_argument("folder", type=Path, help="folder of checkpoints and results: 5 GB by default")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 22], help="numbers of layers, one checkpoint each")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens, in texts of 512")
    parser.add_argument("--threads", type=int, default=2)
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Convert each checkpoint in a process of its own."""
    rows = []
    for layers in options.layers:
        folder, out = options.folder / f"random-{layers}", options.folder / f"moe-{layers}"
        with working(console, f"making a checkpoint of {layers} layers in {folder}"):
            make_checkpoint(folder, layers)
        shutil.rmtree(out, ignore_errors=True)
        with working(console, f"converting {layers} layers"):
            found = in_process(options.threads, run, folder, out, options.tokens, options.threads)
        parameters = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] + layers * 44_044_288
        rows.append({"layers": layers, "parameters": parameters, **found})
        for made in (folder, out):
            shutil.rmtree(made)
    return page(options, rows)


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write a LLaMA with random weights in bfloat16, about a shard for each layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=False)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")


def run(folder: Path, out: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Convert in this process; return the estimated and the measured memory, and the seconds."""
    import torch

    from ffn2moe.data.batches import in_order
    from ffn2moe.decompose.memory import estimate
    from ffn2moe.decompose.route import RouterSettings
    from ffn2moe.decompose.source import skeleton
    from ffn2moe.decompose.stream import StreamSettings, decompose
    from ffn2moe.moe.describe import spec_of

    torch.set_num_threads(threads)
    length, batch_tokens = 512, 1024
    ids = torch.randint(SHAPE["vocab_size"], (tokens // length, length), generator=torch.Generator().manual_seed(0))
    before = status("VmRSS")
    spec = spec_of(
        skeleton(folder),
        head="causal",
        num_experts=EXPERTS,
        num_active=ACTIVE,
        partition="coactivation",
        teacher="random weights",
        max_length=length,
    )
    estimated = estimate(folder, spec, calibration_tokens=tokens, batch_tokens=batch_tokens)
    start = time.perf_counter()

    batches = list(in_order("causal", ids.tolist(), batch_texts=batch_tokens // length))
    settings = StreamSettings(spec, RouterSettings(steps=200, batch_tokens=1024, seed=0))
    rows = list(decompose(folder, out, batches, settings))
    return {
        "seconds": time.perf_counter() - start,
        "layer_seconds": [row["seconds"] for row in rows],
        "peak_bytes": status("VmHWM"),
        "imports_bytes": before,
        "estimated_bytes": estimated.memory,
        "disk_bytes": sum(path.stat().st_size for path in out.iterdir()),
    }


def page(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> Page:
    """Return the page, with a row for each checkpoint."""
    cells = [
        [
            str(row["layers"]),
            f"{row['parameters'] / 1e9:.2f} B",
            *(f"{row[key] / GIB:.2f} GiB" for key in ("peak_bytes", "estimated_bytes")),
            f"{median(row['layer_seconds']):.1f} s",
            f"{row['seconds'] / 60:.1f} min",
            f"{row['disk_bytes'] / GIB:.2f} GiB",
        ]
        for row in rows
    ]
    header = ("layers", "weights", "peak memory", "estimated", "a layer", "in all", "written")
    imports, worst = (max(row[key] for row in rows) / GIB for key in ("imports_bytes", "peak_bytes"))
    first, last = rows[0], rows[-1]
    grown = (last["peak_bytes"] - first["peak_bytes"]) / 2**20
    return Page(
        "Layer by layer: memory and time",
        [
            "Random checkpoints of TinyLlama's shape (D 2048, F 5632, 32 heads, 4 for keys and values, V 32000) in "
            f"bfloat16 shards; E = {EXPERTS}, K = {ACTIVE}, coactivation partition, routers by ridge regression and "
            f"200 steps, {options.tokens} calibration tokens, computed in float32. `peak memory` is VmHWM of the "
            f"process, with {imports:.2f} GiB for Python and torch; `a layer` is the median. "
            f"{some(options.threads, 'thread')}; {about()}. {load_average()}"
        ],
        [Grid("Layer by layer", header, cells)],
        notes=f"From {first['layers']} to {last['layers']} layers memory changes by {grown:+.0f} MiB.",
        result={"rows": rows},
        failure=f"the peak of {worst:.2f} GiB is above the limit of {LIMIT_GIB:.0f} GiB" if worst > LIMIT_GIB else "",
    )


if __name__ == "__main__":
    sys.exit(main())
