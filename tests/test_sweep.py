"""A sweep runs each of its cells once, whatever happens, and ends in the plans that no other beats."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import axes as studies
from flows import cell as cell_process
from flows import dvc
from flows.axes import Range
from flows.study import Study
from flows.workspace import FlowError
from tasks import pareto
from tasks.params import ParamsError, override, read, write
from tests.sweeps import SWEEP, start
from tests.toy import PROJECT, make_toy

# A cell that takes no time: it notes that it ran, and writes what a benchmark would have found. The second fails.
CELL = """\
import json, os, sys, time
from pathlib import Path

step, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
settings = dict(setting.split("=") for setting in job["settings"])
with open(Path(job["source"]) / "ran.txt", "a") as stream:
    stream.write(f"{step} {settings['name'][-3:]}\\n")
if step == "make" and settings["name"].endswith("006") and not Path("gate").exists():
    Path("hangs").write_text(str(os.getpid()))
    time.sleep(120)
if step == "make" and settings["name"].endswith("001"):
    print("error: distill stopped: the loss is NaN")
    sys.exit(2)
if step == "measure":
    experts, active = int(settings["decompose.num_experts"]), int(settings["decompose.num_active"])
    export = Path("exports") / settings["name"]
    export.mkdir(parents=True, exist_ok=True)
    row = {"batch": 32, "sequence": 128, "threads": 1, "median_ms": 1.0}
    speeds = {"dense": 1.0, "sorted": experts / active / 4}
    timings = {plan: [row | {"speedup_vs_dense": speed, "speedup_vs_best_dense": speed}]
               for plan, speed in speeds.items()}
    plans = {"dense": {"retention": 1.0}, "sorted": {"retention": 0.9 + 0.02 * active}}
    (export / "plan.json").write_text(json.dumps({"timings": timings}))
    (export / "manifest.json").write_text(json.dumps({"plans": plans, "spec": {"head": "embedding"}}))
    print("memory: the largest process held 30 MiB")
"""
COMPARE = """\
import json, sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
with open("ran.txt", "a") as stream:
    stream.write("compare\\n")
rows = []
for label, (folder, plan) in job["exports"].items():
    (row,) = json.loads((Path(folder) / "plan.json").read_text())["timings"][plan]
    rows.append(row | {"plan": label})
Path(sys.argv[2]).write_text(json.dumps(rows))
"""
GRID = ("decompose.num_experts=2,4,8", "decompose.num_active=1,2,4")  # 2 of which 4 are active: illegal


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A repository in which a sweep of eight legal cells was killed, and then went on to its end."""
    folder = make_toy(tmp_path_factory.mktemp("sweep") / "repo")
    for name, text in (("cell.py", CELL), ("compare.py", COMPARE), ("sweep.py", SWEEP)):
        (folder / name).write_text(text)
    command = ("run", *GRID, "--name", "eight", "--at-a-time", "2")
    process = start(folder, *command)
    deadline = time.monotonic() + 120
    try:
        while not (folder / "hangs").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
    finally:
        process.kill()
    process.communicate()
    (folder / "gate").touch()
    (folder / "killed.txt").write_text((folder / "ran.txt").read_text())
    process = start(folder, *command)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (folder / "output.txt").write_text(output)
    return folder


def test_an_interrupted_sweep_goes_on_and_no_cell_runs_twice(toy):
    before, ran = (toy / "killed.txt").read_text().splitlines(), (toy / "ran.txt").read_text().splitlines()
    assert "make 006" in before and "measure 000" not in before
    # What was under way when it was killed is continued; everything else runs once.
    legal = ("000", "001", "003", "004", "005", "006", "007", "008")
    under_way = {line for line in before if ran.count(line) == 2}
    assert "make 006" in under_way and under_way <= {"make 006", "make 005", "make 007"}
    assert sorted(set(ran)) == sorted(
        [
            *(f"make {number}" for number in legal),
            *(f"measure {number}" for number in legal if number != "001"),
            "compare",
        ]
    )
    assert all(ran.count(line) == 1 for line in ran if line not in under_way)


def test_what_ran_is_counted_for_every_cell(toy):
    with (toy / "sweeps/eight/cells.csv").open() as stream:
        rows = {int(row["cell"]): row for row in csv.DictReader(stream)}
    ran = (toy / "ran.txt").read_text().splitlines()
    assert {number: int(row["made"]) for number, row in rows.items()} == {n: ran.count(f"make {n:03}") for n in rows}
    assert {number: int(row["measured"]) for number, row in rows.items()} == {
        n: ran.count(f"measure {n:03}") for n in rows
    }
    assert {number for number, row in rows.items() if row["state"] == "finished"} == {0, 3, 4, 5, 6, 7, 8}
    assert (rows[1]["state"], rows[2]["state"]) == ("failed", "left out")
    assert all(row["began"] <= row["ended"] for row in rows.values() if row["state"] == "finished")


