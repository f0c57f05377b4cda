"""Divide one layer of LLaMA-7B's shape into experts by every method, and measure the time.

    python -m benchmarks.partition --threads 2 --out docs/results/partition.md
    python -m benchmarks.partition --calibrate --threads 2 --out docs/results/calibration.md
    git worktree add /tmp/before b376d3f
    python -m benchmarks.partition --calibrate --against /tmp/before --tokens 4096 --out docs/results/calibration.md

With `--calibrate` one layer of TinyLlama-1.1B's shape goes all the way instead: statistics and partition, the oracle's
survey, the router's fit, the closed-form refit of the outputs, each timed as `ffn2moe.decompose.stream` does it to
every layer. Each round is a process of its own; with `--against` it is two, one of them in another checkout of this
repository.

Weights, tokens and gradients are random and made on the spot, so that nothing is downloaded: they give a clustering no
structure to find, which is its slowest case. Timed is `ffn2moe.decompose.layer.decompose_layer`, all that a stage does
with a layer; the errors of such experts say nothing and are not reported. Takes some 4 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, get_args
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import in_turn, ratio
from ffn2moe.decompose import layer as factorise
from ffn2moe.decompose import oracle, partition
from ffn2moe.decompose.inputs import chunk_of
from ffn2moe.decompose.layer import decompose_layer
from ffn2moe.decompose.partition import PartitionMethod
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.route import RouterSettings, fit_router
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.planning.timing import machine
from ffn2moe.spec import FFNShape, MoESpec

WIDTH, FFN_WIDTH, EXPERTS, ACTIVE = 4096, 11008, 16, 4
LIMIT = 60.0  # seconds for the whole partition of a layer
PARTS = ("activations", "statistics", "clustering", "slicing")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(highlight=False)
    if options.calibrate:
        return calibrate(options, console)
    ffn, x_TD, gradient_TD = layer(options.tokens)
    results = []
    for method in options.methods:
        for shared_width in options.shared:
            with console.status(f"{method}, {shared_width} shared neurons"):
                results.append(measure(method, shared_width, ffn, x_TD, gradient_TD, options.survey_tokens))
    shown = Table(title="One layer of LLaMA-7B's shape", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for row in results:
        shown.add_row(*cells(row))
    console.print(shown)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options, results), encoding="utf-8")
        console.print(f"written to {options.out}")
    slowest = max(results, key=lambda row: row["seconds"])
    if slowest["seconds"] > LIMIT:
        console.print(f"[red]{slowest['method']} took {slowest['seconds']:.0f} s, more than {LIMIT:.0f} s[/red]")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.partition", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(get_args(PartitionMethod)), help="those to measure")
    parser.add_argument("--shared", type=int, nargs="+", default=[0], help="widths of the shared expert")
    parser.add_argument("--tokens", type=int, default=16000, help="calibration tokens")
    parser.add_argument("--survey-tokens", type=int, default=2048, help="tokens that the oracle is asked about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibrate", action="store_true", help="one layer of TinyLlama's shape, all the way")
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 5632], help="D and F of the layer to calibrate")
    parser.add_argument("--rounds", type=int, default=3, help="times that a layer is calibrated; medians are told")
    parser.add_argument("--against", type=Path, help="a checkout of another version, to calibrate the layer in turn")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/partition.md")
    return parser


def layer(tokens: int, width: int = WIDTH, ffn_width: int = FFN_WIDTH) -> tuple[DenseFFN, torch.Tensor, torch.Tensor]:
    """A gated FFN, its inputs [T, D] and the gradients at its outputs [T, D], all random."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, deviation: float = 1.0) -> torch.Tensor:
        return deviation * torch.randn(rows, columns, generator=generator)

    ffn = DenseFFN(
        w_in_FD=normal(ffn_width, width, 0.02),
        w_out_DF=normal(width, ffn_width, 0.02),
        activation="silu",
        w_gate_FD=normal(ffn_width, width, 0.02),
    )
    return ffn, normal(tokens, width), normal(tokens, width)


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each part of what is done inside: other than in these it is statistics."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    with (
        patch.object(DenseFFN, "neurons", timed("activations", DenseFFN.neurons)),
        patch.object(partition, "balanced_kmeans", timed("clustering", partition.balanced_kmeans)),
        patch.object(partition, "gradient", timed("clustering", partition.gradient)),
        patch.object(factorise, "mixture", timed("slicing", factorise.mixture)),
    ):
        start = time.perf_counter()
        yield spent
        spent["statistics"] = time.perf_counter() - start - sum(spent.values())


