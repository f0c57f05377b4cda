"""Where no bar can show progress, a line appears at least every so many seconds, and none after the end."""

from __future__ import annotations

import time
from io import StringIO

from rich.console import Console

from benchmarks.page import Grid, command_of, dumps, parser_of, shape_of, working
from ffn2moe.progress import Heartbeat
from flows.progress import Board


def wait_for(lines: list[float], count: int) -> None:
    deadline = time.monotonic() + 5
    while len(lines) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_silent_step_speaks_and_a_step_that_printed_does_not():
    spoken: list[float] = []
    with Heartbeat(spoken.append, seconds=0.05):
        wait_for(spoken, 2)
    count = len(spoken)
    assert count >= 2 and spoken == sorted(spoken)
    time.sleep(0.12)
    assert len(spoken) == count
    with Heartbeat(spoken.append, seconds=0.5) as heartbeat:
        for _ in range(6):
            time.sleep(0.02)
            heartbeat.heard()
    assert len(spoken) == count


def test_a_stage_that_prints_nothing_is_said_to_run_still(tmp_path):
    console = Console(file=StringIO(), width=100)
    with Board(["prepare", "distill"], tmp_path / "durations.json", console) as board:
        board.begin("distill")
        board._still(0)
        assert "still runs" not in console.file.getvalue()  # it may be cached
        board.runs("distill")
        board.line("distill", "distill: reads [/x] and [bold]")
        board._still(0)
    text = console.file.getvalue()
    assert "reads [/x] and [bold]" in text
    assert "[ 2/2] distill      still runs, 0:00; about" in text


def test_no_text_of_a_benchmark_is_read_as_markup(monkeypatch):
    console = Console(file=StringIO(), width=100, markup=False)
    with working(console, "opening /tmp/[x]/[/x]"):
        console.print(Grid("a [title]", ["[column]"], [["[/cell]"]]).table())
    text = console.file.getvalue()
    assert all(part in text for part in ("opening /tmp/[x]/[/x]", "a [title]", "[column]", "[/cell]"))


def test_raw_figures_have_one_row_a_line_and_stay_json():
    import json

    result = {"command": "x", "rows": [{"a": 1, "b": [1, 2]}, {"a": 2, "b": []}], "empty": [], "shape": {"width": 3}}
    text = dumps(result)
    assert json.loads(text) == result and text.count("\n") == 9


def test_the_command_of_a_page_sets_the_same_options():
    parser = parser_of("benchmarks.some", "Time something.")
    parser.add_argument("export")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(1, 16)])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--plans", nargs="+")
    words = ["my export", "--shapes", "2x8", "1x4", "--seconds", "0.5", "--plain"]
    options = parser.parse_args(words)
    command = "python -m benchmarks.some 'my export' --shapes 2x8 1x4 --seconds 0.5 --plain"
    assert command_of(parser, options) == command
    parser.add_argument("--untrained", nargs="+", default=[])
    assert command_of(parser, parser.parse_args(words)) == command  # an empty list is no option
