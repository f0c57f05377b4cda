"""Ends what a flow has started when the flow is killed in a way it cannot see (SIGKILL, a closed terminal).

Prefect's API server, DVC and a stage's workers would all live on. Every process a flow starts inherits a mark
in its environment; a small process beside the flow waits for its end, then ends those that carry the mark.
"""

from __future__ import annotations

import os
import subprocess
import sys
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


def end(mark: str) -> None:
    """Terminates, then kills, every process that carries the mark."""
    left = [process for process in psutil.process_iter() if _carries(process, mark)]
    for process in left:
        _send(process, "terminate")
    _, alive = psutil.wait_procs(left, timeout=3)
    for process in alive:
        _send(process, "kill")


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:  # another user's, or gone
        return False


def _send(process: psutil.Process, action: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, action)()


if __name__ == "__main__":
    sys.stdin.read()
    end(sys.argv[1])