def measure(
    method: PartitionMethod,
    shared_width: int,
    ffn: DenseFFN,
    x_TD: torch.Tensor,
    gradient_TD: torch.Tensor,
    survey_tokens: int,
) -> dict[str, Any]:
    """Seconds that a method takes, by the clock and of all processors, and those of the oracle on its experts."""
    spec = _spec(WIDTH, FFN_WIDTH, EXPERTS, ACTIVE, method, shared_width)
    processors = time.process_time()
    with clocks() as spent:
        moe = decompose_layer(ffn, x_TD, spec, 0, seed=0, gradient_TD=gradient_TD)
    row: dict[str, Any] = {"method": method, "shared": shared_width, **spent, "seconds": sum(spent.values())}
    row["processors"] = time.process_time() - processors
    start = time.perf_counter()
    oracle.survey(moe, x_TD[:survey_tokens], chunk_of(EXPERTS * WIDTH))
    return row | {"survey": time.perf_counter() - start}


def _spec(width: int, ffn_width: int, experts: int, active: int, method: PartitionMethod, shared: int) -> MoESpec:
    shape = FFNShape("layers", 1, width, ffn_width, -(-(ffn_width - shared) // experts), shared, True, "silu")
    return MoESpec(
        family="llama",
        model_class="LlamaModel",
        head="causal",
        stacks=(shape,),
        num_experts=experts,
        num_active=active,
        gate="unit",
        router_bias=True,
        container=None,
        partition=method,
        teacher="random weights",
        pooling=None,
        max_length=2048,
        selection="prefix" if method == "nested" else "topk",
    )


CALIBRATED_EXPERTS, CALIBRATED_ACTIVE = 8, 2
ROUTER_STEPS = 200  # as `ffn2moe.decompose.stream` takes
STEPS = ("activations", "statistics", "clustering", "slicing", "dense outputs", "oracle", "router", "scale", "refit")


# What a process of one round does, in the checkout that it runs in. The first layer is small: imports are not counted.
WORKER = """
import json, sys, time, torch
from benchmarks import partition
tokens, width, ffn_width, experts, active, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
for T, D, F in ((256, 64, 128), (tokens, width, ffn_width)):
    ffn, x_TD, _ = partition.layer(T, D, F)
    start = time.process_time()
    told = partition._all_the_way(ffn, x_TD, partition._spec(D, F, experts, active, "coactivation", 0))
    told["processors"] = time.process_time() - start
print(json.dumps(told))
"""


def calibrate(options: argparse.Namespace, console: Console) -> int:
    """Take a layer all the way, and tell the seconds of every step."""
    width, ffn_width = options.shape
    numbers = (options.tokens, width, ffn_width, CALIBRATED_EXPERTS, CALIBRATED_ACTIVE, options.threads)
    threads = str(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    def in_checkout(folder: Path) -> dict[str, float]:
        command = [sys.executable, "-c", WORKER, *map(str, numbers)]
        done = subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return told | {"in all": sum(told[step] for step in STEPS)}

    checkouts = {"before": options.against} if options.against else {}
    checkouts["now"] = Path(__file__).resolve().parents[1]
    with console.status("calibrating"):
        works = {name: partial(in_checkout, folder) for name, folder in checkouts.items()}
        found = in_turn(works, options.rounds, warm_up=0)
    columns = ("step", *found, *(("now / before",) if options.against else ()))
    rows = []
    for step in (*STEPS, "in all", "processors"):
        seconds = {name: [told[step] for told in rounds] for name, rounds in found.items()}
        cells = [step, *(f"{median(each):.2f} s" for each in seconds.values())]
        if options.against:
            cells.append(str(ratio(seconds["now"], seconds["before"])) if min(seconds["before"]) > 0.01 else "")
        rows.append(cells)
    shown = Table(title=f"One layer, D {width}, F {ffn_width}, {options.tokens} tokens", title_justify="left")
    for column in columns:
        shown.add_column(column)
    for cells in rows:
        shown.add_row(*cells)
    console.print(shown)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(calibration_page(options, columns, rows), encoding="utf-8")
        console.print(f"written to {options.out}")
    return 0


def calibration_page(options: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table of `calibrate` as Markdown, under the command that made it."""
    here = machine()
    width, ffn_width = options.shape
    command = f"python -m benchmarks.partition --calibrate --shape {width} {ffn_width} --tokens {options.tokens}"
    command += f" --threads {options.threads} --rounds {options.rounds} --out docs/results/{options.out.name}"
    compared = []
    if options.against:
        revision = ["git", "-C", str(options.against), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(revision, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        command = f"git worktree add BEFORE {commit}\n{command} --against BEFORE"
        compared = [
            f"`before` is commit {commit}, a process of each in turn; ratios are within rounds, their median and what "
            "half of them lie between.",
        ]
    return "\n".join(
        [
            "# A layer of TinyLlama-1.1B's shape, calibrated",
            "",
            f"D {width}, F {ffn_width}, gated; E = {CALIBRATED_EXPERTS}, K = {CALIBRATED_ACTIVE}, coactivation "
            f"partition, routers by ridge regression and {ROUTER_STEPS} steps,",
            f"{options.tokens} random tokens. Medians of {options.rounds} by the clock, and `processors`, the time of "
            f"all threads together; {here['cpu']}, {options.threads} threads,",
            f"torch {metadata.version('torch')}; load average {os.getloadavg()[0]:.0f}: where that is more than the "
            "threads, other work had its share of the clock.",
            *compared,
            "",
            "```",
            command,
            "```",
            "",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
            *("| " + " | ".join(cells) + " |" for cells in rows),
            "",
            "`scale` needs nothing beside the oracle's inner products where the FFN has no output bias; `refit` ends "
            "with a solution of F linear",
            "equations in float64, which is most of it.",
            "",
        ]
    )


def _all_the_way(ffn: DenseFFN, x_TD: torch.Tensor, spec: MoESpec) -> dict[str, float]:
    """Seconds of every step that makes a routed layer of a dense FFN."""
    with clocks() as spent:
        moe = decompose_layer(ffn, x_TD, spec, 0, seed=0)
    told = dict(spent)
    last = time.perf_counter()

    def mark(step: str) -> None:
        nonlocal last
        now = time.perf_counter()
        told[step] = now - last
        last = now

    wanted_TD = factorise.outputs(ffn, x_TD)
    mark("dense outputs")
    surveyed: list[float] = []

    def survey(*arguments: Any, **more: Any) -> Any:
        start = time.perf_counter()
        try:
            return known(*arguments, **more)
        finally:
            surveyed.append(time.perf_counter() - start)

    known = oracle.survey
    fitted: list[float] = []

    def fit(*arguments: Any) -> None:
        start = time.perf_counter()
        fit_known(*arguments)
        fitted.append(time.perf_counter() - start)

    fit_known = oracle.fit_scales
    with patch.object(oracle, "survey", survey), patch.object(oracle, "fit_scales", fit):
        fit_router(moe, x_TD, RouterSettings(steps=ROUTER_STEPS, batch_tokens=4096, seed=0))
    mark("router")
    told["oracle"], told["scale"] = sum(surveyed), sum(fitted)
    told["router"] -= told["oracle"] + told["scale"]
    refit_outputs(moe, x_TD, wanted_TD, penalty=1e-2, chunk=chunk_of(spec.num_experts * x_TD.shape[1]))
    mark("refit")
    return told


COLUMNS = ("method", "S", *PARTS, "in all", "processors", "oracle")


def cells(row: dict[str, Any]) -> list[str]:
    seconds = (*PARTS, "seconds", "processors", "survey")
    return [row["method"], str(row["shared"]), *(f"{row[part]:.1f} s" for part in seconds)]


def page(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, under the command that made it."""
    here = machine()
    command = f"python -m benchmarks.partition --shared {' '.join(map(str, options.shared))} --tokens {options.tokens}"
    command += f" --survey-tokens {options.survey_tokens} --threads {options.threads} --out docs/results/partition.md"
    return "\n".join(
        [
            "# A layer of LLaMA-7B's shape, divided",
            "",
            f"D {WIDTH}, F {FFN_WIDTH}, gated; {EXPERTS} experts, {options.tokens} calibration tokens; weights, tokens "
            "and gradients are random.",
            "Seconds by the clock. `activations` are the products of the dense FFN, in bfloat16 where the hardware has "
            "it, `slicing` is the",
            "experts' weights and the mixture made of them, `statistics` the rest; `processors` is the time of all "
            "threads together, `oracle` the",
            f"survey of such a layer that routers are fitted to, in float32, on {options.survey_tokens} tokens more.",
            f"{here['cpu']}, {options.threads} threads, torch {metadata.version('torch')}, Python "
            f"{platform.python_version()}; load average {os.getloadavg()[0]:.0f}: where",
            "that is more than the threads, other work had its share of the clock and not of `processors`.",
            "",
            "```",
            command,
            "```",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *(f"| {' | '.join(cells(row))} |" for row in results),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
