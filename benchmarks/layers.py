"""The layer map: one process, several, one Dask worker, two, and two of which one is killed; the same bits from all.

    python -m benchmarks.layers --layers 12 --tokens 16384 --rounds 3 --out docs/results/layers.md

What is mapped is the training of the routers, with the fit of the experts' outputs: the longest of the work on layers.
Every process and every worker has one thread. Times are of the whole map as a stage sees it: with starting processes,
or the flow and Prefect's API for Dask, and with all that travels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import Ratio, ratio
from benchmarks.show import about, complain
from ffn2moe.decompose.jobs import route_job
from ffn2moe.decompose.layer import mixture
from ffn2moe.decompose.layer_map import LayerJob, LayerResult, here, in_processes
from ffn2moe.decompose.route import RouterSettings
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.spec import FFNShape, MoESpec
from flows.environment import settle
from flows.serve import free_port
from tasks.layer_map import DASK, dask_map, in_order

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 2048  # tokens that a router is judged on
STEPS = 100  # of AdamW for each router
ONE, TWO, KILLED = "one Dask worker", "two Dask workers", "two Dask workers, one killed"


@dataclass
class Cluster:
    """A Dask scheduler on loopback and its workers, each of one thread."""

    address: str
    workers: list[subprocess.Popen[bytes]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for bad input."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    settle(ROOT)
    torch.set_num_threads(1)
    try:
        if options.layers < 3 or options.rounds < 1:
            raise ValueError("two workers, one of which is killed, need three layers; and there must be a round")
        jobs = make_jobs(options.layers, options.width, options.ffn_width, options.tokens)
        seconds = measure(jobs, options.rounds, console)
    except (ValueError, OSError) as error:
        return complain(error)
    rows = {name: (median(values), ratio(seconds["one process"], values)) for name, values in seconds.items()}
    speedup = ratio(seconds[ONE], seconds[TWO])
    table = Table(title="The layer map", title_justify="left")
    for column in ("where", "seconds", "times as fast as one process"):
        table.add_column(column, justify="left" if column == "where" else "right")
    for name, (middle, speed) in rows.items():
        table.add_row(name, f"{middle:.1f}", str(speed))
    console.print(table)
    console.print(f"two Dask workers are {speedup} times as fast as one; all came to the same bits")
    if options.out:
        write(options.out, page(options, rows, speedup, sum(map(bytes_of, jobs)) / 2**20), seconds)
        console.print(f"written to {options.out} and {options.out.with_suffix('.json').name}")
    return 0


def make_jobs(layers: int, width: int, ffn_width: int, tokens: int) -> list[LayerJob]:
    """The training of a router for each of so many random layers: 8 experts of which 2 are active, cut in order."""
    stack = FFNShape("encoder.layer", layers, width, ffn_width, ffn_width // 8, 0, gated=False, activation="gelu")
    spec = MoESpec(
        family="bert",
        model_class="BertModel",
        head="embedding",
        stacks=(stack,),
        num_experts=8,
        num_active=2,
        gate="unit",
        router_bias=True,
        container=None,
        partition="contiguous",
        teacher="random",
        pooling="mean",
        max_length=128,
    )
    generator = torch.Generator().manual_seed(0)
    neurons_EM = torch.arange(ffn_width).reshape(8, -1)
    jobs = []
    for layer in range(layers):
        ffn = DenseFFN(
            activation="gelu",
            w_in_FD=torch.randn(ffn_width, width, generator=generator) / width**0.5,
            b_in_F=torch.zeros(ffn_width),
            w_out_DF=torch.randn(width, ffn_width, generator=generator) / ffn_width**0.5,
            b_out_D=torch.zeros(width),
        )
        moe = mixture(ffn, neurons_EM, neurons_EM.new_zeros(0), spec, layer)
        x_TD = torch.randn(tokens + HELD_OUT, width, generator=generator)
        jobs.append(
            route_job(
                moe,
                spec,
                layer,
                RouterSettings(steps=STEPS, batch_tokens=4096, seed=layer),
                x_TD=x_TD[:tokens],
                held_out_TD=x_TD[tokens:],
            )
        )
    return jobs


def measure(jobs: list[LayerJob], rounds: int, console: Console) -> dict[str, list[float]]:
    """Seconds of every way in every round, in turn. ValueError where two ways come to different bits."""
    seconds: dict[str, list[float]] = {}
    wanted: list[LayerResult] = []
    with tempfile.TemporaryDirectory() as folder, dask_cluster(1) as one, dask_cluster(2) as two:
        os.environ["PREFECT_HOME"] = folder
        ways: Mapping[str, Callable[[], list[LayerResult]]] = {
            "one process": lambda: list(here(jobs)),
            "two processes": lambda: in_order(in_processes(jobs, 2)),
            ONE: lambda: by_dask(jobs, one),
            TWO: lambda: by_dask(jobs, two),
            KILLED: lambda: with_one_killed(jobs),
        }
        for index in range(rounds):
            first = index % len(ways)
            for name in [*list(ways)[first:], *list(ways)[:first]]:
                start = time.perf_counter()
                found = ways[name]()
                seconds.setdefault(name, []).append(time.perf_counter() - start - SPARE.pop(name, 0.0))
                wanted = wanted or found
                require_equal(name, found, wanted)
                console.print(f"round {index + 1} of {rounds}: {name}, {seconds[name][-1]:.1f} s")
    return {name: seconds[name] for name in ways}


SPARE: dict[str, float] = {}  # seconds of the last try of a way that are not the map's: starting its own cluster


def by_dask(jobs: list[LayerJob], cluster: Cluster, kill: bool = False) -> list[LayerResult]:
    """The map by a cluster; to `kill` ends one of its workers when the first layer is done."""
    os.environ[DASK] = cluster.address
    do = dask_map()
    assert do is not None
    found = []
    for result in do(jobs):
        if kill and not found:
            cluster.workers[0].kill()
        found.append(result)
    return in_order(found)


def with_one_killed(jobs: list[LayerJob]) -> list[LayerResult]:
    """The map by a new cluster of two workers, of which one is killed after the first layer."""
    start = time.perf_counter()
    with dask_cluster(2) as cluster:
        SPARE[KILLED] = time.perf_counter() - start
        found = by_dask(jobs, cluster, kill=True)
        end = time.perf_counter()
    SPARE[KILLED] += time.perf_counter() - end
    return found


@contextmanager
def dask_cluster(workers: int) -> Iterator[Cluster]:
    """A scheduler and so many workers as processes on loopback. TimeoutError where they do not come up."""
    from distributed import Client

    def start(*command: str) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *command], cwd=ROOT, env=environment, stdout=quiet, stderr=quiet
        )

    address, on_loopback = f"tcp://127.0.0.1:{free_port()}", ("--host", "127.0.0.1", "--no-dashboard")
    processes = [start("scheduler", *on_loopback, "--port", address.rpartition(":")[2])]
    one_thread = ("--nthreads", "1", "--no-nanny", "--preload", "flows.layers")
    cluster = Cluster(address, [start("worker", address, *on_loopback, *one_thread) for _ in range(workers)])
    try:
        with Client(address, timeout=120, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
        yield cluster
    finally:
        for process in [*cluster.workers, *processes]:
            process.kill()
            process.wait()


def require_equal(name: str, found: Sequence[LayerResult], wanted: Sequence[LayerResult]) -> None:
    """ValueError unless both hold the same layers with the same bits."""
    same = all(
        one.layer == other.layer
        and one.summary == other.summary
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
        for one, other in zip(found, wanted, strict=True)
    )
    if not same:
        raise ValueError(f"{name} came to other results than the way before it: this is a bug")


def bytes_of(job: LayerJob) -> int:
    """Of the tensors that travel to where the job is done."""
    return sum(tensor.numel() * tensor.element_size() for tensor in job.tensors.values())


def page(options: argparse.Namespace, rows: Mapping[str, tuple[float, Ratio]], speedup: Ratio, mebibytes: float) -> str:
    """The results in Markdown."""
    lines = [f"| {name} | {middle:.1f} | {speed} |" for name, (middle, speed) in rows.items()]
    shape = f"--layers {options.layers} --width {options.width} --ffn-width {options.ffn_width}"
    text = [
        "# The layer map: processes and Dask workers",
        "",
        f"{options.layers} layers of D {options.width} / F {options.ffn_width}, 8 experts of which 2 are active: the "
        f"router of each is trained on {options.tokens} tokens",
        f"for {STEPS} steps, and its experts' outputs are fitted; {mebibytes:.0f} MiB of tensors go to the workers.",
        f"{about()}.",
        f"One thread in each process and worker, all on this machine; {options.rounds} rounds in turn: medians, and "
        "quartiles within rounds.",
        "",
        "```",
        f"python -m benchmarks.layers {shape} --tokens {options.tokens} --rounds {options.rounds} --out {options.out}",
        "```",
        "",
        "| where | seconds | times as fast as one process |",
        "|---|---|---|",
        *lines,
        "",
        f"Two Dask workers are **{speedup}** times as fast as one. All ways came to the same bits, the one that lost a "
        "worker too.",
        "What Dask takes over processes is starting Prefect's API and the flow, once for a map, and the tensors' way.",
    ]
    return "\n".join(text) + "\n"


def write(out: Path, text: str, seconds: Mapping[str, Sequence[float]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384, help="D")
    parser.add_argument("--ffn-width", type=int, default=1536, help="F, in eight experts")
    parser.add_argument("--tokens", type=int, default=16384, help="that each router is trained on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a page to write, with its figures as JSON beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
