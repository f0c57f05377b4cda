"""What runs long says so: a line at least every 30 seconds where the output is no terminal."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from rich.console import Console

import flows.progress
from ffn2moe import progress
from ffn2moe.progress import Screen, clock


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(progress, "SILENCE", 0.1)
    return io.StringIO()


def screen(lines: io.StringIO) -> Screen:
    return Screen(Console(file=lines, markup=False, emoji=False, highlight=False, width=200))


def test_a_long_item_is_reported_while_it_runs(lines: io.StringIO) -> None:
    with screen(lines) as shown:
        for item in shown.track(range(4), 4, "routing [x] layers"):
            time.sleep(0.35 if item == 2 else 0)
    found = lines.getvalue().splitlines()
    assert len(found) >= 2
    assert found[0].startswith("routing [x] layers 2 of 4: 0:00 so far, about 0:00 left")


def test_work_outside_of_a_step_is_reported_too_and_nothing_after_the_end(lines: io.StringIO) -> None:
    with screen(lines):
        time.sleep(0.25)
    count = len(lines.getvalue().splitlines())
    assert count >= 1 and "still working after" in lines.getvalue()
    time.sleep(0.25)
    assert len(lines.getvalue().splitlines()) == count


def test_what_prints_often_gets_no_further_lines(lines: io.StringIO) -> None:
    with screen(lines) as shown:
        for index in range(10):
            time.sleep(0.02)
            shown.say(f"line {index}")
    assert len(lines.getvalue().splitlines()) == 10


def test_steps_may_contain_steps(lines: io.StringIO) -> None:
    with screen(lines) as shown, shown.step("outer") as outer:
        with shown.step("inner", 3) as inner:
            inner.advance()
            assert inner.state().startswith("inner 1 of 3: ")
        outer.describe("the rest")
        assert outer.state() == "the rest: 0:00 so far"


def test_durations_are_minutes_and_hours() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]


def test_a_sweep_estimates_by_what_cells_take_to_be_made_and_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Four:
        """A study of four cells."""

        made: ClassVar[set[int]] = set()
        measured: ClassVar[set[int]] = set()

        def remaining(self) -> int:
            return 4 - len(self.measured)

        def waiting(self) -> int:
            return len(self.made - self.measured)

        def noted(self, cell: Any, key: str) -> bool:
            return cell.number in self.made

    now, lines, study = [0.0], io.StringIO(), Four()
    monkeypatch.setattr(flows.progress.time, "monotonic", lambda: now[0])
    shown = flows.progress.CellProgress(study, Console(file=lines, width=200))  # type: ignore[arg-type]
    cells = [SimpleNamespace(number=number, label=f"l{number}") for number in range(4)]
    for cell in cells:
        now[0] += 60
        study.made.add(cell.number)
        shown.say(cell, "made", made=True)  # type: ignore[arg-type]
    for cell in cells:
        now[0] += 10
        study.measured.add(cell.number)
        shown.say(cell, "measured", ended=True)  # type: ignore[arg-type]
    told = [line.partition(": ")[2] for line in lines.getvalue().splitlines()]
    assert told[0] == "made; 3 to make, about 3:00 left, and 4 to measure"
    assert told[2:5] == [
        "made; 1 to make, about 1:00 left, and 4 to measure",
        "made",
        "measured; 3 to go, about 0:30 left",
    ]
    assert told[-1] == "measured"
