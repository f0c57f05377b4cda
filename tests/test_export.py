"""The stages export and benchmark: what they write, that it is the same every time, and what they refuse."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import ffn2moe
from ffn2moe.onnx import verify
from ffn2moe.onnx.parity import Gap
from ffn2moe.runtime.files import sha256
from ffn2moe.runtime.plans import is_dense, plans_of
from tasks import benchmark, export
from tests.texts import make_stage

SETTINGS = ("name=tiny", "compute.threads=1", "export.parity_texts=12", "export.engines=[onnxruntime]")


@pytest.fixture
def workspace(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "another place"))


def manifest_of(root: Path) -> dict:
    return json.loads((root / "models/exported/manifest.json").read_text())


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_manifest_says_what_was_exported_and_how_well_it_was_checked(exported):
    manifest = manifest_of(exported)
    assert set(manifest) == {"teacher", "spec", "model", "plans", "refused", "versions", "data_sha256", "seed"}
    assert manifest["spec"] == ffn2moe.moe.checkpoint.load_spec(exported / "models/distilled").to_dict()
    assert set(manifest["plans"]) == set(plans_of("embedding"))
    for plan, entry in manifest["plans"].items():
        assert entry["file"] == f"onnx/{plan}.onnx"
        assert entry["sha256"] == sha256(exported / "models/exported" / entry["file"])
        assert 0 < entry["retrieval_ndcg_at_10"] <= 1
    for plan in ("dense", "sorted"):
        assert manifest["plans"][plan]["parity_max_abs"] <= 1e-4
    assert manifest["plans"]["fused"]["parity_max_abs"] <= 2e-3
    assert manifest["plans"]["dense"]["retention"] == 1
    assert str(exported) not in json.dumps(manifest)


def test_the_same_models_give_the_same_bytes(workspace):
    before = bytes_of(workspace / "models/exported")
    export.run(make_stage("export", workspace, *SETTINGS))
    assert bytes_of(workspace / "models/exported") == before


def test_a_graph_that_is_far_from_pytorch_fails_the_stage_and_leaves_the_export_before(workspace, monkeypatch):
    before = bytes_of(workspace / "models/exported")
    parity = verify.parity

    def worse(*arguments, **options):
        found = parity(*arguments, **options)
        return replace(found, gaps={name: Gap(gap.difference + 1, 1.0) for name, gap in found.gaps.items()})

    monkeypatch.setattr(verify, "parity", worse)
    with pytest.raises(ValueError, match=r"the plan dense does not compute .* by 1\.00e\+00 .* 1e-04 is allowed"):
        export.run(make_stage("export", workspace, *SETTINGS))
    assert bytes_of(workspace / "models/exported") == before


def test_the_benchmark_chooses_a_plan_and_times_every_one(workspace):
    stage = make_stage("benchmark", workspace, "name=tiny", "benchmark.shapes=[[1,4],[4,8]]", "benchmark.rounds=3")
    benchmark.run(stage)
    plan = json.loads((workspace / "exports/tiny/plan.json").read_text())
    plans = manifest_of(workspace)["plans"]
    assert {*plan["timings"], *plan["left_out"]} == {*plans} - {"fused"}  # which cannot win on a CPU
    for rows in plan["timings"].values():
        assert [(row["batch"], row["sequence"], row["threads"]) for row in rows] == [(1, 4, 1), (4, 8, 1)]
        assert {"median_ms", "speedup_vs_dense", "speedup_vs_best_dense"} < set(rows[0])
    assert is_dense(plan["default_plan"])  # 3 rounds are too few for another
    assert plan["reason"] and plan["machine"]["cpu"]
    assert 1 < plan["bounds"]["flops"] <= plan["bounds"]["amdahl"]  # the second takes the router for free
    assert ffn2moe.open_export(workspace / "exports/tiny").plan == plan["default_plan"]
    metrics = json.loads((workspace / "metrics/benchmark.json").read_text())
    assert metrics["default_plan"] == plan["default_plan"]
    with (workspace / "metrics/plots/benchmark.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 2 * len(plan["timings"])


def test_a_plan_that_loses_quality_is_not_chosen(workspace):
    manifest = manifest_of(workspace)
    for name in ("fused", "sorted", "sorted8", "dense8"):
        manifest["plans"][name]["retention"] = 0.5
    (workspace / "models/exported/manifest.json").write_text(json.dumps(manifest))
    stage = make_stage("benchmark", workspace, "name=tiny", "benchmark.shapes=[[2,4]]", "benchmark.rounds=2")
    benchmark.run(stage)
    plan = json.loads((workspace / "exports/tiny/plan.json").read_text())
    assert plan["default_plan"] == "dense"
    assert plan["reason"].startswith("no plan of the student keeps the quality")