def test_a_failed_and_an_illegal_cell_are_told_with_their_reasons_and_the_others_go_on(toy):
    results = json.loads((toy / "sweeps/eight/results.json").read_text())
    failed, left_out = results["without_figures"]
    assert failed.startswith("cell 1 ") and failed.endswith("failed: distill stopped: the loss is NaN")
    assert left_out.startswith("cell 2 ") and "left out: decompose.num_active = 4 is more than" in left_out
    assert {row["cell"] for row in results["points"]} == {0, 3, 4, 5, 6, 7, 8}
    assert {row["cell"] for row in results["points"] if row["on_front"]} == {6, 7, 8}
    assert (toy / "sweeps/eight/front.png").stat().st_size > 10_000
    output = (toy / "output.txt").read_text()
    assert all(line in output for line in (failed, left_out))
    assert " to go, about " in output


def test_the_run_record_tells_the_numbers_of_the_table(toy):
    from tasks.store import experiment_id, mlflow_client

    client = mlflow_client(f"sqlite:///{toy / 'mlflow.db'}")
    runs = client.search_runs([experiment_id(client)], max_results=100)
    (sweep,) = [run for run in runs if run.info.run_name == "eight"]
    assert sweep.info.status == "FINISHED"
    assert sweep.data.metrics["cells.finished"] == 7 and sweep.data.metrics["cells.failed"] == 1
    cells = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id}
    assert len(cells) == 8 and cells["eight-001"].data.tags["error"] == "distill stopped: the loss is NaN"
    for row in json.loads((toy / "sweeps/eight/results.json").read_text())["points"]:
        run = cells[f"eight-{row['cell']:03}"]
        assert run.data.metrics["sweep.sorted.kept"] == row["kept"]
        assert run.data.metrics["sweep.sorted.vs_best_dense"] == row["vs_best_dense"]
        assert run.data.tags["on_front"] == str(row["on_front"]).lower()


def test_the_cheapest_cell_that_keeps_enough_is_one_command_away(toy, monkeypatch, capsys):
    from flows import sweep

    monkeypatch.setattr(sweep, "ROOT", toy)
    monkeypatch.setattr(sweep.console, "file", sys.stdout)
    assert sweep.main(["best", "--keeps", "0.94"]) == 0
    told = capsys.readouterr().out
    assert "decompose.num_experts=8 decompose.num_active=2" in told
    assert "exports/eight-007, plan sorted" in told
    assert sweep.main(["best", "eight", "--keeps", "0.99"]) == 2
    assert "no plan of eight keeps 99 %; the most is 98.0 %" in capsys.readouterr().err
    assert sweep.main(["best", "nine"]) == 2
    assert "there is no sweep nine; known sweeps: eight" in capsys.readouterr().err


# Of quality and speed. No subnormal numbers: an engine that ran in this process may have made them zeros.
POINTS = st.tuples(st.floats(0, 2, allow_subnormal=False), st.floats(0, 9, allow_subnormal=False))


@given(st.lists(POINTS, max_size=30))
def test_the_front_holds_what_no_point_beats_and_nothing_else(points):
    front = pareto.front(points)
    for place, (quality, speed) in enumerate(points):
        beaten = any(q >= quality and s >= speed and (q, s) != (quality, speed) for q, s in points)
        assert (place in front) != beaten
    assert [points[place] for place in front] == sorted((points[place] for place in front), key=lambda p: (-p[0], p[1]))


@given(st.lists(POINTS, max_size=30), st.floats(0, 2, allow_subnormal=False))
def test_the_cheapest_point_is_on_the_front_and_keeps_enough(points, keeps):
    place = pareto.cheapest(points, keeps)
    able = [point for point in points if point[0] >= keeps]
    assert (place is None) == (not able)
    if place is not None:
        assert points[place][0] >= keeps and points[place][1] == max(speed for _, speed in able)
        assert place in pareto.front(points)


def test_values_are_read_as_they_are_written():
    axes = studies.parse(["distill.elastic=[],[1,4]", "decompose.partition=weights,random", "seed=3", "x.y=1e-4..1e-2"])
    assert axes["distill.elastic"] == ("[]", "[1,4]")
    assert axes["seed"] == ("3",)
    assert axes["x.y"] == Range(1e-4, 1e-2, whole=False) and axes["x.y"].logarithmic
    assert not studies.parse(["a=2..9"])["a"].logarithmic and studies.parse(["a=2..9"])["a"].whole


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["decompose.num_expert=2,4"], "did you mean 'decompose.num_experts'"),
        (["decompose.num_experts=4"], "the grid is empty: give at least one key several values"),
        (["decompose.num_active=9,10"], "none of the 2 cells is legal; the first one: decompose.num_active = 9"),
        (["decompose.num_experts=4,4"], "4 is there twice"),
        (["decompose.num_experts=4,"], "has an empty value"),
        (["decompose.num_experts"], "write KEY=VALUE,VALUE"),
        (["seed=1,2", "seed=3"], "seed is given twice"),
        (["name=a,b"], "the sweep sets name itself"),
        (["distill.learning_rate=1e-4..1e-3"], "a grid needs a list of values for distill.learning_rate"),
        (["distill.learning_rate=1e-3..1e-4"], "the range is empty"),
    ],
)
def test_a_grid_that_can_come_to_nothing_is_refused_with_the_reason(tmp_path, keys, message):
    source = project(tmp_path)
    with pytest.raises((FlowError, ParamsError), match=re.escape(message)):
        Study(source, "one", studies.parse(keys), None, source)
    assert not (source / "sweeps/one/study.db").exists()


