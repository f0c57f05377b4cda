"""Decompose and route a checkpoint of TinyLlama's shape layer by layer, and measure memory and time.

    python -m benchmarks.streaming /tmp/streaming --out docs/results/streaming.md

Makes randomly initialised checkpoints (bfloat16 shards; 22 layers are 1.1 B parameters, 2.2 GB), runs each in a process
of its own, and reads the most memory that process ever had from /proc (VmHWM: weights mapped from the shards count).
Weights and tokens are random, so the errors of the layers say nothing and only memory and time are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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
    options = _parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(run(options.folder, options.worker, options.tokens, options.threads)))
        return 0
    console = Console(highlight=False)
    results = []
    for layers in options.layers:
        folder = options.folder / f"random-{layers}"
        if not (folder / "config.json").is_file():
            console.print(f"making a checkpoint of {layers} layers in {folder}")
            make_checkpoint(folder, layers)
        results.append(measure(folder, layers, options, console))
        console.print(table(results))
        if not options.keep:
            shutil.rmtree(folder)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options, results), encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"written to {options.out}")
    worst = max(row["peak_bytes"] for row in results) / 2**30
    if worst > LIMIT_GIB:
        console.print(f"[red]{worst:.2f} GiB is more than the {LIMIT_GIB:.0f} GiB that it should need[/red]")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where checkpoints and results go: 5 GB for the default")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 22], help="checkpoints of so many layers")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens, in texts of 512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for another run")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/streaming.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def make_checkpoint(folder: Path, layers: int) -> None:
    """A LLaMA with random weights, a shard for each layer and one for the rest; never whole in memory."""
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
    """One decomposition in this process: what it was said to take and what it took."""
    import torch

    from ffn2moe.data.batches import in_order
    from ffn2moe.decompose.memory import estimate
    from ffn2moe.decompose.stream import decompose

    torch.set_num_threads(threads)
    length, batch_tokens = 512, 1024
    ids = torch.randint(SHAPE["vocab_size"], (tokens // length, length), generator=torch.Generator().manual_seed(0))
    before = status("VmRSS")
    said = estimate(folder, num_experts=EXPERTS, calibration_tokens=tokens, batch_tokens=batch_tokens)
    start = time.perf_counter()

    def track(items: Any, total: int, what: str) -> Iterator[Any]:
        for item in items:
            yield item
            print(f"layer {item}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    rows = decompose(
        folder,
        out,
        list(in_order("causal", ids.tolist(), batch_texts=batch_tokens // length)),
        num_experts=EXPERTS,
        num_active=ACTIVE,
        max_length=length,
        teacher="random weights",
        track=track,
    )
    return {
        "seconds": time.perf_counter() - start,
        "layer_seconds": [row["seconds"] for row in rows],
        "peak_bytes": status("VmHWM"),
        "imports_bytes": before,
        "estimated_bytes": said.memory,
        "disk_bytes": sum(path.stat().st_size for path in out.iterdir()),
    }


def status(key: str) -> int:
    """A figure of this process that Linux keeps, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(folder: Path, layers: int, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The figures of one checkpoint, from a process of its own."""
    out = options.folder / f"moe-{layers}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.streaming", str(folder), "--worker", str(out)]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    with console.status(f"{layers} layers"):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    shutil.rmtree(out)
    parameters = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] + layers * 44_044_288
    return {"layers": layers, "parameters": parameters, **json.loads(done.stdout.splitlines()[-1])}


def _rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    gib = 2**30
    return [
        [
            str(row["layers"]),
            f"{row['parameters'] / 1e9:.2f} B",
            f"{row['peak_bytes'] / gib:.2f} GiB",
            f"{row['estimated_bytes'] / gib:.2f} GiB",
            f"{sorted(row['layer_seconds'])[len(row['layer_seconds']) // 2]:.1f} s",
            f"{row['seconds'] / 60:.1f} min",
            f"{row['disk_bytes'] / gib:.2f} GiB",
        ]
        for row in results
    ]


COLUMNS = ("layers", "weights", "peak memory", "estimated", "a layer", "in all", "written")


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A checkpoint a row."""
    shown = Table(title="Layer by layer", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for row in _rows(results):
        shown.add_row(*row)
    return shown


def page(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, under the command that made it."""
    from ffn2moe.planning.timing import machine

    command = f"python -m benchmarks.streaming FOLDER --layers {' '.join(map(str, options.layers))}"
    command += f" --tokens {options.tokens} --threads {options.threads} --out docs/results/streaming.md"
    here = machine()
    imports = max(row["imports_bytes"] for row in results) / 2**30
    first, last = results[0], results[-1]
    grown = (last["peak_bytes"] - first["peak_bytes"]) / 2**20
    return "\n".join(
        [
            "# Layer by layer: memory and time",
            "",
            "Randomly initialised checkpoints of TinyLlama's shape (D 2048, F 5632, 32 heads of which 4 for keys and "
            "values, V 32000),",
            f"bfloat16 shards; E = {EXPERTS}, K = {ACTIVE}, coactivation partition, routers by ridge regression and "
            f"200 steps, {options.tokens}",
            "calibration tokens, computed in float32. The most memory the process ever had (VmHWM), "
            f"of which {imports:.2f} GiB are Python and",
            f"torch; a layer's time is the median. {here['cpu']}, {options.threads} threads,",
            f"torch {metadata.version('torch')}, Python {platform.python_version()}; other work ran on the machine.",
            "",
            "```",
            command,
            "```",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *(f"| {' | '.join(row)} |" for row in _rows(results)),
            "",
            f"From {first['layers']} to {last['layers']} layers memory changes by {grown:+.0f} MiB.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
