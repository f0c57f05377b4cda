"""A version is registered with what it is made of, earns its aliases, and answers over HTTP."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ffn2moe.onnx import graph as onnx_graph
from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.runtime.export import open_export
from tasks import register
from tasks.params import load_params
from tasks.record import PARENT_RUN
from tasks.registry import Registry
from tasks.stage import StageRun
from tasks.store import TRACKING_URI, mlflow_client
from tests.conftest import make_tiny_bert
from tests.mixtures import carve
from tests.texts import PARAMS

MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
PROJECT = Path(__file__).parent.parent
QUALITY = {
    "retention": {"retrieval": {"ndcg_at_10": 0.99}},
    "student": {"retrieval": {"ndcg_at_10": 0.70}},
}
FACTS = {"retention": 0.99, "speedup_vs_best_dense": 1.2, "bytes": 4}


def plan_of(*speedups: float) -> dict:
    """What the benchmark wrote, with the speed-up of the workload on so many numbers of threads."""
    found = [
        {"threads": threads, "plans": ["sorted"], "speedup_vs_best_dense": speedup}
        for threads, speedup in enumerate(speedups, 1)
    ]
    return {"default_plan": "sorted", "plans": ["sorted"], "by_threads": found, "timings": {"sorted": [], "dense": []}}


def test_a_version_is_judged_where_the_workload_gains_least(tmp_path):
    (tmp_path / "graph").write_bytes(b"1234")
    facts = register.measured(QUALITY, plan_of(1.3, 1.2, 1.4), tmp_path)
    assert facts == {"retention": 0.99, "speedup_vs_best_dense": 1.2, "bytes": 4}


def make_workspace(root: Path, teacher: Path) -> Path:
    """A workspace after `benchmark`: the export of a tiny mixture, its plan and its quality."""
    model, spec = carve(teacher)
    export = root / "exports" / "minilm"
    export.mkdir(parents=True)
    graph = onnx_plans.lower(onnx_graph.canonical_graph(model), "sorted")
    sha256 = onnx_graph.save_graph(graph, export / "sorted.onnx")["sorted.onnx"]
    (export / "tokenizer").mkdir()
    for path in teacher.glob("tokenizer*"):
        shutil.copy(path, export / "tokenizer")
    plans = {name: {"file": f"{name}.onnx", "sha256": sha256} for name in ("sorted", "dense")}
    write_json(export / "manifest.json", {"spec": spec.to_dict(), "plans": plans})
    write_json(export / "plan.json", plan_of(1.2))
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


def test_a_version_that_answers_is_challenger_and_no_champion(workspace, first):
    assert first["aliases"] == ["challenger"]
    registry = Registry(workspace, "minilm")
    assert registry.aliases() == {"challenger": first["version"]}


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
    params, plan = load_params(PARAMS), plan_of(1.2)
    tags = register.tags(workspace, params, QUALITY, FACTS, plan)
    assert tags["dvc.md5.sorted.onnx"] == "abc"
    assert (tags["git.commit"], tags["git.dirty"]) == ("c0ffee", "true")
    (workspace / "dvc.lock").unlink()


@pytest.mark.parametrize("step", ["check_answers", "write_json"])
def test_when_a_step_fails_the_aliases_go_back_and_the_version_goes(workspace, first, monkeypatch, step):
    def fails(*arguments: object) -> None:
        raise ValueError("it does not answer")

    registry = Registry(workspace, "minilm")
    before = registry.aliases()
    monkeypatch.setattr(*((register, step) if step == "check_answers" else (StageRun, step)), fails)
    with pytest.raises(ValueError, match="does not answer"):
        register.run(StageRun("register", load_params(PARAMS), workspace))
    assert registry.aliases() == before
    assert registry.versions() == [first["version"]]


def test_a_model_that_answers_something_else_is_not_registered(workspace, first, monkeypatch):
    registry = Registry(workspace, "minilm")
    monkeypatch.setattr(Registry, "predict", lambda self, version, texts: [[1.0] * 32] * len(texts))
    with pytest.raises(ValueError, match="does not answer as"):
        register.check_answers(registry, first["version"], workspace / "exports/minilm")


def test_two_registries_of_one_process_give_their_own_models(workspace, first, tmp_path):
    mine = Registry(workspace, "minilm")
    other = make_workspace(tmp_path / "other", make_tiny_bert(tmp_path / "teacher", seed=1))
    register.run(StageRun("register", load_params(PARAMS), other))
    theirs = Registry(other, "minilm")
    for registry, root in ((mine, workspace), (theirs, other), (mine, workspace)):
        version = registry.resolve("challenger")
        expected = open_export(root / "exports/minilm").encode(["a red house"])
        np.testing.assert_allclose(registry.predict(version, ["a red house"]), expected, atol=1e-5)
        assert registry.export(version).is_relative_to(root)


@pytest.mark.parametrize("theirs", [None, "http://theirs"])
def test_a_registry_that_was_opened_is_not_the_users_choice_of_all_stores(workspace, tmp_path, monkeypatch, theirs):
    for name in MLFLOW:
        monkeypatch.delenv(name, raising=False)
        if theirs:
            monkeypatch.setenv(name, theirs)
    for root in (workspace, tmp_path):  # MLflow writes the variable where the address changes
        Registry(root, "minilm")
        assert [os.environ.get(name) for name in MLFLOW] == [theirs, theirs]
