"""Report progress: a bar on a terminal, and elsewhere a line at least every 30 seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SILENCE = 30.0  # seconds without a line, after which one says that the work continues

Say = Callable[[str], None]  # prints a line
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]  # wraps items: (items, how many, what is done to them)


def silent(line: str) -> None:
    """Print nothing."""


def untracked(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """Return the items as they are."""
    return items


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Heartbeat:
    """Call `speak` with the seconds since the start whenever nothing was heard for `seconds` (None: `SILENCE`)."""

    def __init__(self, speak: Callable[[float], None], seconds: float | None = None) -> None:
        self._speak = speak
        self._seconds = SILENCE if seconds is None else seconds
        self._start = self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def heard(self) -> None:
        """Start to count again: a line was printed."""
        self._last = time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds:
                self.heard()
                self._speak(time.monotonic() - self._start)


class Screen:
    """Print lines and tables of one command, and show how far its long steps are.

    Text is printed as it is: brackets and colons in paths and prompts have no meaning. Used as a context, it prints a
    line after each `SILENCE` seconds without one where the output is not a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False, markup=False, emoji=False)
        self._step: Step | None = None
        self._heartbeat: Heartbeat | None = None  # while it is used as a context and there is no terminal

    def __enter__(self) -> Screen:
        if not self.console.is_terminal:
            self._heartbeat = Heartbeat(self._still).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._heartbeat:
            self._heartbeat.__exit__()

    def print(self, *items: Any) -> None:
        """Print lines, tables and styled texts; lines are never broken."""
        from rich.text import Text

        if self._heartbeat:
            self._heartbeat.heard()
        self.console.print(*items, soft_wrap=isinstance(items[0], (str, Text)))

    def say(self, line: str) -> None:
        """Print a line."""
        self.print(line)

    def track(self, items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        """Yield the items, of which there are `total`, and show how many are done; `what` names the step."""
        with self.step(what, total) as step:
            for item in items:
                yield item
                step.advance()

    @contextmanager
    def step(self, what: str, total: int = 0, *, estimate: bool = True) -> Iterator[Step]:
        """Show a step of `total` parts while the block runs; 0: their number is unknown.

        `estimate` tells how long the rest may take, from the parts that are done.
        """
        outer = self._step
        with self._bar() as bar:
            self._step = Step(what, total, bar, estimate)
            try:
                yield self._step
            finally:
                self._step = outer

    @contextmanager
    def _bar(self) -> Iterator[Progress]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        shown = self.console.is_terminal and self._step is None  # rich draws one bar at a time
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as bar:
            yield bar

    def _still(self, seconds: float) -> None:
        step = self._step
        self.say(step.state() if step else f"still working after {clock(seconds)}")


class Step:
    """One step of a command: its name, how many of its parts are done, and since when it runs."""

    def __init__(self, what: str, total: int, bar: Progress, estimate: bool) -> None:
        self.what, self.total, self.done = what, total, 0
        self._start, self._bar, self._estimate = time.monotonic(), bar, estimate
        self._task = bar.add_task(what, total=total or None, left="")

    def describe(self, what: str) -> None:
        """Name the part that runs now."""
        self.what = what
        self._bar.update(self._task, description=what)

    def advance(self) -> None:
        """Count a part as done."""
        self.done += 1
        self._bar.update(self._task, advance=1, left=self._left())

    def state(self) -> str:
        """Return a line: the step, how far it is, how long it took and may still take."""
        count = f" {self.done} of {self.total}" if self.total else ""
        left = f", {self._left()}" if self._left() else ""
        return f"{self.what}{count}: {clock(time.monotonic() - self._start)} so far{left}"

    def _left(self) -> str:
        if not self._estimate or not self.done or self.done >= self.total:
            return ""
        return f"about {clock((time.monotonic() - self._start) / self.done * (self.total - self.done))} left"
