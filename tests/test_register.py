"""A version is registered with what it is made of, earns its aliases, and answers over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest

from ffn2moe import onnx_graph, onnx_plans
from ffn2moe.runtime import open_export
from tasks import register
from tasks.params import load_params
from tasks.registry import Registry
from tasks.stage import PARENT_RUN, TRACKING_URI, StageRun, default_tracking_uri, mlflow_client
from tests.mixtures import carve
from tests.texts import PARAMS

PROJECT = Path(__file__).parent.parent
QUALITY = {
    "retention": {"retrieval": {"ndcg_at_10": 0.99}},
    "student": {"retrieval": {"ndcg_at_10": 0.70}},
}


def plan_of(speedups: dict[tuple[int, int], float]) -> dict:
    rows = [{"batch": b, "sequence": s, "threads": 1, "speedup_vs_best_dense": x} for (b, s), x in speedups.items()]
    return {"default_plan": "sorted", "timings": {"sorted": rows, "dense": []}}


def test_the_gate_looks_at_the_largest_shape():
    verdict = register.judge(load_params(PARAMS), QUALITY, plan_of({(1, 16): 0.5, (32, 128): 1.2}))
    assert verdict == {"retention": 0.99, "speedup_vs_best_dense": 1.2, "refused": []}


def test_the_gate_says_what_is_missing():
    worse = {"retention": {"retrieval": {"ndcg_at_10": 0.9}}}
    verdict = register.judge(load_params(PARAMS), worse, plan_of({(32, 128): 1.0}))
    assert len(verdict["refused"]) == 2
    assert "retention 0.9000 is below gate.min_retention = 0.97" in verdict["refused"][0]
    assert "sorted runs at 1.00x the best dense plan" in verdict["refused"][1]


def make_workspace(root: Path, teacher: Path) -> Path:
    """A workspace after `benchmark`: the export of a tiny mixture, its plan and its quality."""
    model, spec = carve(teacher)
    export = root / "exports" / "minilm"
    export.mkdir(parents=True)
    graph = onnx_plans.lower(onnx_graph.canonical_graph(model, spec.pooling), "sorted")
    sha256 = onnx_graph.save_graph(graph, export / "sorted.onnx")["sorted.onnx"]
    (export / "tokenizer").mkdir()
    for path in teacher.glob("tokenizer*"):
        shutil.copy(path, export / "tokenizer")
    plans = {name: {"file": f"{name}.onnx", "sha256": sha256} for name in ("sorted", "dense")}
    write_json(export / "manifest.json", {"spec": spec.to_dict(), "plans": plans})
    write_json(export / "plan.json", plan_of({(32, 128): 1.2}))
    write_json(root / "metrics" / "evaluate.json", QUALITY)
    for name in ("ffn2moe", "tasks"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def write_json(path: Path, payload: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_teacher) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"), tiny_teacher)


@pytest.fixture(autouse=True)
def no_parent_run(monkeypatch):
    for name in (PARENT_RUN, TRACKING_URI):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def first(workspace) -> dict:
    """metrics/register.json after a first registration."""
    register.run(StageRun("register", load_params(PARAMS), workspace))
    return json.loads((workspace / "metrics/register.json").read_text())


def test_a_version_that_passes_the_gate_becomes_champion(workspace, first):
    assert first["aliases"] == ["challenger", "champion"]
    registry = Registry(workspace, "minilm")
    assert registry.version_of("challenger") == registry.version_of("champion") == first["version"]


def test_a_version_says_what_it_is_made_of(workspace, first):
    client = mlflow_client(Registry(workspace, "minilm").uri)
    tags = client.get_model_version("minilm", str(first["version"])).tags
    assert tags["default_plan"] == "sorted"
    assert tags["retention.retrieval.ndcg_at_10"] == "0.990000"
    assert tags["speedup_vs_best_dense"] == "1.2000"
    assert "git.commit" in tags


def test_tags_hold_the_hashes_dvc_has_of_the_export(workspace, monkeypatch):
    lock = {"stages": {"export": {"outs": [{"path": "exports/minilm/sorted.onnx", "md5": "abc"}]}}}
    (workspace / "dvc.lock").write_text(json.dumps(lock))
    monkeypatch.setenv("FFN2MOE_GIT_COMMIT", "c0ffee")
    monkeypatch.setenv("FFN2MOE_GIT_DIRTY", "true")
    params, plan = load_params(PARAMS), plan_of({(32, 128): 1.2})
    tags = register.tags(workspace, params, QUALITY, register.judge(params, QUALITY, plan), plan)
    assert tags["dvc.md5.sorted.onnx"] == "abc"
    assert (tags["git.commit"], tags["git.dirty"]) == ("c0ffee", "true")
    (workspace / "dvc.lock").unlink()


def test_a_version_that_does_not_pass_is_challenger_only_and_the_champion_stays(workspace, first):
    params = load_params(PARAMS, ["gate.min_speedup=2"])
    before = (workspace / "metrics/register.json").read_bytes()
    register.run(StageRun("register", params, workspace))
    registry = Registry(workspace, "minilm")
    assert registry.version_of("champion") == first["version"]
    assert registry.version_of("challenger") > first["version"]
    told = json.loads((workspace / "metrics/register.json").read_text())
    assert told["aliases"] == ["challenger"]
    assert "not above gate.min_speedup" in told["refused"][0]
    (workspace / "metrics/register.json").write_bytes(before)


@pytest.mark.parametrize("step", ["check_answers", "write_json"])
def test_when_a_step_fails_the_aliases_go_back_and_the_version_goes(workspace, first, monkeypatch, step):
    def fails(*arguments: object) -> None:
        raise ValueError("it does not answer")

    registry = Registry(workspace, "minilm")
    before = {alias: registry.version_of(alias) for alias in ("challenger", "champion")}
    newest = max(before.values())
    monkeypatch.setattr(*((register, step) if step == "check_answers" else (StageRun, step)), fails)
    with pytest.raises(ValueError, match="does not answer"):
        register.run(StageRun("register", load_params(PARAMS), workspace))
    assert {alias: registry.version_of(alias) for alias in before} == before
    assert not any(registry.holds(version) for version in range(newest + 1, newest + 9))


def test_a_model_that_answers_something_else_is_not_registered(workspace, first, monkeypatch):
    registry = Registry(workspace, "minilm")
    monkeypatch.setattr(Registry, "predict", lambda self, version, texts: [[1.0] * 32] * len(texts))
    with pytest.raises(ValueError, match="does not answer as"):
        register.check_answers(registry, first["version"], workspace / "exports/minilm")


def test_a_served_champion_answers_texts_over_http_and_refuses_what_is_none(workspace, first, tmp_path):
    with served(workspace, "models:/minilm@champion", tmp_path) as url:
        texts = ["a red house.", "sort the rows of a table"]
        status, answer = post(url, {"inputs": texts})
        assert status == 200
        expected = open_export(workspace / "exports/minilm").encode(texts)
        numpy.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)
        for bad in ({"inputs": []}, {"inputs": ["a", " "]}, {"inputs": [1, 2]}, {"inputs": {"text": 1}}, {}):
            status, answer = post(url, bad)
            assert status == 400, bad
            assert answer["message"], bad


@contextmanager
def served(workspace: Path, model: str, cwd: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port, in a folder that is not the project."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = cwd / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "models",
                "serve",
                *f"--model-uri {model} --env-manager local --port {port}".split(),
            ],
            cwd=cwd,
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": default_tracking_uri(workspace),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"{url}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def post(url: str, payload: dict) -> tuple[int, dict]:
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        body = error.read().decode()
        return error.code, json.loads(body) if body.startswith("{") else {"message": body}
