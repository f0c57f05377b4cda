"""What a person sees while the stages run: which one, how far, how long it may still take."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from tasks.stage import clock

# Seconds a stage takes on two cores, for the first run; afterwards this machine's own durations are used.
FIRST_GUESS = {
    "inputs": 2,
    "prepare": 35,
    "decompose": 45,
    "train_router": 75,
    "distill": 560,
    "evaluate": 55,
    "export": 60,
    "benchmark": 60,
    "report": 5,
    "register": 8,
}
_TIME_LEFT = re.compile(r"(?:(\d+):)?(\d+):(\d\d) left$")
_STEP = re.compile(r"\d+/\d+ \(\d+ %\)")


class _Left(ProgressColumn):
    """The time left, as of now."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def render(self, task: Task) -> Text:
        return Text(self._board.left())


class Board:
    """Progress over the stages: a bar on a terminal, plain lines otherwise."""

    def __init__(self, stages: list[str], memory: Path, console: Console) -> None:
        self._stages = stages
        self._memory = memory
        self._console = console
        self._seconds = {stage: float(FIRST_GUESS.get(stage, 10)) for stage in stages} | _remembered(memory)
        self._stage = stages[0]
        self._started = 0.0
        self._running = False
        self._told = (0.0, 0.0)  # when the stage last said how long it still takes, and how long
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), _Left(self))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("starting", total=len(stages))

    def __enter__(self) -> Board:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, stage: str) -> None:
        """A stage is looked at; it may turn out to be cached."""
        self._stage = stage
        self._started = time.monotonic()
        self._running = False
        self._told = (0.0, 0.0)
        self._describe(stage)

    def runs(self, stage: str) -> None:
        """The stage is not cached; it runs, and so will those after it."""
        self._running = True
        self._print(f"{self._place(stage)} runs; {self.left()}")

    def line(self, stage: str, text: str) -> None:
        """A line of a stage that runs."""
        if told := _TIME_LEFT.search(text):
            hours, minutes, seconds = (int(part or 0) for part in told.groups())
            self._told = (time.monotonic(), 3600 * hours + 60 * minutes + seconds)
        if self._bar and _STEP.search(text):  # a step counter stays in its place
            self._describe(stage, text.removeprefix(f"{stage}: "))
        else:
            self._print("        " + text.removeprefix(f"{stage}: "))

    def end(self, stage: str, outcome: str) -> None:
        """A stage is done; how long it took is remembered if it did run."""
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
        """How long this stage and those after it still take if they all run, as they do after one that ran."""
        if not self._running:
            return ""
        now = time.monotonic()
        told_at, told = self._told
        own = max(self._seconds[self._stage] - (now - self._started), told - (now - told_at), 0.0)
        following = self._stages[self._stages.index(self._stage) + 1 :]
        return f"about {clock(own + sum(self._seconds[name] for name in following))} left in all"

    def _place(self, stage: str) -> str:
        return f"[{self._stages.index(stage) + 1:>2}/{len(self._stages)}] {stage:<12}"

    def _describe(self, stage: str, text: str = "") -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=f"{self._place(stage)} {text}".rstrip())

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _remembered(path: Path) -> dict[str, float]:
    """Durations of earlier runs; none if the file is missing or damaged, as they only serve an estimate."""
    try:
        durations = json.loads(path.read_text(encoding="utf-8"))
        return {str(stage): float(seconds) for stage, seconds in durations.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
