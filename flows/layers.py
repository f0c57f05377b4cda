"""Work on layers by Dask workers, through Prefect: one task for each layer.

    python -m flows.layers --address tcp://127.0.0.1:8786 FOLDER

A stage starts it when FFN2MOE_DASK names a scheduler (tasks/layer_map.py). It reads a folder of jobs
(ffn2moe/decompose/layer_map.py) and writes their results into the same folder. If a worker is lost, another one does
its jobs again.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

from flows.environment import settle  # noqa: E402

settle(ROOT)

import numpy as np  # noqa: E402
from prefect import flow, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402

from ffn2moe.decompose.layer_map import deliver, do_bytes, orders_in  # noqa: E402
from flows.own_server import own_server  # noqa: E402
from flows.workspace import FlowError  # noqa: E402
from tasks.layer_map import DASK  # noqa: E402
from tasks.stage import die_with_parent  # noqa: E402

SECONDS_TO_ANSWER = 10
SECONDS_WITHOUT_WORKERS = 60  # until lost workers count as gone
TRIES = 3  # for a layer that loses its workers; Dask gives each try to 4 workers
SECONDS_BETWEEN_LOOKS = 0.05


@task(task_run_name="layer {layer}", cache_policy=NO_CACHE, persist_result=False)
def one_layer(layer: int, data: np.ndarray) -> bytes:
    """Do a job, a safetensors file as uint8 [bytes]; return its result as another."""
    return do_bytes(data.tobytes())


@flow(name="layers", persist_result=False, validate_parameters=False)
def layers(folder: str) -> int:
    """Do every job of the folder by the task runner of the flow; return the number of layers."""
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
        while waiting and len(running) < 2 * workers:  # not all at once: the scheduler holds them in memory
            layer = min(waiting)
            path = waiting.pop(layer)
            # Dask hashes an array at once; to name a task after bytes it would print them, for minutes.
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
                        f"layer {layer} ended every worker that tried it: {error}; if memory ran out there, start "
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
    """Run `layers` on the workers of a scheduler; errors have cause and remedy."""
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
        security = (
            Security() if address.startswith("tls://") else None
        )  # certificates come from the configuration of Dask
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
    with own_server() as wait:
        wait()
        return layers.with_options(task_runner=DaskTaskRunner(address=address, client_kwargs=options))(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.layers", description="Do a folder of jobs by Dask.")
    parser.add_argument("--address", required=True, help="address of the scheduler, such as tcp://127.0.0.1:8786")
    parser.add_argument("folder")
    chosen = parser.parse_args(arguments)
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    warnings.filterwarnings("ignore", message="Sending large graph")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # the errors are printed below
    try:
        run(chosen.address, chosen.folder)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FlowError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2


if __name__ == "__main__":
    from flows.layers import main as imported  # workers look for the task in this module, not in __main__

    sys.exit(imported())
