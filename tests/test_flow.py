"""The flow really runs under Prefect: what it leaves, what it keeps when it fails, and what it says when it cannot."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL
from rich.console import Console

from flows import compress as pipeline
from flows import dvc, own_server, workspace
from flows.guardian import MARK
from flows.progress import Board
from flows.workspace import BusyError, FlowError, check, lock, plan
from tasks.store import EXPERIMENT, mlflow_client
from tests.toy import PROJECT, commit, compress, environment, git, make_toy, start

COMMITTED = ["inputs", "prepare", "distill", "evaluate", "register"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A toy repository in which one run has ended well, with its dvc.lock committed."""
    folder = make_toy(tmp_path_factory.mktemp("toy") / "repo")
    code, output = compress(folder)
    assert code == 0, output
    (folder / "first.txt").write_text(output)
    git(folder, "add", "dvc.lock")
    git(folder, "commit", "-q", "-m", "first run")
    return folder


def runs_of(folder: Path) -> list:
    client = mlflow_client(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def pipelines_of(folder: Path) -> list:
    return [run for run in runs_of(folder) if "mlflow.parentRunId" not in run.data.tags]


def test_a_first_run_completes_every_stage_and_ends_in_a_summary(toy):
    output = (toy / "first.txt").read_text()
    for index, stage in enumerate(COMMITTED, 1):
        assert f"[ {index}/5] {stage:<12} Completed" in output
    assert "left in all" in output
    for told in ("What was kept", "100.0 %", "1.50x", "exports/minilm", "models:/minilm/1", "models serve"):
        assert told in output
    assert "exports/minilm: 18 MiB, 1.8x the dense model (10 MiB)" in output
    for noise in ("Traceback", "prefect", "INFO", "WARNING"):
        assert noise not in output


def test_a_run_is_recorded_with_its_stages_parameters_data_and_files(toy):
    parent = pipelines_of(toy)[0]
    client = mlflow_client(f"sqlite:///{toy / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert page in (toy / "first.txt").read_text()
    assert parent.info.status == "FINISHED"
    assert parent.data.params["decompose.num_experts"] == "auto"
    assert parent.data.metrics["evaluate.student.retrieval.ndcg_at_10"] == 0.7
    assert parent.data.tags["git.commit"] == git(toy, "rev-parse", "HEAD~1").strip()
    assert parent.data.tags["outcome.distill"] == "Completed"
    assert [dataset.dataset.name for dataset in parent.inputs.dataset_inputs] == ["data/corpus"]
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"params.yaml", "dvc.lock", "metrics", "reports"} <= files
    nested = [run for run in runs_of(toy) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.data.tags.get("stage") for run in nested} >= {"prepare", "distill", "evaluate", "register"}
    distill = next(run for run in nested if run.data.tags.get("stage") == "distill")
    assert len(client.get_metric_history(distill.info.run_id, "loss")) == 3


def test_a_second_run_finds_every_stage_cached_and_links_the_runs_that_made_them(toy):
    lock_before = (toy / "dvc.lock").read_bytes()
    code, output = compress(toy)
    assert code == 0, output
    for index, stage in enumerate(COMMITTED, 1):
        assert f"[ {index}/5] {stage:<12} Cached" in output
    assert (toy / "dvc.lock").read_bytes() == lock_before
    first, second = pipelines_of(toy)[0], pipelines_of(toy)[-1]
    assert second.data.tags["made_by.distill"] == first.data.tags["made_by.distill"]


def test_dvc_says_in_one_process_which_stages_need_nothing(toy, monkeypatch):
    asked: list[list[str]] = []
    started = dvc._dvc
    monkeypatch.setattr(dvc, "_dvc", lambda arguments, *rest: asked.append(arguments) or started(arguments, *rest))
    assert dvc.always_changed(toy) == {"inputs"}
    assert dvc.up_to_date(toy, COMMITTED[1:], {}) == COMMITTED[1:]
    assert len(asked) == 1
    seed, params = toy / "models/distilled/seed", (toy / "params.yaml").read_bytes()
    bytes_before = seed.read_bytes()
    try:
        (toy / "params.yaml").write_bytes(params.replace(b"seed: 0 ", b"seed: 5 "))
        assert dvc.up_to_date(toy, COMMITTED[1:], {}) == ["prepare"]
        (toy / "params.yaml").write_bytes(params)
        seed.unlink()
        assert dvc.up_to_date(toy, COMMITTED[1:], {}) == ["prepare"]
        assert dvc.up_to_date(toy, COMMITTED, {}) == []  # inputs runs every time
    finally:
        (toy / "params.yaml").write_bytes(params)
        seed.write_bytes(bytes_before)
    assert dvc.up_to_date(toy, ["no such stage"], {}) == []


@pytest.mark.parametrize(("code", "said"), [(255, "{}"), (0, "what is this"), (0, "{"), (0, '{"prepare": 1}')])
def test_without_an_answer_of_dvc_every_stage_is_asked_by_itself(tmp_path, monkeypatch, code, said):
    monkeypatch.setattr(dvc, "_dvc", lambda arguments, root, environment, lines, on_line: lines.append(said) or code)
    assert dvc.up_to_date(tmp_path, ["prepare", "distill"], {}) == []


def test_a_dvc_that_is_killed_before_it_answers_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(dvc, "_dvc", lambda *arguments: -9)
    with pytest.raises(FlowError, match=r"DVC was killed \(signal 9\) in stage prepare; run again"):
        dvc.up_to_date(tmp_path, ["prepare"], {})


def test_settings_run_apart_and_leave_the_committed_workspace_clean(toy, tmp_path):
    (tmp_path / "sets").mkdir()
    before = (toy / "exports/minilm/plan.json").read_bytes()
    code, output = compress(toy, "seed=5", "name=five", "data.folder=sets", cwd=tmp_path)
    assert code == 0, output
    assert git(toy, "status", "--porcelain") == "?? first.txt\n"
    assert (toy / "exports/minilm/plan.json").read_bytes() == before
    export = toy / "exports" / "five"
    assert sorted(path.name for path in export.iterdir()) == ["manifest.json", "metrics", "plan.json", "report.html"]
    assert json.loads((export / "metrics/register.json").read_text())["model"] == "five"
    assert not (toy / ".workspaces" / "five").exists()
    run = pipelines_of(toy)[-1]
    assert run.data.tags["settings"] == "seed=5 name=five data.folder=sets"
    assert run.data.params["data.folder"] == str(tmp_path / "sets")


def test_a_second_clone_pulls_what_the_first_has_pushed_and_computes_nothing(toy, tmp_path):
    """One remote and one registry for both; the second clone has neither cache nor results of its own."""
    second, store = tmp_path / "second", str(tmp_path / "store")
    git(tmp_path, "clone", "-q", str(toy), str(second))
    code, output = share(second, "pull")
    assert code == 2
    assert "no DVC remote is set" in output and "dvc remote add" in output
    for folder in (toy, second):
        add_remote(folder, store)
    code, output = share(second, "pull")
    assert code == 2
    assert "it does not give all that dvc.lock names" in output and "make push on the machine" in output
    code, output = share(toy, "push")
    assert code == 0, output
    code, output = share(second, "pull")
    assert code == 0, output
    (second / ".env").write_text(f"FFN2MOE_TRACKING_URI=sqlite:///{toy / 'mlflow.db'}\n")
    code, output = compress(second)
    assert code == 0, output
    assert output.count("Cached") == len(COMMITTED)
    assert not (second / "mlflow.db").exists()
    assert hashes_of(second) == hashes_of(toy)


def test_a_remote_without_rights_is_told_and_nothing_is_lost(toy, tmp_path):
    folder = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(toy), str(folder))
    (folder / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {toy / '.dvc/cache'}\n")
    add_remote(folder, "/sys/ffn2moe")  # where not even root may make a folder
    code, output = share(folder, "push")
    assert code == 2
    assert len(output.splitlines()) == 1
    assert re.search(r"remote store \(/sys/ffn2moe\): this user has no rights there .*ask its owner.*nothing", output)


def add_remote(folder: Path, url: str) -> None:
    command = [sys.executable, "-m", "dvc", "remote", "add", "--quiet", "--local", "--default", "store", url]
    subprocess.run(command, cwd=folder, check=True)


def share(folder: Path, verb: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.share", verb],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def hashes_of(folder: Path) -> dict[str, bytes]:
    names = ("dvc.lock", "models/distilled/seed", "exports/minilm/plan.json", "metrics/evaluate.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_a_failing_stage_is_one_message_and_what_was_good_stays(toy):
    saved = {path: (toy / path).read_bytes() for path in ("dvc.lock", "models/distilled/seed", "params.yaml")}
    (toy / "params.yaml").write_text((toy / "params.yaml").read_text().replace("seed: 0 ", "seed: 13 "))
    try:
        code, output = compress(toy)
    finally:
        (toy / "params.yaml").write_bytes(saved.pop("params.yaml"))
    assert code == 2
    assert output.splitlines()[-1] == ("error: distill stopped: the loss is NaN at step 3; lower distill.learning_rate")
    assert "Traceback" not in output
    assert {path: (toy / path).read_bytes() for path in saved} == saved
    run = pipelines_of(toy)[-1]
    assert run.info.status == "FAILED"
    assert "the loss is NaN" in run.data.tags["error"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_nothing_running(toy, number, code):
    alive = toy / ".workspaces" / "endless" / "alive"
    alive.unlink(missing_ok=True)  # left by a run that was killed
    process = start(toy, "seed=99", "name=endless")
    try:
        deadline = time.monotonic() + 120
        while not alive.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=180)  # it takes seconds, but not on a crowded machine
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in output
    if number != signal.SIGKILL:
        assert "Stopped. Finished stages are kept" in output
        assert pipelines_of(toy)[-1].info.status == "KILLED"
    deadline = time.monotonic() + 20
    while left := [one for one in psutil.process_iter() if started_by(one, process.pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    alive.unlink()


def started_by(process: psutil.Process, flow: int) -> bool:
    try:
        return process.environ().get(MARK) == str(flow)
    except psutil.Error:
        return False


def test_a_version_that_left_the_registry_is_registered_again(toy):
    for path in toy.glob("mlflow.db*"):
        path.unlink()
    code, output = compress(toy)
    assert code == 0, output
    assert "[ 4/5] evaluate     Cached" in output
    assert "[ 5/5] register     Completed" in output
    git(toy, "checkout", "-q", "dvc.lock")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("decompose.num_expert=2", "did you mean 'decompose.num_experts'?"),
        ("decompose.num_active=9", "a token can run at most every expert"),
        ("seed", "write KEY=VALUE"),
    ],
)
def test_a_bad_setting_ends_at_once_with_its_remedy(toy, setting, message):
    code, output = compress(toy, setting)
    assert code == 2
    assert output.startswith("error: ")
    assert message in output
    assert len(output.splitlines()) == 1


def test_a_second_run_in_the_same_workspace_is_refused_and_told_of_the_first(tmp_path):
    with lock(tmp_path), pytest.raises(BusyError, match=rf"process {os.getpid()}\); wait for it"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_a_dvc_at_work_is_respected_and_the_notes_of_a_dead_one_are_cleared(tmp_path):
    notes = tmp_path / ".dvc" / "tmp" / "rwlock"
    notes.parent.mkdir(parents=True)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "dvc"]
    with subprocess.Popen(sleeper) as other:
        note = {"pid": other.pid, "cmd": "dvc repro"}
        notes.write_text(json.dumps({"write": {"models": note}, "read": {"data": [note]}}))
        try:
            with pytest.raises(BusyError, match=f"DVC is at work .* {other.pid}"), lock(tmp_path):
                pass
        finally:
            other.kill()
    with lock(tmp_path):
        assert not notes.exists()
    notes.write_text("{")
    with lock(tmp_path):
        assert not notes.exists()


def test_what_a_run_needs_is_checked_first(tmp_path, monkeypatch):
    with pytest.raises(FlowError, match=r"no \.dvc folder"):
        check(tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("")
    with pytest.raises(FlowError, match="not a git repository"):
        check(tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(FlowError, match="no commit yet"):
        check(tmp_path)
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "start")
    check(tmp_path)
    monkeypatch.setattr(workspace, "ROOM_NEEDED", shutil.disk_usage(tmp_path).total * 2)
    with pytest.raises(FlowError, match="disk is nearly full"):
        check(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlowError, match="git is not installed"):
        check(tmp_path)


def test_a_run_with_settings_but_no_name_gets_one_of_its_own():
    source = Path(__file__).parent.parent
    assert plan(source, [], source)[1] == "minilm"
    assert plan(source, ["seed=1"], source)[1] == "minilm-seed-1"
    assert plan(source, ["name=trial", "seed=1"], source)[1] == "trial"
    many = [f"{key}=1" for key in ("distill.hidden_weight", "distill.embedding_weight", "evaluate.batch_texts")]
    assert len(plan(source, many, source)[1]) < 20


def test_a_busy_workspace_is_told_apart_from_a_failed_stage(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {distill: {cmd: x}}")

    def says(text: str):
        def answer(arguments, root, environment, lines, on_line):
            lines += text.splitlines()
            return 255

        monkeypatch.setattr(dvc, "_dvc", answer)

    says("ERROR: failed to reproduce 'distill': 'models' is busy, it is being blocked by:\n  (PID 1): dvc")
    with pytest.raises(BusyError):
        dvc.reproduce("distill", tmp_path, {}, lambda line: None)
    says("Running stage 'distill':\nOSError: [Errno 28] No space left on device\nERROR: failed to reproduce")
    with pytest.raises(FlowError, match="the disk is full; make room"):
        dvc.reproduce("distill", tmp_path, {}, lambda line: None)
    says("Running stage 'distill':\nKeyError: 'x'\nERROR: failed to reproduce 'distill': exited with 1")
    with pytest.raises(FlowError, match="distill failed: KeyError: 'x'; failed to reproduce"):
        dvc.reproduce("distill", tmp_path, {}, lambda line: None)
    says("ERROR: failed to reproduce 'distill': failed to run: python -m tasks.distill, exited with -9")
    with pytest.raises(FlowError, match=r"distill was killed .*run again"):
        dvc.reproduce("distill", tmp_path, {}, lambda line: None)


def test_a_stage_that_dvc_calls_up_to_date_needs_no_process_unless_the_registry_lost_its_version(tmp_path, monkeypatch):
    ran: list[tuple[str, bool]] = []

    def reproduce(stage, root, environment, on_line, *, on_start, force):
        ran.append((stage, force))
        return "Completed"

    class Empty:
        def __init__(self, root, model):
            pass

        def holds(self, version):
            return False

    monkeypatch.setattr(pipeline.dvc, "reproduce", reproduce)
    monkeypatch.setattr(pipeline, "Registry", Empty)
    monkeypatch.setattr(pipeline, "get_run_logger", lambda: logging.getLogger())
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/register.json").write_text('{"model": "tiny", "version": 1}')
    board = Board(["distill", "register"], tmp_path / "durations.json", Console(file=StringIO()))
    place = workspace.Workspace(tmp_path, tmp_path, "tiny")
    names = [
        pipeline.bring_up_to_date.fn(stage, place, {}, board, unchanged=unchanged).name
        for stage, unchanged in (("distill", True), ("distill", False), ("register", True))
    ]
    assert names == ["Cached", "Completed", "Completed"]
    assert ran == [("distill", False), ("register", True)]


def test_a_run_has_a_server_of_its_own_that_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    before = {child.pid for child in psutil.Process().children()}
    with own_server.own_server() as wait:
        wait()
        [server] = [child for child in psutil.Process().children() if child.pid not in before]
        [listening] = [one for one in server.net_connections("tcp") if one.status == "LISTEN"]
        assert listening.laddr.ip == "127.0.0.1"
        assert PREFECT_API_URL.value() == f"http://127.0.0.1:{listening.laddr.port}/api"
    assert not server.is_running()
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with own_server.own_server() as wait:
        wait()
        assert {child.pid for child in psutil.Process().children()} == before


def test_a_server_that_does_not_start_is_an_error_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(own_server, "APP", ("no.such:app", "--log-level", "critical"))
    with pytest.raises(FlowError, match=r"it ended with code 1; .*make repro"), own_server.own_server() as wait:
        wait()


def test_the_board_tells_the_time_left_from_what_it_remembers(tmp_path):
    memory = tmp_path / "durations.json"
    memory.write_text('{"distill": 600, "evaluate": 60.0}')
    text = StringIO()
    board = Board(["distill", "evaluate"], memory, Console(file=text, width=100))
    with board:
        board.begin("distill")
        board.runs("distill")
        board.line("distill", "distill: steps 1/900 (0 %), 1:00:00 left")
        assert board.left() == "about 1:01:00 left in all"
        board.end("distill", "Completed")
        board.begin("evaluate")
        board.end("evaluate", "Cached")
    assert text.getvalue().splitlines() == [
        "[ 1/2] distill      runs; about 11:00 left in all",
        "        steps 1/900 (0 %), 1:00:00 left",
        "[ 1/2] distill      Completed in 0:00",
        "[ 2/2] evaluate     Cached",
    ]
    assert json.loads(memory.read_text()) == {"distill": 0.0, "evaluate": 60.0}
    memory.write_text("not json")
    unknown = Board(["distill"], memory, Console(file=text))
    unknown.begin("distill")
    unknown.runs("distill")
    assert unknown.left() == "about 0:10 left in all"


def test_a_lock_is_free_again_when_its_holder_is_gone(tmp_path):
    script = (
        "import sys; from pathlib import Path; from flows.workspace import lock\nwith lock(Path(sys.argv[1])): {}[0]"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent.parent, capture_output=True)
    with (tmp_path / ".cache/run.lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_dvc_lock_that_was_cut_short_is_made_again(tmp_path):
    whole = """\
schema: '2.0'
stages:
  prepare:
    cmd: python -m tasks.prepare
    deps:
    - path: tasks/prepare.py
      hash: md5
      md5: c25d93681d01b2824c1b478e6a750efc
      size: 932
    params:
      params.yaml:
        data.folder:
    outs:
    - path: data/corpus
      hash: md5
      md5: 9f7e69321592d00c5f0b62bca9429db2.dir
      size: 10343
"""
    file, said = tmp_path / "dvc.lock", []
    git(tmp_path, "init", "-q")
    pieces = ("", "stag", "prepare:", "cmd:", "deps:", "tasks/prep", "md5: c25", "size:", "params:", "outs:", "corpus")
    for last in pieces:
        file.write_text(whole[: whole.index(last) + len(last)])
        assert workspace.locked_stages(tmp_path) is None, last
        assert dvc.locked(tmp_path, "prepare") == {}
        with lock(tmp_path, say=said.append):
            assert not file.exists()
    assert len(said) == len(pieces) and all("cut short by a kill or a full disk" in line for line in said)
    file.write_text(whole)
    git(tmp_path, "add", "dvc.lock")
    git(tmp_path, "commit", "-q", "-m", "results")
    file.write_text(whole[: whole.index("9f7e")])
    with lock(tmp_path):
        assert file.read_text() == whole
    assert dvc.locked(tmp_path, "prepare")["outs"][0]["path"] == "data/corpus"


def test_a_workspace_of_its_own_holds_what_is_not_committed_but_no_data(tmp_path):
    source = make_toy(tmp_path / "repo")
    (source / "tasks" / "new.py").write_text("NEW = 1\n")
    (source / "weights.bin").write_text("large")
    (source / "tasks" / "toy_model.py").unlink()
    (source / "constraints.txt").write_text("# changed\n")
    made = workspace.isolate(source, ["seed=1"], tmp_path)
    assert made.root == source / ".workspaces" / "minilm-seed-1"
    assert (made.root / "tasks" / "new.py").is_file()
    assert not (made.root / "weights.bin").exists()
    assert not (made.root / "tasks" / "toy_model.py").exists()
    assert (made.root / "constraints.txt").read_text() == "# changed\n"
    assert "seed: 1" in (made.root / "params.yaml").read_text()

    git(source, "checkout", "-q", "--", ".")
    (source / "tasks" / "new.py").unlink()
    (made.root / ".cache" / "distill.safetensors").write_text("a resume checkpoint")
    again = workspace.isolate(source, ["seed=1"], tmp_path)
    assert again.root == made.root
    assert (made.root / "tasks" / "toy_model.py").is_file()
    assert not (made.root / "tasks" / "new.py").exists()
    assert (made.root / ".cache" / "distill.safetensors").is_file()


def test_a_run_leaves_git_status_clean_until_results_are_committed(tmp_path):
    lock_file = tmp_path / "dvc.lock"
    lock_file.write_text((PROJECT / "dvc.lock").read_text())
    (tmp_path / ".gitignore").write_text(".cache/\n")
    commit(tmp_path)
    stage = {"cmd": "python", "outs": [{"path": "data", "md5": "1", "size": 1}]}
    with lock(tmp_path):
        assert workspace.locked_stages(tmp_path) == {}
        lock_file.write_text(json.dumps({"schema": "2.0", "stages": {"prepare": stage}}))
    assert git(tmp_path, "status", "--porcelain") == ""
    assert workspace.locked_stages(tmp_path) == {"prepare": stage}
    git(tmp_path, "update-index", "--no-skip-worktree", "dvc.lock")
    git(tmp_path, "commit", "-q", "-a", "-m", "results")
    with lock(tmp_path):
        lock_file.write_text(json.dumps({"schema": "2.0", "stages": {}}))
    assert git(tmp_path, "status", "--porcelain") == " M dvc.lock\n"


def test_a_stopped_run_with_settings_resumes_after_results_were_committed(tmp_path):
    source = make_toy(tmp_path / "repo")
    shutil.copy(PROJECT / "dvc.lock", source)
    git(source, "add", "dvc.lock")
    git(source, "commit", "-q", "-m", "no results")
    made = workspace.isolate(source, ["seed=1"], tmp_path)
    with lock(made.root):
        (made.root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n# what the stopped run wrote\n")
    (source / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n# results\n")
    git(source, "commit", "-q", "-a", "-m", "results")
    workspace.isolate(source, ["seed=1"], tmp_path)
    assert (made.root / "dvc.lock").read_text() == (source / "dvc.lock").read_text()
