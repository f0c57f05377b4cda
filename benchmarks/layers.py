"""Time the layer map: in one process, in several, with one Dask worker, with two, and with two when one is killed.

    python -m benchmarks.layers --layers 12 --tokens 16384 --rounds 3 --out docs/results/layers.md

The jobs fit the routers and the outputs of the experts, the longest work on a layer. Every process and every worker has
one thread. The time is of the whole map as a stage sees it: it includes starting processes, or the flow and Prefect's
API for Dask, and moving the tensors. All ways must give the same bits.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.ffn import random_mixture, random_spec
from benchmarks.page import Grid, Page, about, parser_of, report, working
from benchmarks.race import Sample, Samples, race
from ffn2moe.decompose.jobs import route_job
from ffn2moe.decompose.layer_map import LayerJob, LayerResult, here, in_processes
from ffn2moe.decompose.route import RouterSettings
from flows.environment import settle
from flows.serve import free_port
from tasks.layer_map import DASK, dask_map, in_order

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 2048  # tokens that judge a router
STEPS = 100  # of AdamW for each router
ALONE, ONE, TWO, KILLED = "one process", "one Dask worker", "two Dask workers", "two Dask workers, one killed"


Timed = tuple[list[LayerResult], float]  # results and seconds
Cluster = tuple[str, list[subprocess.Popen[bytes]]]  # address of a scheduler on loopback, workers of one thread


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for bad input."""
    parser = parser_of("benchmarks.layers", __doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384, help="D")
    parser.add_argument("--ffn-width", type=int, default=1536, help="F, a multiple of eight experts")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens that fit each router")
    parser.add_argument("--rounds", type=int, default=3)
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Time every way to run the map."""
    settle(ROOT)
    torch.set_num_threads(1)
    if options.layers < 3 or options.rounds < 1:
        raise ValueError("two workers, one of them killed, need three layers; and there must be a round")
    jobs = make_jobs(options.layers, options.width, options.ffn_width, options.tokens)
    samples = timed_ways(jobs, options.rounds, console)
    rows = [[name, f"{samples.median(name):.1f}", str(samples.speed(name, ALONE))] for name in samples.seconds]
    mebibytes = sum(tensor.nbytes for job in jobs for tensor in job.tensors.values()) / 2**20
    return Page(
        "The layer map: processes and Dask workers",
        [
            f"{options.layers} layers of D {options.width} / F {options.ffn_width}, E = 8, K = 2. Each job fits a "
            f"router on {options.tokens} tokens for {STEPS} steps, and then the outputs of the experts; "
            f"{mebibytes:.0f} MiB of tensors go to the workers. One thread in each process and worker, all on this "
            f"machine; {options.rounds} rounds: medians, and speeds within rounds with quartiles. {about()}.",
        ],
        [Grid("The layer map", ["where", "seconds", "speed over one process"], rows)],
        notes=f"Two Dask workers are {samples.speed(TWO, ONE)} times as fast as one. All ways gave the same bits. Dask "
        "also starts Prefect's API and the flow, once for a map, and moves the tensors.",
        result={"seconds": samples.seconds},
    )


def make_jobs(layers: int, width: int, ffn_width: int, tokens: int) -> list[LayerJob]:
    """Return the job of a router for each random layer: 8 experts, 2 active."""
    spec = random_spec(width, ffn_width, 8, 2, gated=False, layers=layers)
    generator = torch.Generator().manual_seed(0)
    jobs = []
    for layer in range(layers):
        moe = random_mixture(spec, layer)
        x_TD = torch.randn(tokens + HELD_OUT, width, generator=generator)
        settings = RouterSettings(steps=STEPS, batch_tokens=4096, seed=layer)
        jobs.append(route_job(moe, spec, layer, settings, x_TD=x_TD[:tokens], held_out_TD=x_TD[tokens:]))
    return jobs


def timed_ways(jobs: list[LayerJob], rounds: int, console: Console) -> Samples:
    """Time every way in turn. ValueError if two ways give different bits."""
    wanted: list[LayerResult] = []

    def timed(name: str, way: Callable[[], Timed]) -> Sample:
        def sample(index: int) -> dict[str, float]:
            with working(console, f"round {index + 1} of {rounds}: {name}"):
                found, seconds = way()
            wanted.extend(found if not wanted else ())
            for one, other in zip(found, wanted, strict=True):
                same = (one.layer, one.summary, one.tensors.keys()) == (
                    other.layer,
                    other.summary,
                    other.tensors.keys(),
                )
                if not same or any(not torch.equal(one.tensors[key], value) for key, value in other.tensors.items()):
                    raise ValueError(f"{name} gives other results than the way before it: this is a bug")
            return {"whole": seconds}

        return sample

    with tempfile.TemporaryDirectory() as folder, dask_cluster(1) as one, dask_cluster(2) as two:
        os.environ["PREFECT_HOME"] = folder
        ways: Mapping[str, Callable[[], Timed]] = {
            ALONE: lambda: clocked(lambda: list(here(jobs))),
            "two processes": lambda: clocked(lambda: in_order(in_processes(jobs, 2))),
            ONE: lambda: clocked(lambda: by_dask(jobs, one)),
            TWO: lambda: clocked(lambda: by_dask(jobs, two)),
            KILLED: lambda: with_one_killed(jobs),
        }
        entries = {name: timed(name, way) for name, way in ways.items()}
        return race(entries, rounds=rounds, fewest=1)["whole"]


def clocked(run: Callable[[], list[LayerResult]]) -> Timed:
    """Return the results of a run and its seconds."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def by_dask(jobs: list[LayerJob], cluster: Cluster, kill: bool = False) -> list[LayerResult]:
    """Run the map on a cluster; `kill` ends one of its workers after the first layer."""
    os.environ[DASK], workers = cluster
    do = dask_map()
    assert do is not None
    found = []
    for result in do(jobs):
        if kill and not found:
            workers[0].kill()
        found.append(result)
    return in_order(found)


def with_one_killed(jobs: list[LayerJob]) -> Timed:
    """Run the map on a new cluster of two workers, and kill one after the first layer."""
    with dask_cluster(2) as cluster:
        return clocked(lambda: by_dask(jobs, cluster, kill=True))


@contextmanager
def dask_cluster(workers: int) -> Iterator[Cluster]:
    """Start a scheduler and workers as processes on loopback. TimeoutError if they do not come up."""
    from distributed import Client

    def start(*command: str) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *command], cwd=ROOT, env=environment, stdout=quiet, stderr=quiet
        )

    address, on_loopback = f"tcp://127.0.0.1:{free_port()}", ("--host", "127.0.0.1", "--no-dashboard")
    scheduler = start("scheduler", *on_loopback, "--port", address.rpartition(":")[2])
    one_thread = ("--nthreads", "1", "--no-nanny", "--preload", "flows.layers")
    started = [start("worker", address, *on_loopback, *one_thread) for _ in range(workers)]
    try:
        with Client(address, timeout=120, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
        yield address, started
    finally:
        for process in [*started, scheduler]:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
