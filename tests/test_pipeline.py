"""The real pipeline on a tiny teacher: under Prefect, and again by DVC alone with the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import ffn2moe
from ffn2moe.runtime.files import read_manifest
from tasks.registry import Registry
from tasks.store import experiment_id, mlflow_client
from tests.conftest import make_tiny_bert
from tests.texts import make_texts, write_corpus
from tests.toy import compress, git, make_tiny

REPRODUCIBLE = ("inputs", "prepare", "decompose", "train_router", "distill", "evaluate", "export")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a teacher, a corpus and the repository `repo` in which the flow has run once."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_bert(folder / "teacher")
    write_corpus(folder / "texts.jsonl", make_texts(1500))
    repo = make_tiny(folder / "repo", folder / "teacher", folder / "texts.jsonl")
    code, output = compress(repo)
    assert code == 0, output
    (folder / "output.txt").write_text(output)
    return folder


def lock_of(repo: Path) -> dict:
    return YAML(typ="safe").load((repo / "dvc.lock").read_text())["stages"]


def in_repo(repo: Path, *command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FFN2MOE_")}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=repo,
        env={**environment, "PATH": path, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_stage_runs_and_the_end_says_where_things_are(world):
    output = (world / "output.txt").read_text()
    assert output.count(" Completed") == 10
    for told in ("What was kept", "What was gained", "exports/tiny", "reports/report.html", "models:/tiny/1"):
        assert told in output
    assert (world / "repo/reports/report.html").stat().st_size > 10_000


def test_the_figures_are_where_checks_look_for_them(world):
    shown = json.loads(in_repo(world / "repo", "dvc", "metrics", "show", "--json"))
    quality = shown[""]["data"]["metrics/evaluate.json"]["data"]
    for model in ("teacher", "training_free", "student"):
        assert 0 < quality[model]["retrieval"]["ndcg_at_10"] <= 1
        assert 0 < quality[model]["retrieval"]["mrr"] <= 1
    assert quality["active_ffn_share"] == 0.5
    assert quality["amdahl_bound"] > 1
    plan = json.loads((world / "repo/exports/tiny/plan.json").read_text())
    assert {len(rows) for rows in plan["timings"].values()} == {2}


def test_the_export_opens_as_a_model_and_as_a_runtime(world):
    export = world / "repo/exports/tiny"
    assert ffn2moe.load(export / "checkpoint").config.hidden_size == 32
    assert ffn2moe.open_export(export).encode(["a red house", "sort a list"]).shape == (2, 32)


def test_the_registered_version_holds_the_hashes_of_dvc(world):
    registry = Registry(world / "repo", "tiny")
    assert registry.version_of("challenger") == 1
    tags = registry._client.get_model_version("tiny", "1").tags
    outs = {out["path"]: out["md5"] for out in lock_of(world / "repo")["export"]["outs"]}
    assert tags["dvc.md5.exported"] == outs["models/exported"]
    assert tags["git.commit"] == git(world / "repo", "rev-parse", "HEAD").strip()
    assert tags["git.dirty"] == "false"


def test_the_plans_that_lost_come_back_from_the_cache_of_dvc(world, tmp_path):
    repo = world / "repo"
    export, whole = repo / "exports/tiny", repo / "models/exported"
    before = {file.name: file.read_bytes() for file in (whole / "onnx").iterdir()}
    status = git(repo, "status", "--porcelain")
    slim = shutil.copytree(export, tmp_path / "slim")
    shutil.move(whole, tmp_path / "whole")
    try:
        assert read_manifest(export)["left_out"]
        assert "brought back: " in in_repo(repo, "flows.plans")
        assert {file.name: file.read_bytes() for file in (export / "onnx").iterdir()} == before
        assert [*read_manifest(export)["plans"]] and not read_manifest(export)["left_out"]
        assert "no plan is missing" in in_repo(repo, "flows.plans", "tiny")
        assert not [*(repo / "exports").glob("*.plans"), *repo.glob("plans-*.dvc")]
        assert git(repo, "status", "--porcelain") == status
    finally:
        shutil.rmtree(export)
        shutil.move(slim, export)
        shutil.move(tmp_path / "whole", whole)


def test_another_clone_makes_the_same_bytes_by_dvc_alone(world):
    """No cache is shared, there is neither Prefect nor a run record, and the folder has another name."""
    other = world / "another clone"
    git(world, "clone", "-q", str(world / "repo"), str(other))
    in_repo(other, "dvc", "repro", "-q", "evaluate", "export")
    mine, theirs = lock_of(world / "repo"), lock_of(other)
    for stage in REPRODUCIBLE:
        assert theirs[stage] == mine[stage], stage
    assert not (other / "mlflow.db").exists()


def test_the_run_record_and_the_report_tell_the_same_numbers(world):
    client = mlflow_client(f"sqlite:///{world / 'repo/mlflow.db'}")
    runs = client.search_runs(
        [experiment_id(client)], "attributes.run_name = 'tiny' and attributes.status = 'FINISHED'"
    )
    compare_record_and_report(runs[-1], world / "repo/reports/report.html", world / "repo/metrics/benchmark.json")


def compare_record_and_report(run, report: Path, benchmark: Path) -> None:
    recorded, page = run.data.metrics, report.read_text(encoding="utf-8")
    assert f"<b>{100 * recorded['evaluate.retention.retrieval.ndcg_at_10']:.1f}\N{NO-BREAK SPACE}%</b>" in page
    for model in ("teacher", "training_free", "student"):
        assert f"<td>{recorded[f'evaluate.{model}.retrieval.ndcg_at_10']:.4f}</td>" in page
    for plan in json.loads(benchmark.read_text())["largest_shape"]:
        milliseconds = recorded[f"benchmark.largest_shape.{plan}.median_ms"]
        assert re.search(rf"<td[^>]*>{milliseconds:.2f}</td>", page), plan
