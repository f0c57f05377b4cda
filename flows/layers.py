"""The work on layers by Dask workers, through Prefect: a task a layer.

    python -m flows.layers --address tcp://127.0.0.1:8786 FOLDER

A stage starts it when FFN2MOE_DASK names a scheduler (tasks/layer_map.py), with a folder of jobs
(ffn2moe/decompose/layer_map.py) in which it leaves what came of each. A worker that is lost costs what it was at work
on: that is done again by another.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

from flows.environment import settle  # noqa: E402

settle(ROOT)

import numpy as np  # noqa: E402
from prefect import flow, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402

from ffn2moe.decompose.layer_map import deliver, do_bytes, orders_in  # noqa: E402
from tasks.layer_map import DASK  # noqa: E402
from tasks.stage import die_with_parent  # noqa: E402

SECONDS_TO_ANSWER = 10
SECONDS_WITHOUT_WORKERS = 60  # before those that are lost are taken to stay away
TRIES = 3  # of a layer whose workers are lost: Dask gives each of them to 4 workers
SECONDS_BETWEEN_LOOKS = 0.05


@task(task_run_name="layer {layer}", cache_policy=NO_CACHE, persist_result=False)
def one_layer(layer: int, data: np.ndarray) -> bytes:
    """Does a job that travels as a safetensors file, uint8 [bytes]; what came of it, as another."""
    return do_bytes(data.tobytes())


@flow(name="layers", persist_result=False, validate_parameters=False)
def layers(folder: str) -> int:
    """Does every job of the folder by the flow's task runner; the number of layers."""
    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    assert context is not None
    client = context.task_runner.client
    waiting = orders_in(folder)
    found = len(waiting)
    tries = dict.fromkeys(waiting, 0)
    running: dict[int, Any] = {}
    seen = time.monotonic()
    while waiting or running:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if workers:
            seen = time.monotonic()
        elif time.monotonic() - seen > SECONDS_WITHOUT_WORKERS:
            raise ChildProcessError(f"no worker is left at the Dask scheduler: {_start_a_worker(client)}")
        while waiting and len(running) < 2 * workers:  # not all at once: the scheduler keeps what it is given
            layer = min(waiting)
            path = waiting.pop(layer)
            # An array, which Dask hashes at once: to name the task after bytes it would spell them out, for minutes.
            running[layer] = one_layer.submit(layer, np.fromfile(path, np.uint8))
        for layer, future in list(running.items()):
            if not future.wrapped_future.done():
                continue
            del running[layer]
            try:
                deliver(folder, layer, future.result())
            except (KilledWorker, FutureCancelledError) as error:
                tries[layer] += 1
                if tries[layer] == TRIES:
                    raise ChildProcessError(
                        f"layer {layer} took every worker with it that tried: {error}; if memory ran out there, start "
                        "fewer workers on a machine"
                    ) from None
                waiting[layer] = Path(folder) / f"layer-{layer}.job"
            except Exception as error:
                raise ChildProcessError(f"layer {layer} failed on a Dask worker: {error}") from error
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return found


def _start_a_worker(client: Any) -> str:
    return f"start some, `python -m dask worker {client.scheduler.address} --nthreads 1` in the project's folder"


def run(address: str, folder: str) -> int:
    """`layers` on the workers of a scheduler; what goes wrong is raised with cause and remedy."""
    try:
        from distributed import Client
        from distributed.comm import parse_address
        from distributed.security import Security
        from prefect_dask import DaskTaskRunner
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{DASK} = {address} and {error.name} is not installed: pip install -c constraints.txt 'ffn2moe[dask]', or "
            f"unset {DASK} for processes on this machine"
        ) from None
    try:
        parse_address(address, strict=True)
        security = Security() if address.startswith("tls://") else None  # certificates from Dask's own configuration
        client = Client(address, timeout=SECONDS_TO_ANSWER, set_as_default=False, security=security)
    except (OSError, ValueError, TypeError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {DASK} = {address} ({type(error).__name__}); start one (`python -m dask "
            f"scheduler --host 127.0.0.1`), correct the address, or unset {DASK} for processes on this machine"
        ) from None
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            raise ConnectionError(f"the Dask scheduler at {address} has no worker: {_start_a_worker(client)}")
    options = {"timeout": SECONDS_TO_ANSWER, **({"security": security} if security else {})}
    with _server():
        return layers.with_options(task_runner=DaskTaskRunner(address=address, client_kwargs=options))(folder)


@contextmanager
def _server() -> Iterator[None]:
    """Prefect's API for flow and workers: the server at PREFECT_API_URL, else one on loopback for as long as this."""
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with SubprocessASGIServer() as server, temporary_settings({PREFECT_API_URL: server.api_url}):
        try:
            yield
        finally:  # what is still on its way to the server goes before it does: it would be tried for a minute
            for worker in (EventsWorker, APILogWorker):
                worker.drain_all(timeout=SECONDS_TO_ANSWER)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.layers", description="Does a folder of jobs by Dask.")
    parser.add_argument("--address", required=True, help="of the scheduler, such as tcp://127.0.0.1:8786")
    parser.add_argument("folder")
    chosen = parser.parse_args(arguments)
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    warnings.filterwarnings("ignore", message="Sending large graph")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what it would tell is told below
    try:
        run(chosen.address, chosen.folder)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2


if __name__ == "__main__":
    from flows.layers import main as imported  # workers look for the task in this module, and not in __main__

    sys.exit(imported())
