"""Ends what a flow has started when the flow is killed in a way it cannot see (SIGKILL, a closed terminal).

Prefect's API server, DVC and a stage's workers would all live on. Every process a flow starts inherits a mark
in its environment; a small process beside the flow waits for its end, then ends those that carry the mark.
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
    """Marks this process and starts its guardian, which leaves on its own; to be held on to until the end."""
    mark = str(os.getpid())
    guardian = subprocess.Popen(
        [sys.executable, "-m", "flows.guardian", mark],
        cwd=root,
        stdin=subprocess.PIPE,  # closed by the system when this process ends, however it ends
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # not in the group a terminal or a supervisor stops
    )
    os.environ[MARK] = mark
    return guardian


def carriers(variable: str, value: str) -> list[psutil.Process]:
    """Every process with this variable in its environment, but for this one."""
    return [one for one in psutil.process_iter() if one.pid != os.getpid() and _carries(one, variable, value)]


def orphaned(pid: int) -> bool:
    """Whether a process was started by a flow that is no more, so that its guardian is about to end it."""
    try:
        mark = psutil.Process(pid).environ().get(MARK)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
    return mark is not None and not psutil.pid_exists(int(mark))


def end(variable: str, value: str) -> int:
    """Ends every process that carries a mark; how many there were."""
    return finish(carriers(variable, value))


def finish(processes: Sequence[psutil.Process], patience: float = 3) -> int:
    """Terminates processes, kills those that are still there after `patience` seconds; how many there were."""
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
    except psutil.Error:  # another user's, or gone
        return False


def _send(process: psutil.Process, action: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, action)()


if __name__ == "__main__":
    sys.stdin.read()
    end(MARK, sys.argv[1])
