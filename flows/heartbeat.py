"""Say after each silence that a long step still runs, where no progress bar can show it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ffn2moe.progress import SILENCE


class Heartbeat:
    """Call `speak` with the seconds since the start whenever nothing was said for `seconds`."""

    def __init__(self, speak: Callable[[float], None], seconds: float = SILENCE) -> None:
        self._speak = speak
        self._seconds = seconds
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._heard = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def heard(self) -> None:
        """Start to count again: a line was printed."""
        self._heard.set()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heard.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            if self._heard.wait(self._seconds):
                self._heard.clear()
            else:
                self._speak(time.monotonic() - self._started)


@contextmanager
def beating(speak: Callable[[float], None], *, wanted: bool = True, seconds: float = SILENCE) -> Iterator[None]:
    """Keep a heartbeat while the block runs; without one if it is not `wanted`."""
    if not wanted:
        yield
        return
    with Heartbeat(speak, seconds):
        yield
