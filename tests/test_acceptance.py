"""The acceptance tests take minutes; their judgements are checked here on made-up results."""

from __future__ import annotations

import random
import re

from tests.acceptance import chaos, clients, interrupt, schedule, sources, sweep
from tests.toy import PROJECT


def cell(number: int, **values: str) -> dict[str, str]:
    return {"cell": str(number), "state": "finished", "stages": "prepare export", "made": "1", **values}


def test_a_killed_sweep_passes_only_if_no_finished_cell_or_stage_runs_twice():
    before = [cell(0), cell(1, stages="prepare", state="under way")]
    assert sweep.judge(before, [cell(0), cell(1, made="2")]) == []
    assert sweep.judge(before, [cell(0, made="2"), cell(1)]) == ["cell 0 was made twice"]
    assert sweep.judge(before, [cell(0), cell(1, stages="prepare prepare")]) == ["cell 1: prepare ran twice"]
    assert sweep.judge(before, [cell(0), cell(1, state="failed")]) == ["cell 1: failed"]


def test_chaos_strikes_every_stage_and_names_every_traceback():
    course = interrupt.Course(whole=10.0, stages={"prepare": 1.0, "distill": 5.0}, trained=4.0)
    moments = chaos.moments(20, random.Random(0), course)
    assert len(moments) == 20 and {moment.stage for moment in moments} == {"", "prepare", "distill"}
    assert sum(moment.trained for moment in moments) == chaos.TRAINED
    output = "fine\nTraceback (most recent call last)\n  File x\nValueError: no\n"
    assert interrupt.tracebacks(output) == ["a traceback: ValueError: no"] and not interrupt.tracebacks("fine")


def test_the_documented_commands_exist():
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python -m tests\.acceptance\.(\w+)", text))
    assert named == {"chaos", "clients", "schedule", "sources", "sweep"}
    assert all(callable(module.main) for module in (chaos, clients, schedule, sources, sweep))
