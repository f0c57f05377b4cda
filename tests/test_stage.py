"""What every stage relies on: whole files or none, one clear error, the right exit code, a record that is optional."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from tasks import record as runs
from tasks import stage as stages
from tasks.measures import numbers
from tasks.params import load_params
from tasks.stage import StageRun, clock, explain, prepare_process, replace_folder
from tests.texts import PARAMS, make_stage

PROJECT = Path(__file__).parent.parent


def run_script(folder: Path, body: str) -> subprocess.Popen[str]:
    """A stage whose function has this body, as a process of its own."""
    (folder / "params.yaml").write_text(PARAMS.read_text())
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    script = f"import os, time\nfrom tasks.stage import main\n\ndef run(stage):\n{lines}\n\n"
    (folder / "script.py").write_text(script + "main('distill', run, torch=False)\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FFN2MOE_")}
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("stage.say('well done')", 0, ""),
        ("raise ValueError('K is 9; lower it')", 2, "distill: error: K is 9; lower it\n"),
        ("open('models/none')", 2, "distill: error: models/none does not exist; if an earlier stage writes it"),
        ("raise OSError(28, 'No space left on device')", 2, "distill: error: the disk is full"),
        ("raise MemoryError", 2, "distill: error: out of memory; lower distill.batch_tokens"),
        ("{}['x']", 1, "KeyError: 'x'"),
    ],
)
def test_a_stage_ends_with_the_right_code_and_one_clear_message(tmp_path, body, code, message):
    process = run_script(tmp_path, body)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert message in errors
    assert ("Traceback" in errors) == (code == 1)


def test_a_bad_parameter_file_is_one_clear_message(tmp_path):
    process = run_script(tmp_path, "pass")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("distill: error: ")
    assert "Traceback" not in errors


def test_a_terminated_stage_removes_what_it_had_half_written(tmp_path):
    process = run_script(tmp_path, "with stage.out('models/x'):\n    stage.say('in it')\n    time.sleep(60)")
    assert process.stdout.readline() == "distill: in it\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_ends_when_its_parent_is_killed(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    (tmp_path / "script.py").write_text(
        "import time\nfrom tasks.stage import main\n"
        "def run(stage):\n    while True:\n        open('alive', 'w').close()\n        time.sleep(0.05)\n"
        "main('distill', run, torch=False)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, 'script.py'])"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    alive = tmp_path / "alive"
    wait_for(alive.exists)
    parent.kill()
    parent.wait()

    def is_still() -> bool:
        alive.unlink(missing_ok=True)
        time.sleep(0.3)
        return not alive.exists()

    wait_for(is_still)


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_an_out_is_there_whole_or_as_it_was(tmp_path):
    stage = make_stage("distill", tmp_path)
    with stage.out("models/a") as folder:
        (folder / "weights").write_text("first")
    with pytest.raises(RuntimeError), stage.out("models/a") as folder:
        (folder / "weights").write_text("second")
        raise RuntimeError
    assert (tmp_path / "models/a/weights").read_text() == "first"
    with stage.out("models/a") as folder:
        (folder / "other").write_text("third")
    assert [path.name for path in (tmp_path / "models/a").iterdir()] == ["other"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["a"]


def test_what_a_killed_run_left_is_not_taken_over(tmp_path):
    (tmp_path / "models/.a.partial").mkdir(parents=True)
    (tmp_path / "models/.a.partial/stale").write_text("")
    (tmp_path / "models/.a.old").mkdir()
    with make_stage("distill", tmp_path).out("models/a") as folder:
        (folder / "weights").write_text("")
    assert [path.name for path in (tmp_path / "models/a").iterdir()] == ["weights"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["a"]


def test_replacing_a_folder_works_where_there_was_none(tmp_path):
    (tmp_path / "new").mkdir()
    replace_folder(tmp_path / "new", tmp_path / "deep/er/final")
    assert (tmp_path / "deep/er/final").is_dir()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), numpy.float32("nan"), torch.tensor(-float("inf"))])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path, value):
    stage = make_stage("evaluate", tmp_path)
    with pytest.raises(ValueError, match=r"metrics/a\.json: student\.losses\.1 is (nan|-?inf)"):
        stage.write_json("metrics/a.json", {"student": {"losses": [1.0, value]}})
    with pytest.raises(ValueError, match="row 0, loss"):
        stage.write_csv("metrics/a.csv", [{"loss": value}])
    assert not (tmp_path / "metrics").exists() or not list((tmp_path / "metrics").iterdir())


def test_json_is_the_same_bytes_whatever_the_order_and_the_number_type(tmp_path):
    stage = make_stage("evaluate", tmp_path)
    stage.write_json("a.json", {"b": numpy.float64(0.5), "a": torch.tensor(2), "c": [True, None, "é"]})
    stage.write_json("b.json", {"c": [True, None, "é"], "a": 2, "b": 0.5})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2, "b": 0.5, "c": [True, None, "é"]}


def test_a_table_needs_rows_with_the_same_columns(tmp_path):
    stage = make_stage("distill", tmp_path)
    stage.write_csv("loss.csv", [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 1.25}])
    assert (tmp_path / "loss.csv").read_text() == "step,loss\n0,1.5\n1,1.25\n"
    with pytest.raises(ValueError, match="no row"):
        stage.write_csv("loss.csv", [])
    with pytest.raises(ValueError, match="row 1 has the columns"):
        stage.write_csv("loss.csv", [{"step": 0}, {"loss": 1}])


def test_progress_gives_every_item_and_tells_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "SECONDS_BETWEEN_LINES", 0.0)
    stage = make_stage("distill", tmp_path)
    assert list(stage.track(iter("ab"), 4, "steps", completed=2)) == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("distill: steps 3/4 (75 %), 0:00 left")
    assert lines[1].startswith("distill: steps 4/4 (100 %)")


def test_a_long_item_is_not_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ffn2moe.progress.SILENCE", 0.1)
    stage = make_stage("distill", tmp_path)

    def slow():
        time.sleep(0.5)
        yield "a"

    with stage.alive():
        assert list(stage.track(slow(), 4, "steps", completed=2)) == ["a"]
    assert "distill: steps 2 of 4: 0:00 so far" in capsys.readouterr().out


def test_the_seed_makes_every_generator_repeat(tmp_path):
    params = load_params(PARAMS, ["seed=3"])

    def draw() -> tuple[float, float, float]:
        prepare_process(params)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert draw() == draw()
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_bug_is_not_explained_away():
    assert explain(KeyError("x")) is None
    assert explain(ValueError()) is None
    assert "disk is full" in explain(RuntimeError("write failed: No space left on device"))
    assert explain(PermissionError(errno.EACCES, "Permission denied", "models")) == "models: Permission denied"


def test_durations_read_like_a_clock():
    assert [clock(seconds) for seconds in (0, 7.4, 185, 3600)] == ["0:00", "0:07", "3:05", "1:00:00"]


def test_numbers_are_found_under_dotted_keys():
    tree = {"a": {"b": 1, "c": [2.5, {"d": True}]}, "e": "text"}
    assert dict(numbers(tree)) == {"a.b": 1, "a.c.0": 2.5}


def test_without_a_parent_run_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.delenv(runs.PARENT_RUN, raising=False)
    params = load_params(PARAMS)
    assert runs.RunRecord.attach("distill", params) is None
    StageRun("distill", params, tmp_path).log_metrics({"loss": 1.0}, 0)


def test_a_stage_is_recorded_under_its_parent_and_a_broken_record_does_not_stop_it(tmp_path, monkeypatch):
    params = load_params(PARAMS)
    parent = runs.PipelineRecord.start(tmp_path, "minilm", {"git.commit": "abc"})
    for key, value in parent.environment().items():
        monkeypatch.setenv(key, value)
    record = runs.RunRecord.attach("distill", params)
    stage = StageRun("distill", params, tmp_path, record)
    for step in range(3):
        stage.log_metrics({"loss": 1.0 / (step + 1)}, step)
    stage.write_json("metrics/distill.json", {"final": {"loss": 0.3}})
    record.finish("FINISHED", tmp_path / "metrics/distill.json")

    client = runs.mlflow_client(parent.environment()[runs.TRACKING_URI])
    run = client.get_run(record.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "auto"
    assert [metric.value for metric in client.get_metric_history(record.run_id, "loss")] == [1.0, 0.5, 1 / 3]
    assert run.data.metrics["final.loss"] == 0.3

    def fails(*arguments: object, **keywords: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(record._client, "log_batch", fails)
    stage.log_metrics({"loss": 0.1}, 4)
    record.finish("FINISHED")

    parent.link("distill", "f1", ran=True)
    later = runs.PipelineRecord.start(tmp_path, "minilm", {})
    later.link("distill", "f1", ran=False)
    made_by = client.get_run(later.run_id).data.tags["made_by.distill"]
    assert made_by == record.run_id
