"""Run the processes that work on the cells of a sweep, and stop all of them at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.workspace import FlowError


class Crew:
    """Start processes from threads, and stop all of them from the main thread."""

    def __init__(self, root: Path) -> None:
        self.lock: int | None = None  # of the sweep: it is free when all of these processes have ended
        self._root = root
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Run a command of this Python to its end; FlowError with its last line if it fails."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            with self._lock:
                if self._stopped:
                    raise FlowError("stopped")
                begin = stream.tell()
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=self._root,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # only this class stops it, with its group
                    pass_fds=() if self.lock is None else (self.lock,),
                )
                self._processes.add(process)
            try:
                code = process.wait()
            finally:
                self._processes.discard(process)
        if code:
            with log.open("rb") as stream:
                stream.seek(begin)
                last = stream.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            message = last[0].removeprefix("error: ") if last else ""
            killed = f"killed by signal {-code}; if nobody sent it, memory ran out" if code < 0 else ""
            raise FlowError(killed or message or f"ended with code {code} and printed nothing")

    def stop(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self._stopped = True
            running = list(self._processes)
        for process in running:
            process.terminate()  # a cell needs a few seconds to stop its own children
        deadline = time.monotonic() + 15
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
