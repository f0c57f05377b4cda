"""The stores of more than one machine, on PostgreSQL: the registry behind an MLflow server, Prefect's database."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flows.environment import DATABASE, check_database
from flows.promote import consider
from flows.serve import free_port
from flows.workspace import FlowError
from tasks import register
from tasks.params import load_params
from tasks.record import PARENT_RUN
from tasks.registry import Registry
from tasks.stage import StageRun
from tasks.store import ARTIFACTS, TRACKING_URI, StoreError, default_tracking_uri, mlflow_client
from tests.postgres import PASSWORD, QUOTED, Postgres, postgres
from tests.test_register import make_workspace
from tests.texts import PARAMS
from tests.toy import compress, environment, make_toy


@pytest.fixture(scope="module")
def database():
    with postgres() as running:
        yield running


@pytest.fixture(autouse=True)
def no_store(monkeypatch):
    for name in (PARENT_RUN, TRACKING_URI, ARTIFACTS, DATABASE, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def servers(tmp_path_factory, database: Postgres):
    """An MLflow server with its files in a folder and a Prefect server, both on PostgreSQL: name -> address."""
    files = tmp_path_factory.mktemp("files")
    ports = {"mlflow": free_port(), "prefect": free_port()}
    address = {name: ("--host", "127.0.0.1", "--port", str(port)) for name, port in ports.items()}
    store = ("--backend-store-uri", database.address("mlflow"), "--artifacts-destination", str(files))
    commands = {
        "mlflow": ("mlflow", "server", *address["mlflow"], *store, "--workers", "1"),
        "prefect": ("prefect", "server", "start", *address["prefect"]),
    }
    settings = {
        DATABASE: database.address("prefect", "postgresql+asyncpg"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
    }
    logs = tmp_path_factory.mktemp("logs")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**environment(), **settings},
            stdout=(logs / name).open("wb"),
            stderr=subprocess.STDOUT,
        )
        for name, command in commands.items()
    ]
    try:
        for (name, port), path in zip(ports.items(), ("health", "api/health"), strict=True):
            wait_for(f"http://127.0.0.1:{port}/{path}", logs / name)
        yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def test_a_version_is_registered_promoted_and_served_by_a_server_on_postgresql(
    tmp_path, tiny_teacher, servers, database, monkeypatch
):
    """Its files go to the server's folder and come back from there: nothing but HTTP lies between the machines."""
    monkeypatch.setenv(TRACKING_URI, servers["mlflow"])
    monkeypatch.setenv("PREFECT_API_URL", f"{servers['prefect']}/api")
    workspace = make_workspace(tmp_path / "here", tiny_teacher)
    params = load_params(PARAMS)
    register.run(StageRun("register", params, workspace))
    registry = Registry(tmp_path / "another machine", "minilm")
    assert not (workspace / "mlflow.db").exists()
    assert registry._client.get_experiment_by_name("ffn2moe").artifact_location.startswith("mlflow-artifacts:")
    decision = consider(registry, params.gate, publish=lambda decision: None, say=lambda line: None)
    assert decision.state == "promoted", decision.refused
    assert registry.version_of("champion") == 1
    export = registry.export(1)
    assert (export / "sorted.onnx").read_bytes() == (workspace / "exports/minilm/sorted.onnx").read_bytes()
    assert database.sql("SELECT name, version FROM model_versions WHERE name = 'minilm'", "mlflow") == "minilm|1"


def test_a_run_reports_to_both_servers_and_leaves_no_database_here(tmp_path, servers, database):
    toy = make_toy(tmp_path / "toy")
    (toy / ".env").write_text(f"{TRACKING_URI}={servers['mlflow']}\nPREFECT_API_URL={servers['prefect']}/api\n")
    code, output = compress(toy, "name=far")
    assert code == 0, output
    assert f"run record  {servers['mlflow']}/#/experiments/" in output
    assert database.sql("SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'", "prefect") == "2"  # and promote
    assert database.sql("SELECT status FROM runs WHERE name = 'far'", "mlflow") == "FINISHED"
    assert database.sql("SELECT name, version FROM model_versions WHERE name = 'far'", "mlflow") == "far|1"
    assert not [*toy.glob("mlflow.db*"), *toy.rglob("prefect.db")]