def test_a_name_that_another_grid_has_is_refused(tmp_path):
    source = project(tmp_path)
    Study(source, "one", studies.parse(["seed=1,2"]), None, source)
    with pytest.raises(FlowError, match=r"the sweep one is there already with other values .*--name"):
        Study(source, "one", studies.parse(["seed=1,2,3"]), None, source)
    with pytest.raises(FlowError, match="with a grid, and this is a search"):
        Study(source, "one", studies.parse(["seed=1,2"]), 4, source)
    write(override(read(source / "params.yaml"), ["distill.steps=3"]), source / "params.yaml")
    with pytest.raises(FlowError, match=r"another params.yaml \(changed since: distill.steps\)"):
        Study(source, "one", studies.parse(["seed=1,2"]), None, source)
    (source / "sweeps/one/study.db").write_text("no database, but long enough to be looked at as one" * 9)
    with pytest.raises(FlowError, match="is not a study"):
        Study(source, "one", studies.parse(["seed=1,2"]), None, source)


def test_a_search_tries_no_cell_twice_and_leaves_illegal_ones_out(tmp_path):
    source = project(tmp_path)
    keys = studies.parse(["decompose.num_experts=2,4", "decompose.num_active=1,2,4"])
    tried = []
    while cell := (study := Study(source, "one", keys, 20, source)).take():  # opened anew, as after each interruption
        tried.append(cell.settings[1:])
        study.finish(cell, 0.99, 1.0 + len(tried) / 10)
    assert len(tried) == len(set(tried)) == 5  # six combinations, of which one is illegal
    assert all("is more than" in reason for _, reason in study.left_out())


def test_a_cell_that_was_being_handed_out_when_the_sweep_was_killed_is_not_lost(tmp_path):
    source, keys = project(tmp_path), studies.parse(["seed=1,2", "decompose.num_experts=4,8"])
    study = Study(source, "one", keys, None, source)
    first = study.take()
    study._study.ask()  # the kill comes before its values are looked at
    again = Study(source, "one", keys, None, source)
    second = again.unfinished()[1]
    assert again.unfinished() == [first, second]
    settings = [cell.settings[1:] for cell in (first, second, again.take(), again.take())]
    assert len(set(settings)) == 4 and again.take() is None


def test_a_search_stops_after_as_many_cells_as_were_asked_for(tmp_path):
    source = project(tmp_path)
    study = Study(source, "one", studies.parse(["distill.learning_rate=1e-4..1e-2"]), 3, source)
    cells = [study.take() for _ in range(3)]
    assert study.take() is None and study.remaining() == 3
    for cell in cells:
        rate = float(cell.settings[1].partition("=")[2])
        assert 1e-4 <= rate <= 1e-2
        study.fail(cell, "a reason")
    assert study.take() is None and study.remaining() == 0
    assert [reason for _, reason in study.failed()] == ["a reason"] * 3


def test_stages_that_two_cells_agree_on_are_done_once_for_both(tmp_path):
    project(tmp_path)
    stages = cell_process.before_measuring(list(dvc.stages(tmp_path)))
    assert stages[-1] == "export"

    def in_common(*settings: str) -> list[str]:
        found = []
        for name, setting in zip("ab", settings, strict=True):
            write(override(read(PROJECT / "params.yaml"), [f"name={name}", setting]), tmp_path / "params.yaml")
            found.append(cell_process.fingerprints(tmp_path, stages))
        return [stage for stage, one, other in zip(stages, *found, strict=True) if one == other]

    assert in_common("distill.steps=20", "distill.steps=60") == stages[:4]
    assert in_common("decompose.num_experts=8", "decompose.num_experts=16") == ["inputs", "prepare"]
    assert in_common("seed=1", "seed=2") == ["inputs"]


def test_one_cell_at_a_time_where_memory_is_short_and_none_where_the_disk_is(tmp_path, monkeypatch):
    from flows import sweep_cells

    study = Study(project(tmp_path), "one", studies.parse(["seed=1,2,3"]), None, tmp_path)
    cell = study.take()
    study.note(cell, mebibytes=3000, room=5 * 2**30)
    study.finish(cell, 0.99, 1.0)
    for free, at_a_time in ((2 * 2**30, 1), (4 * 2**30, 2)):
        monkeypatch.setattr(sweep_cells.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert sweep_cells._fit(study, 1) == at_a_time
    monkeypatch.setattr(sweep_cells, "check", lambda root: None)
    monkeypatch.setattr(sweep_cells.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * 2**30))
    with pytest.raises(FlowError, match="no room for another cell: it takes about 10240 MiB, 8192 MiB are free"):
        sweep_cells._require_room(study)


def project(folder: Path) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(PROJECT / name, folder)
    return folder
