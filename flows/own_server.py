"""Give the flows of this process a Prefect server of its own, if they have no other.

Prefect would start one, too, but only when the flow begins, and it would first import the whole server into the process
of the flow. This server starts while the process does something else.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flows.processes import HOST, PATIENCE, answers
from flows.workspace import FlowError

SECONDS_TO_DELIVER = 10.0  # for what is queued when the flows have ended
SECONDS_TO_END = 5.0
APP = ("--factory", "prefect.server.api.server:create_app", "--log-level", "error", "--lifespan", "on")
# As Prefect starts its own: without a page, schedules and other services of a server that stays.
TEMPORARY = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


@contextmanager
def own_server() -> Iterator[Callable[[], None]]:
    """Start a server on loopback unless PREFECT_API_URL names one, and end it after the block.

    Yields a function that waits until it answers; call it before a flow. That raises FlowError if the server ends or
    takes too long.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield lambda: None
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    process, address = _start()
    try:
        with temporary_settings({PREFECT_API_URL: f"{address}/api"}):
            try:
                yield lambda: _wait(process, address)
            finally:  # deliver what is queued while the server runs; later it would be retried for a minute
                if process.poll() is None:
                    for worker in (EventsWorker, APILogWorker):
                        worker.drain_all(timeout=SECONDS_TO_DELIVER)
    finally:
        _end(process)


def _start() -> tuple[subprocess.Popen[bytes], str]:
    """Start the server on a free port; return its process and its address."""
    # The server inherits the socket, so no other process can take the port before it listens.
    with socket.create_server((HOST, 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *APP, "--fd", str(listener.fileno())],
            env={**os.environ, **TEMPORARY},
            stdin=subprocess.DEVNULL,
            pass_fds=(listener.fileno(),),
            start_new_session=True,  # Ctrl-C ends the flow first, which still reports how it ended
        )
        return process, f"http://{HOST}:{listener.getsockname()[1]}"


def _wait(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not answers(f"{address}/api/health"):
        if (code := process.poll()) is not None:
            cause = f"it ended with code {code}"
        elif time.monotonic() > deadline:
            cause = f"it does not answer after {PATIENCE:.0f} s"
        else:
            time.sleep(0.1)
            continue
        raise FlowError(
            f"the server of Prefect did not start: {cause}; if the machine is busy, run again, or run the stages "
            "without Prefect: make repro"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
