"""Decompose and route a checkpoint of TinyLlama's shape layer by layer; measure memory and time.

    python -m benchmarks.streaming /tmp/streaming --out docs/results/streaming.md

The checkpoints are random (bfloat16 shards; 22 layers are 1.1 B parameters, 2.2 GB). Its own process converts each.
The peak is VmHWM in /proc, which counts the pages of mapped shards. Weights and tokens are random, so the errors of the
layers say nothing and are not reported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.memory import status
from benchmarks.page import (
    GIB,
    Grid,
    about,
    command_of,
    console_of,
    load_average,
    page_of,
    parser_of,
    working,
    write,
)

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
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for another run")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(run(options.folder, options.worker, options.tokens, options.threads)))
        return 0
    console = console_of()
    results = []
    for layers in options.layers:
        folder = options.folder / f"random-{layers}"
        if not (folder / "config.json").is_file():
            with working(console, f"making a checkpoint of {layers} layers in {folder}"):
                make_checkpoint(folder, layers)
        results.append(measure(folder, layers, options, console))
        console.print(grid_of(results).table())
        if not options.keep:
            shutil.rmtree(folder)
    if options.out:
        write(options.out, page(options, results, command_of(parser, options)), {"rows": results}, console)
    worst = max(row["peak_bytes"] for row in results) / GIB
    if worst > LIMIT_GIB:
        console.print(f"the peak of {worst:.2f} GiB is above the limit of {LIMIT_GIB:.0f} GiB")
        return 1
    return 0


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write a LLaMA with random weights, a shard for each layer and one for the rest, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(name.split(".")[2] if name.startswith("model.layers.") else "outer", []).append(name)
    weight_map = {}
    for index, names in enumerate(groups.values(), 1):
        shard = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name in names:
            noise = 0.02 * torch.randn(wanted[name].shape, generator=generator)
            tensors[name] = (noise + ("norm" in name)).bfloat16()
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config.save_pretrained(folder)


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

    def track(items: Any, total: int, label: str) -> Iterator[Any]:
        for item in items:
            yield item
            print(f"layer {item}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    rows = decompose(
        folder,
        out,
        list(in_order("causal", ids.tolist(), batch_texts=batch_tokens // length)),
        StreamSettings(spec, RouterSettings(steps=200, batch_tokens=1024, seed=0)),
        track=track,
    )
    return {
        "seconds": time.perf_counter() - start,
        "layer_seconds": [row["seconds"] for row in rows],
        "peak_bytes": status("VmHWM"),
        "imports_bytes": before,
        "estimated_bytes": estimated.memory,
        "disk_bytes": sum(path.stat().st_size for path in out.iterdir()),
    }


def measure(folder: Path, layers: int, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the figures of one checkpoint, from a process of its own."""
    out = options.folder / f"moe-{layers}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.streaming", str(folder), "--worker", str(out)]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    with working(console, f"converting {layers} layers"):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    shutil.rmtree(out)
    parameters = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] + layers * 44_044_288
    return {"layers": layers, "parameters": parameters, **json.loads(done.stdout.splitlines()[-1])}


def grid_of(results: Sequence[dict[str, Any]]) -> Grid:
    """Return a table with a row for each checkpoint."""
    header = ("layers", "weights", "peak memory", "estimated", "a layer", "in all", "written")
    rows = [
        [
            str(row["layers"]),
            f"{row['parameters'] / 1e9:.2f} B",
            *(f"{row[key] / GIB:.2f} GiB" for key in ("peak_bytes", "estimated_bytes")),
            f"{sorted(row['layer_seconds'])[len(row['layer_seconds']) // 2]:.1f} s",
            f"{row['seconds'] / 60:.1f} min",
            f"{row['disk_bytes'] / GIB:.2f} GiB",
        ]
        for row in results
    ]
    return Grid("Layer by layer", header, rows)


def page(options: argparse.Namespace, results: Sequence[dict[str, Any]], command: str) -> str:
    """Return the page in Markdown."""
    imports = max(row["imports_bytes"] for row in results) / GIB
    first, last = results[0], results[-1]
    grown = (last["peak_bytes"] - first["peak_bytes"]) / 2**20
    return page_of(
        "Layer by layer: memory and time",
        [
            "Random checkpoints of TinyLlama's shape (D 2048, F 5632, 32 heads, 4 for keys and values, V 32000) in "
            f"bfloat16 shards; E = {EXPERTS}, K = {ACTIVE}, coactivation partition, routers by ridge regression and "
            f"200 steps, {options.tokens} calibration tokens, computed in float32. `peak memory` is VmHWM of the "
            f"process, with {imports:.2f} GiB for Python and torch; `a layer` is the median. {options.threads} "
            f"threads; {about()}, torch {metadata.version('torch')}. {load_average()}"
        ],
        command,
        [grid_of(results)],
        notes=f"From {first['layers']} to {last['layers']} layers memory changes by {grown:+.0f} MiB.",
    )


if __name__ == "__main__":
    sys.exit(main())
