"""Work on layers comes to the same in one process, in several and on Dask workers, also when one of these is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ffn2moe.decompose import layer_map
from ffn2moe.decompose.jobs import decompose_job, judge_job, route_job
from ffn2moe.decompose.layer_map import AHEAD, LayerJob, LayerResult, here, in_processes
from ffn2moe.decompose.route import RouterSettings
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.distill.layerwise import LayerDistillation, LayerTraining
from ffn2moe.moe.layer import moe_layers
from flows.serve import free_port
from tasks.layer_map import DASK, dask_map, in_order
from tests.mixtures import carve

PROJECT = Path(__file__).parent.parent


def jobs_of(teacher: Path) -> list[LayerJob]:
    """A job of every kind, each under a layer number of its own, on the first layer of a tiny model."""
    dense, _ = load_dense(str(teacher))
    student, spec = carve(teacher, output_scale=1.0)
    ffn, moe, known = read_ffn(dense, 0), moe_layers(student)[0], replace(spec, partition="coactivation")
    x_TD = torch.randn(600, spec.width, generator=torch.Generator().manual_seed(0))
    training = LayerTraining(steps=5, batch_tokens=64, learning_rate=1e-2, seed=0)
    router = RouterSettings(steps=5, batch_tokens=64, seed=0, refit=0.1)
    return [
        decompose_job(ffn, x_TD, known, 0, seed=0, every_budget=False),
        decompose_job(ffn, x_TD, known, 0, seed=0, every_budget=True),
        judge_job(ffn, moe.neurons, moe.shared_neurons, x_TD, spec, 0),
        route_job(moe, spec, 0, router, x_TD=x_TD[:500], held_out_TD=x_TD[500:]),
        LayerDistillation(0, moe, ffn, x_TD, training).to_send(spec),
    ]


def numbered(jobs: list[LayerJob], layers: int) -> list[LayerJob]:
    """Jobs for layers 0, 1, ...: those of a model whose layers are alike."""
    return [LayerJob(job.kind, layer, _deep(job, layers), job.tensors) for layer, job in enumerate(jobs)]


def _deep(job: LayerJob, layers: int) -> dict[str, Any]:
    if "spec" not in job.settings:
        return job.settings
    stacks = [{**stack, "num_layers": layers} for stack in job.settings["spec"]["stacks"]]
    return {**job.settings, "spec": {**job.settings["spec"], "stacks": stacks}}


def assert_equal(found: list[LayerResult], wanted: list[LayerResult]) -> None:
    assert [(one.layer, one.summary) for one in found] == [(one.layer, one.summary) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert [name for name, tensor in one.tensors.items() if not torch.equal(tensor, other.tensors[name])] == []


@pytest.fixture(scope="module")
def jobs(tiny_teacher: Path) -> list[LayerJob]:
    each = jobs_of(tiny_teacher)
    return numbered(each, len(each))


@pytest.fixture(scope="module")
def in_one(jobs: list[LayerJob]) -> list[LayerResult]:
    return list(here(jobs))


def dask(*arguments: str) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "dask", *arguments], cwd=PROJECT, **quiet)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and two workers on loopback."""
    address = f"tcp://127.0.0.1:{free_port()}"
    host = ("--host", "127.0.0.1", "--no-dashboard")
    processes = [dask("scheduler", *host, "--port", address.rpartition(":")[2])]
    workers = [
        dask("worker", address, *host, "--nthreads", "1", "--no-nanny", "--preload", "flows.layers") for _ in range(2)
    ]
    from distributed import Client

    try:
        with Client(address, timeout=180, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=180)
        yield address, workers
    finally:
        for process in [*workers, *processes]:
            process.kill()
            process.wait()


def test_several_processes_come_to_what_one_does(jobs, in_one, tmp_path: Path):
    assert_equal(in_order(in_processes(jobs, 2, folder=tmp_path)), in_one)
    assert list(tmp_path.iterdir()) == []


def test_no_more_jobs_lie_in_files_than_each_process_does_and_the_next(jobs, in_one, tmp_path: Path):
    """A language model's layers are gigabytes, and the folder for temporary files may be in memory."""
    written, results = [], []
    for result in in_processes(jobs, 1, folder=tmp_path):
        results.append(result)
        written.append(len(list(tmp_path.glob("*/layer-*.job"))))
    assert_equal(in_order(results), in_one)
    assert len(jobs) == 5 and written == [AHEAD, AHEAD, AHEAD, 1, 0]


def test_a_job_that_fails_is_named_with_its_layer(jobs):
    bad = LayerJob("none", 7, {}, {})
    with pytest.raises(ChildProcessError, match="do layer 7 failed: ValueError: no worker knows the job 'none'"):
        list(in_processes([bad], 1))


def test_a_process_that_is_killed_is_told_with_the_layers_it_left(jobs):
    settings = {**jobs[3].settings, "router": {**jobs[3].settings["router"], "steps": 10**6}}
    results = in_processes([LayerJob("route", 0, settings, jobs[3].tensors)], 1)
    before = {child.pid for child in psutil.Process().children()}

    def kill() -> None:
        while True:
            for child in psutil.Process().children():
                if child.pid not in before and "spawn_main" in " ".join(child.cmdline()):
                    time.sleep(0.3)
                    child.kill()
                    return
            time.sleep(0.05)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ChildProcessError, match="do layer 0 ended with exit code -9"):
        list(results)


def test_a_worker_with_another_version_refuses_the_job(jobs, tmp_path: Path, monkeypatch):
    jobs[0].save(tmp_path / "job")
    ours = layer_map.made_with()
    monkeypatch.setattr(layer_map, "made_with", lambda: {**ours, "torch": "1.0"})
    with pytest.raises(ValueError, match=r"torch: 1\.0 here, .* install the same versions on all machines"):
        LayerJob.load(tmp_path / "job")


def test_dask_workers_come_to_the_same_one_task_of_prefect_a_layer_though_one_is_killed(
    jobs, in_one, cluster, tmp_path: Path, monkeypatch
):
    address, workers = cluster
    monkeypatch.setenv(DASK, address)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    do = dask_map()
    assert do is not None
    results = do(jobs)
    found = [next(results)]
    os.kill(workers[0].pid, signal.SIGKILL)
    found += results
    assert_equal(in_order(found), in_one)
    with sqlite3.connect(tmp_path / "prefect" / "prefect.db") as database:
        rows = database.execute("SELECT name, state_type FROM task_run").fetchall()
    assert {name for name, _ in rows} == {f"layer {index}" for index in range(len(jobs))}, rows


def test_a_scheduler_that_does_not_answer_is_named_with_the_remedy(jobs, monkeypatch):
    address = f"tcp://127.0.0.1:{free_port()}"
    monkeypatch.setenv(DASK, address)
    do = dask_map()
    assert do is not None
    with pytest.raises(ChildProcessError, match=rf"no Dask scheduler answers at {DASK} = {address} .* unset {DASK}"):
        list(do(jobs[:1]))