def test_a_prefect_server_on_postgresql_is_accepted_the_next_time(servers, database, monkeypatch):
    address = f"postgresql+asyncpg://ffn2moe:{QUOTED}@127.0.0.1:{database.port}/prefect"
    assert database.sql("SELECT count(*) FROM deployment", "prefect") == "0"
    monkeypatch.setenv(DATABASE, address)
    check_database(Path("unused"))
    database.sql("CREATE DATABASE prefect_later TEMPLATE template0", "postgres")
    database.sql("CREATE TABLE alembic_version (version_num VARCHAR)", "prefect_later")
    database.sql("INSERT INTO alembic_version VALUES ('later')", "prefect_later")
    monkeypatch.setenv(DATABASE, f"{address}_later")
    with pytest.raises(FlowError, match=r"made by another version of Prefect \(revision later\); install that one, or"):
        check_database(Path("unused"))


@pytest.mark.parametrize("address", ["postgresql://host/prefect", "mysql://u:secret@host/prefect"])
def test_an_address_that_prefect_cannot_use_is_told(address, monkeypatch):
    monkeypatch.setenv(DATABASE, address)
    with pytest.raises(FlowError, match=r"write postgresql\+asyncpg://USER:PASSWORD@HOST/DATABASE") as refused:
        check_database(Path("unused"))
    assert "secret" not in str(refused.value)


def test_a_database_without_a_place_for_files_and_one_of_another_version_are_refused(tmp_path, database, monkeypatch):
    uri = database.address("record")
    with pytest.raises(StoreError, match=f"set {ARTIFACTS} to their place"):
        mlflow_client(uri)
    monkeypatch.setenv(ARTIFACTS, "files")
    with pytest.raises(StoreError, match="is relative; write an absolute folder"):
        mlflow_client(uri)
    monkeypatch.setenv(ARTIFACTS, str(tmp_path / "files"))
    location = mlflow_client(uri).get_experiment_by_name("ffn2moe").artifact_location
    assert location == (tmp_path / "files").as_uri()
    elsewhere = uri.replace("127.0.0.1", "localhost")  # MLflow keeps a store that it has opened
    database.sql("UPDATE alembic_version SET version_num = '451aebb31d03'", "record")
    with pytest.raises(StoreError, match=r"another version of MLflow .*mlflow db upgrade .*: install it") as refused:
        mlflow_client(elsewhere)
    assert QUOTED not in str(refused.value)


def test_a_database_that_cannot_be_reached_is_told_at_once_and_without_the_password(database, monkeypatch):
    there = database.address("there")
    for uri, cause in (
        (there.replace(QUOTED, "wrong"), "password authentication failed"),
        (f"{there}-not", 'database "there-not" does not exist'),
        (f"postgresql://ffn2moe:{QUOTED}@127.0.0.1:{free_port()}/there", "Connection refused"),
    ):
        with pytest.raises(StoreError, match=f"cannot be reached .*{cause}.*{TRACKING_URI}") as refused:
            mlflow_client(uri)
        monkeypatch.setenv(DATABASE, uri.replace("postgresql:", "postgresql+asyncpg:"))
        with pytest.raises(FlowError, match=f"cannot be reached .*{cause}.*{DATABASE}") as told:
            check_database(Path("unused"))
        for word in ("wrong@", QUOTED, PASSWORD):
            assert word not in f"{refused.value} {told.value}"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///mlflow.db", "is relative, so every workspace would make its own"),
        ("mlruns", "is not the address of a store; write http"),
        ("file:///srv/mlruns", "is not the address of a store"),
        ("postgres://ffn2moe:secret@host/db", r"postgres://ffn2moe:\*\*\*@host/db is not the address"),
    ],
)
def test_an_address_that_is_none_is_refused_with_those_there_are(tmp_path, monkeypatch, uri, message):
    monkeypatch.setenv(TRACKING_URI, uri)
    with pytest.raises(StoreError, match=message):
        default_tracking_uri(tmp_path)


def test_addresses_come_from_the_environment_then_from_a_file_then_from_mlflows_own_variable(tmp_path):
    script = (
        "import os, pathlib; from flows.environment import settle; "
        f"settle(pathlib.Path({str(tmp_path)!r})); print(os.environ.get({TRACKING_URI!r}))"
    )

    def settled(**given: str) -> str:
        surroundings = {**environment(), **given}
        done = subprocess.run([sys.executable, "-c", script], env=surroundings, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    assert settled() == "None"
    assert settled(MLFLOW_TRACKING_URI="http://theirs") == "http://theirs"
    (tmp_path / ".env").write_text(f"{TRACKING_URI}='postgresql://u:a#b@host/db'  # of all machines\n")
    assert settled(MLFLOW_TRACKING_URI="http://theirs") == "postgresql://u:a#b@host/db"
    assert settled(**{TRACKING_URI: "http://mine"}) == "http://mine"
