"""End the processes of a flow that was killed without notice (SIGKILL, a closed terminal).

Otherwise Prefect's API server, DVC and the workers of a stage would survive. Every process of a flow inherits a mark in
its environment; the guardian, a small process, waits for the end of the flow and then ends all that carry the mark.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "FFN2MOE_FLOW"


def guard(root: Path) -> subprocess.Popen[bytes]:
    """Mark this process and start its guardian, which ends by itself; the caller must keep the result."""
    mark = str(os.getpid())
    guardian = subprocess.Popen(
        [sys.executable, "-m", "flows.guardian", mark],
        cwd=root,
        stdin=subprocess.PIPE,  # the system closes it when this process ends in any way
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # not in the group that a terminal or a supervisor stops
    )
    os.environ[MARK] = mark
    return guardian


def carriers(variable: str, value: str) -> list[psutil.Process]:
    """Return every other process with this variable in its environment."""
    return [one for one in psutil.process_iter() if one.pid != os.getpid() and _carries(one, variable, value)]


def orphaned(pid: int) -> bool:
    """Return whether the flow of a process is gone, so that its guardian is about to end it."""
    try:
        mark = psutil.Process(pid).environ().get(MARK)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
    return mark is not None and not psutil.pid_exists(int(mark))


def end(variable: str, value: str) -> int:
    """End every process that carries a mark; return their number."""
    return finish(carriers(variable, value))


def finish(processes: Sequence[psutil.Process], patience: float = 3) -> int:
    """Terminate processes, kill those that remain after `patience` seconds; return their number."""
    for process in processes:
        _send(process, "terminate")
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for process in alive:
        _send(process, "kill")
    psutil.wait_procs(alive, timeout=3)
    return len(processes)


def _carries(process: psutil.Process, variable: str, value: str) -> bool:
    try:
        return process.environ().get(variable) == value
    except psutil.Error:  # of another user, or gone
        return False


def _send(process: psutil.Process, action: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, action)()


if __name__ == "__main__":
    sys.stdin.read()
    end(MARK, sys.argv[1])
