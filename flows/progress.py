"""Show progress: which stage or cell runs, how far it is, and how long it may take."""

from __future__ import annotations

import json
import re
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from ffn2moe.progress import Heartbeat
from flows.study import Cell, Study
from tasks.stage import clock

UNKNOWN = 10.0  # seconds of a stage that nothing is known of
_TIME_LEFT = re.compile(r"(?:(\d+):)?(\d+):(\d\d) left$")
_STEP = re.compile(r"\d+/\d+ \(\d+ %\)")


class _Left(ProgressColumn):
    """Show the time left."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def render(self, task: Task) -> Text:
        return Text(self._board.left())


class Board:
    """Show progress over the stages: a bar on a terminal, else lines, at least one every 30 seconds.

    memory: a file of stage -> seconds. The check of other settings writes its estimates there (`tasks.check`); what a
    stage took replaces them.
    """

    def __init__(self, stages: list[str], memory: Path, console: Console) -> None:
        self._stages = stages
        self._memory = memory
        self._console = console
        self._seconds = dict.fromkeys(stages, UNKNOWN) | _remembered(memory)
        self._stage = stages[0]
        self._started = 0.0
        self._running = False
        self._estimate = (0.0, 0.0)  # when the stage last printed its time left, and the seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), _Left(self))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("starting", total=len(stages))
        self._heartbeat = None if self._bar else Heartbeat(self._still)

    def __enter__(self) -> Board:
        if self._bar:
            self._bar.start()
        if self._heartbeat:
            self._heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._heartbeat:
            self._heartbeat.__exit__()

    def begin(self, stage: str) -> None:
        """Begin to check a stage, which may be cached."""
        self._stage = stage
        self._started = time.monotonic()
        self._running = False
        self._estimate = (0.0, 0.0)
        self._describe(stage)

    def runs(self, stage: str) -> None:
        """Say that the stage is not cached: it runs, and so will those after it."""
        self._running = True
        self._print(f"{self._place(stage)} runs; {self.left()}")

    def line(self, stage: str, text: str) -> None:
        """Show a line that a stage printed."""
        if estimate := _TIME_LEFT.search(text):
            hours, minutes, seconds = (int(part or 0) for part in estimate.groups())
            self._estimate = (time.monotonic(), 3600 * hours + 60 * minutes + seconds)
        if self._bar and _STEP.search(text):  # a step counter belongs in the bar
            self._describe(stage, text.removeprefix(f"{stage}: "))
        else:
            self._print("        " + text.removeprefix(f"{stage}: "))

    def end(self, stage: str, outcome: str) -> None:
        """Say that a stage is done; remember its duration if it ran."""
        took = time.monotonic() - self._started
        self._print(f"{self._place(stage)} {outcome}" + (f" in {clock(took)}" if outcome == "Completed" else ""))
        if outcome == "Completed":
            self._seconds[stage] = took
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            remembered = _remembered(self._memory) | {stage: round(took, 1)}
            self._memory.write_text(json.dumps(remembered, indent=2) + "\n", encoding="utf-8")
        if self._bar and self._task is not None:
            self._bar.advance(self._task)

    def left(self) -> str:
        """Return the time left if this stage and all after it run, as they do after one that ran."""
        if not self._running:
            return ""
        now = time.monotonic()
        printed, seconds = self._estimate
        own = max(self._seconds[self._stage] - (now - self._started), seconds - (now - printed), 0.0)
        following = self._stages[self._stages.index(self._stage) + 1 :]
        return f"about {clock(own + sum(self._seconds[name] for name in following))} left in all"

    def _place(self, stage: str) -> str:
        return f"[{self._stages.index(stage) + 1:>2}/{len(self._stages)}] {stage:<12}"

    def _describe(self, stage: str, text: str = "") -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=f"{self._place(stage)} {text}".rstrip())

    def _print(self, text: str) -> None:
        if self._heartbeat:
            self._heartbeat.heard()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _still(self, _: float) -> None:
        """Say that the stage still runs: it has printed nothing for a while."""
        if self._running:
            took = clock(time.monotonic() - self._started)
            text = f"{self._place(self._stage)} still runs, {took}; {self.left()}"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class CellProgress:
    """Show how far a sweep is: a bar on a terminal, and a line for each event of a cell."""

    def __init__(self, study: Study, console: Console) -> None:
        self._study = study
        self._console = console
        self._last = time.monotonic()  # when a cell was made or measured last
        self._seconds = {"make": 0.0, "measure": 0.0}
        self._cells = {"make": 0, "measure": 0}
        self._bar: Progress | None = None
        if console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("cells", total=None)

    def __enter__(self) -> CellProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, cell: Cell, text: str, *, made: bool = False, ended: bool = False) -> None:
        """Print a line about a cell; `made` if it waits to be measured now, `ended` if it needs no more work."""
        if made or ended:
            step, now = "make" if made or not self._study.noted(cell, "made") else "measure", time.monotonic()
            self._seconds[step] += now - self._last
            self._cells[step] += 1
            self._last = now
        left = self._left()
        self._console.print(
            f"cell {cell.number:>3}  {cell.label}: {text}" + (f"; {left}" if left else ""),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        if self._bar:
            remaining = self._study.remaining()
            ended_all = len(self._study.finished()) + len(self._study.failed())
            self._bar.update(self._task, completed=ended_all, total=ended_all + remaining, description=left or "cells")

    def _left(self) -> str:
        """Estimate the time left by what a cell has taken this process to make, and to measure."""
        to_measure = self._study.remaining()
        to_make = to_measure - self._study.waiting()
        if not to_measure or (to_make and not self._cells["make"]):
            return ""
        making = to_make * self._seconds["make"] / max(1, self._cells["make"])
        if not self._cells["measure"]:
            return f"{to_make} to make, about {clock(making)} left, and {to_measure} to measure" if to_make else ""
        measuring = to_measure * self._seconds["measure"] / self._cells["measure"]
        return f"{to_measure} to go, about {clock(making + measuring)} left"

    def beating(self, cell: Cell | None = None) -> AbstractContextManager[object]:
        """Print a line every 30 seconds while the block runs, where there is no bar."""
        text = f"cell {cell.number:>3}  measured" if cell else "cells are made"

        def speak(seconds: float) -> None:
            left = self._left()
            self._console.print(f"{text} for {clock(seconds)}" + (f"; {left}" if left else ""), markup=False)

        return nullcontext() if self._bar else Heartbeat(speak)


def _remembered(path: Path) -> dict[str, float]:
    """Return the durations of earlier runs; none if the file is missing or damaged: they are only an estimate."""
    try:
        durations = json.loads(path.read_text(encoding="utf-8"))
        return {str(stage): float(seconds) for stage, seconds in durations.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
