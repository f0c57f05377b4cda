"""Runs happen by the schedule: real services on loopback, a toy pipeline, and nothing left when they are stopped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from flows import guardian, prefect_server, processes
from flows.compress import _verdict
from flows.environment import check_database, prefect_home
from flows.workspace import FlowError, kept, lock
from tasks import record, store
from tasks.stage import explain
from tasks.store import mlflow_client
from tests.toy import PROJECT, commit, environment, make_toy

FAST = {
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
}
PATIENCE = 240.0  # seconds; on an idle machine it takes a few


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((processes.HOST, 0))
        return probe.getsockname()[1]


class Sink(BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    heard: ClassVar[list[dict]] = []

    def do_POST(self):
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def sink():
    server = HTTPServer((processes.HOST, 0), Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{processes.HOST}:{server.server_port}/failed"
    server.shutdown()


def command(toy: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.service", *arguments],
        cwd=toy,
        env={**environment(), **FAST},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory, sink):
    """A toy repository whose services run."""
    folder = make_toy(tmp_path_factory.mktemp("schedule") / "repo")
    shutil.copy(PROJECT / "prefect.yaml", folder)
    commit(folder)
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    try:
        code, output = command(folder, "up", *ports, "--notify", sink)
        assert code == 0, output
        (folder / "up.txt").write_text(output)
        yield folder
    finally:
        command(folder, "down")


@pytest.fixture
def client(toy, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: processes.api(toy)}), get_client(sync_client=True) as client:
        yield client


def wait_for(answer, seconds: float = PATIENCE):
    deadline = time.monotonic() + seconds
    while not (found := answer()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)
    return found


def test_up_tells_where_everything_is_and_once_more_changes_nothing(toy):
    before = processes.running(toy)
    assert sorted(before) == ["mlflow", "prefect", "worker"]
    output = (toy / "up.txt").read_text()
    for told in (before["prefect"].address, before["mlflow"].address, "compress/scheduled, 7 * * * *", "make down"):
        assert told in output
    code, again = command(toy, "up")
    assert code == 0, again
    assert "everything runs already" in again
    assert processes.running(toy) == before
    code, moved = command(toy, "up", "--mlflow-port", str(free_port()))
    assert code == 2
    assert "make down, then" in moved


def test_parameters_out_of_range_are_refused_at_submission(client):
    from prefect.exceptions import PrefectHTTPStatusError

    deployment = client.read_deployment_by_name(prefect_server.DEPLOYMENT)
    for parameters, reason in (
        ({"settings": {"decompose": {"num_experts": 0}}}, "0 is less than the minimum of 1"),
        ({"settings": {"decompose": {"partition": "alphabet"}}}, "settings.decompose.partition"),
        ({"settings": {"decompose": {"experts": 4}}}, "settings.decompose"),
        ({"stage_hours": -1}, "stage_hours"),
        ({"stage_minutes": 5}, "'stage_minutes' was unexpected"),
    ):
        with pytest.raises(PrefectHTTPStatusError, match="409") as refused:
            client.create_flow_run_from_deployment(deployment.id, parameters=deployment.parameters | parameters)
        assert reason in refused.value.response.text


def test_a_second_workspace_does_not_take_over_the_schedule_of_a_server(toy, client, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", processes.api(toy))
    prefect_server.refuse_shared(toy)
    with pytest.raises(FlowError, match=rf"another workspace already \({toy}\); one server, one schedule"):
        prefect_server.refuse_shared(tmp_path)
    monkeypatch.setattr(prefect_server.socket, "gethostname", lambda: "another")
    with pytest.raises(FlowError, match=r"another workspace already \(ffn2moe on "):
        prefect_server.refuse_shared(toy)


def test_a_run_fires_by_the_schedule_and_one_behind_it_queues_and_finds_nothing_changed(toy, client):
    from prefect.client.schemas.schedules import IntervalSchedule

    deployment = client.read_deployment_by_name(prefect_server.DEPLOYMENT)
    soon = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC) + timedelta(seconds=3))
    client.create_deployment_schedules(deployment.id, [(soon, True)])

    def fired():
        return [run for run in client.read_flow_runs() if run.auto_scheduled and run.state_name != "Scheduled"]

    (first,) = wait_for(fired)
    second = client.create_flow_run_from_deployment(deployment.id)
    wait_for(lambda: client.read_flow_run(second.id).state.is_final())
    first, second = client.read_flow_run(first.id), client.read_flow_run(second.id)
    assert first.state.message.startswith("a first run; 5 of 5 stages ran")
    assert second.state_name == "Cached"
    assert second.state.message.startswith("nothing changed: all 5 stages are Cached; minilm version 1 does not become")
    assert "AwaitingConcurrencySlot" in {state.name for state in client.read_flow_run_states(second.id)}
    assert second.start_time >= first.end_time  # one at a time
    assert "nothing changed" in command(toy, "status")[1]


def test_a_failed_run_is_told_to_the_webhook_and_changes_nothing(toy, client):
    saved = {path: path.read_bytes() for path in (toy / "exports/minilm").iterdir()}
    params = (toy / "params.yaml").read_text()
    (toy / "params.yaml").write_text(params.replace("seed: 0 ", "seed: 13 "))
    deployment = client.read_deployment_by_name(prefect_server.DEPLOYMENT)
    run = client.create_flow_run_from_deployment(deployment.id)
    wait_for(lambda: client.read_flow_run(run.id).state.is_final())
    (toy / "params.yaml").write_text(params)
    assert "the loss is NaN at step 3; lower distill.learning_rate" in client.read_flow_run(run.id).state.message
    told = wait_for(lambda: Sink.heard)
    assert "Failed" in told[0]["text"] and "the loss is NaN" in told[0]["text"]
    assert {path: path.read_bytes() for path in (toy / "exports/minilm").iterdir()} == saved


def test_after_a_power_cut_up_starts_all_again_and_closes_the_run_that_was_cut_off(toy, client):
    """Everything is killed at once, in the middle of a run; the note of who ran stays, and names the dead."""
    params = (toy / "params.yaml").read_text()
    (toy / "params.yaml").write_text(params.replace("seed: 0 ", "seed: 99 "))
    deployment = client.read_deployment_by_name(prefect_server.DEPLOYMENT)
    run = client.create_flow_run_from_deployment(deployment.id)
    wait_for((toy / "alive").exists)
    (toy / "params.yaml").write_text(params)
    before = processes.running(toy)
    everything = [one for name in processes.ORDER for one in guardian.carriers(processes.MARK, f"{name} of {toy}")]
    guardians = [
        one
        for one in psutil.process_iter()
        if processes.command_of(one).endswith("flows.guardian " + guarded(everything))
    ]
    for process in [*guardians, *everything]:
        process.kill()
    psutil.wait_procs(everything, timeout=10)
    assert processes.running(toy) == {}
    assert sorted(processes.noted(toy)) == ["mlflow", "prefect", "worker"]

    ports = (f"--{name}-port={before[name].port}" for name in ("prefect", "mlflow"))
    code, output = command(toy, "up", *ports)
    assert code == 0, output
    assert output.count("had ended without `make down`: starting it again") == 3
    assert f"the run {run.name} was cut off and is closed" in output
    assert client.read_flow_run(run.id).state_name == "Crashed"


def guarded(processes: list[psutil.Process]) -> str:
    """The mark of the flow that is among them."""
    marks = {one.environ().get(guardian.MARK) for one in processes} - {None}
    assert len(marks) == 1
    return marks.pop()


def test_down_leaves_no_process_no_note_and_no_port(toy):
    before = processes.running(toy)
    code, output = command(toy, "down")
    assert code == 0, output
    assert output == "stopped: prefect, mlflow, worker\n"
    marks = {f"{name} of {toy}" for name in processes.ORDER}
    left = [process for process in psutil.process_iter() if mark_of(process) in marks]
    assert left == []
    assert not (processes.folder(toy) / "state.json").exists()
    for name in ("prefect", "mlflow"):
        processes.refuse_taken(name, before[name].port)
    assert command(toy, "down") == (0, "nothing runs\n")
    code, output = command(toy, "status")
    assert code == 1
    assert "to start prefect and mlflow and worker: make up" in output


def mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(processes.MARK)
    except psutil.Error:
        return None


def test_a_taken_port_is_refused_with_who_has_it_and_the_remedy():
    with socket.socket() as taken:
        taken.bind((processes.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FlowError, match=rf"process {os.getpid()} has it.*make up MLFLOW_PORT={port + 1}"):
            processes.refuse_taken("mlflow", port)


def test_a_database_of_another_version_is_told_with_the_way_out(tmp_path):
    check_database(tmp_path)
    path = prefect_home(tmp_path) / "prefect.db"
    path.parent.mkdir()
    path.write_bytes(b"")
    check_database(tmp_path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR)")
        database.execute("INSERT INTO alembic_version VALUES ('from the future')")
        database.commit()
    with pytest.raises(FlowError, match=r"put it aside \(mv .*another version of Prefect made it"):
        check_database(tmp_path)
    path.write_bytes(b"no database" * 100)
    with pytest.raises(FlowError, match="it is damaged"):
        check_database(tmp_path)

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('from the future')")
        database.commit()
    with pytest.raises(Exception) as raised:
        mlflow_client(uri)
    assert "another version of MLflow made the database" in explain(raised.value)


def test_a_locked_database_is_waited_for_and_then_told(monkeypatch):
    tries: list[int] = []

    def locked():
        tries.append(1)
        raise OSError("(sqlite3.OperationalError) database is locked")

    monkeypatch.setattr(store, "SECONDS_FOR_A_LOCK", 1.5)
    with pytest.raises(OSError) as raised:
        store.patiently(locked)
    assert len(tries) >= 2
    assert "fuser -v mlflow.db" in explain(raised.value)


def test_the_next_run_closes_the_record_of_one_that_was_killed(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    script = (
        "import os, signal, sys; from pathlib import Path; from tasks.record import PipelineRecord, RunRecord\n"
        "record = PipelineRecord.start(Path(sys.argv[1]), 'killed', {})\n"
        "tags = {'mlflow.parentRunId': record.run_id}\n"
        "record._client.create_run('1', run_name='distill', tags=tags)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    kept_environment = {key: value for key, value in os.environ.items() if not key.startswith("FFN2MOE_")}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=PROJECT, env=kept_environment)
    client = mlflow_client(uri)
    assert [run.info.status for run in client.search_runs(["1"])] == ["RUNNING", "RUNNING"]
    mine = record.PipelineRecord.start(tmp_path, "next", {})
    states = {run.info.run_name: run.info.status for run in client.search_runs(["1"])}
    assert states == {"killed": "KILLED", "distill": "KILLED", "next": "RUNNING"}
    mine.finish("FINISHED")


def test_a_stale_or_damaged_note_names_nobody(tmp_path):
    notes = processes.folder(tmp_path)
    notes.mkdir(parents=True)
    (notes / "state.json").write_text(json.dumps([{"name": "worker", "pid": os.getpid(), "started": 1.0}]))
    assert processes.running(tmp_path) == {}  # the number is another process's now
    (notes / "state.json").write_text("[{")
    assert processes.running(tmp_path) == {}


def test_what_changed_is_told_in_a_line():
    ran = {"inputs": "Completed", "prepare": "Completed", "distill": "Cached"}
    old, new = {"teacher": 1, "corpus": 1}, {"teacher": 2, "corpus": 1}
    assert _verdict(ran, old, new) == "changed: teacher; 2 of 3 stages ran (inputs, prepare)"
    assert _verdict(ran, {}, new).startswith("a first run; ")
    assert _verdict(ran, new, new).startswith("parameters, code or results changed; ")


def test_a_run_waits_for_the_workspace_as_long_as_it_is_told_to(tmp_path):
    told: list[str] = []
    holder = lock(tmp_path)
    holder.__enter__()
    threading.Timer(1.5, holder.__exit__, (None, None, None)).start()
    with lock(tmp_path, 30, told.append):
        pass
    assert len(told) == 1
    assert told[0].endswith("waiting for up to 0:30")


def test_an_export_is_put_back_when_a_run_fails_and_after_one_that_was_killed(tmp_path):
    export = tmp_path / "exports" / "tiny"
    export.mkdir(parents=True)
    (export / "plan.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), kept(tmp_path, "tiny"):
        (export / "plan.json").unlink()  # as DVC does before a stage
        (export / "new").write_text("half")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in export.iterdir()} == {"plan.json": "old"}

    killed = kept(tmp_path, "tiny")
    killed.__enter__()
    (export / "plan.json").unlink()
    with kept(tmp_path, "tiny"):
        assert (export / "plan.json").read_text() == "old"
        (export / "plan.json").unlink()
        (export / "plan.json").write_text("new")
    assert (export / "plan.json").read_text() == "new"
    with kept(tmp_path, "tiny"):
        assert (export / "plan.json").read_text() == "new"


def test_only_processes_of_a_dead_flow_are_orphans():
    flow = subprocess.Popen([sys.executable, "-c", "pass"])
    flow.wait()
    for mark, orphan in ((flow.pid, True), (os.getpid(), False)):
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, guardian.MARK: str(mark)}
        )
        try:
            wait_for(partial(mark_is_set, child.pid))
            assert guardian.orphaned(child.pid) == orphan
        finally:
            child.kill()
            child.wait()


def mark_is_set(pid: int) -> bool:
    return guardian.MARK in psutil.Process(pid).environ()
