"""An export ships what is used: the chosen plans, one that any ONNX runtime opens, and the checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import ffn2moe
from ffn2moe import cli
from ffn2moe.onnx.verify import verify
from ffn2moe.planning.choose import Cell, choose
from ffn2moe.planning.shipping import Shipment, brought_back, complete, complete_as, is_portable, leave_out
from ffn2moe.planning.timing import Timing
from ffn2moe.runtime.engines import ENGINES, EngineMissing
from ffn2moe.runtime.files import read_manifest, read_plan
from ffn2moe.runtime.plans import PLANS, plans_of
from flows.workspace import Workspace, bring_back, kept
from tasks import benchmark
from tests.texts import make_stage

SIZES = {"dense": 90, "dense8": 35, "ov-dense8": 36, "sorted": 90, "sorted8": 36, "ov-native4": 34, "ov-native": 45}


def write_export(folder: Path, sizes: dict[str, int] = SIZES) -> Path:
    """An export of files of these sizes, in KiB; `ov-dense` and `ov-sorted` run the files of others."""
    plans = {}
    for plan in (*sizes, "ov-dense", "ov-sorted"):
        file = f"onnx/{plan.removeprefix('ov-') if plan in ('ov-dense', 'ov-sorted') else plan}.onnx"
        plans[plan] = {"file": file, "sha256": "0"}
        if plan in sizes:
            (folder / "onnx").mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(bytes(sizes[plan] << 10))
    for name, size in (("checkpoint", 91), ("tokenizer", 1), ("container", 50)):
        (folder / name).mkdir()
        (folder / name / "weights").write_bytes(bytes(size << 10))
    (folder / "manifest.json").write_text(json.dumps({"spec": {}, "plans": plans}))
    return folder


@pytest.mark.parametrize(
    ("chosen", "losing", "portable", "kibibytes"),
    [
        (["ov-native4"], (), "sorted8", 92 + 34 + 36),
        (["ov-native4", "sorted8"], (), "sorted8", 92 + 34 + 36),
        (["ov-sorted"], (), "sorted", 92 + 90),  # the same file
        (["dense8"], (), "dense8", 92 + 35),
        (["ov-dense"], (), "dense", 92 + 90),
        (["ov-native"], ("sorted8",), "dense8", 92 + 45 + 35),  # `sorted` would not fit
        (["ov-native4", "dense8"], (), "dense8", 92 + 34 + 35),  # nor both
        (["ov-dense8"], (), "dense8", 92 + 36 + 35),  # no mixture is used
        (["ov-native4"], ("sorted8", "dense8"), "sorted", 92 + 34 + 90),  # none fits
    ],
)
def test_the_portable_plan_keeps_the_quality_and_adds_least(tmp_path, chosen, losing, portable, kibibytes):
    folder = write_export(tmp_path)
    shipment = Shipment(folder, {plan: plan not in losing for plan in read_manifest(folder)["plans"]})
    assert shipment.portable(chosen) == portable
    size = shipment.size(chosen)
    assert (size.export >> 10, size.container >> 10, size.dense >> 10) == (kibibytes, 50, 91)
    assert shipment.fits(chosen) == (kibibytes <= 182)


def test_where_experts_hold_more_than_the_dense_model_their_checkpoint_sets_the_size(tmp_path):
    folder = write_export(tmp_path)
    shipment = Shipment(folder, dict.fromkeys(read_manifest(folder)["plans"], True))
    assert not shipment.fits(["ov-native4", "ov-native", "sorted8"])  # 207 KiB, and 2.0 x 92 are allowed
    (folder / "checkpoint/weights").write_bytes(bytes(141 << 10))
    larger = Shipment(folder, dict.fromkeys(read_manifest(folder)["plans"], True))
    assert larger.fits(["ov-native4", "ov-native", "sorted8"]) and larger.size(["ov-native4"]).share > 2.0
    assert not larger.fits(["ov-native4", "ov-native", "sorted8", "sorted"])  # 347 of 284


def test_plans_that_are_too_large_together_are_not_chosen_together():
    def cell(sequence: int, **ms: float) -> Cell:
        rows = {
            plan.replace("_", "-"): Timing(
                *(plan.replace("_", "-"), 1, sequence, 1, time, 9 / time, 9 / time),
                low=8.9 / time,
                high=9.1 / time,
                rounds=20,
            )
            for plan, time in ms.items()
        }
        rows["dense"] = replace(rows["dense"], low=1.0, high=1.0)
        return Cell(1, sequence, "whole", 0.5, rows)

    cells = [cell(16, dense=9, ov_native4=3, ov_native8=6), cell(128, dense=9, ov_native4=6, ov_native8=3)]
    keeps = dict.fromkeys(cells[0].rows, True)
    assert set(choose(cells, keeps).plans) == {"ov-native4", "ov-native8"}
    one = choose(cells, keeps, fits=lambda plans: False)
    assert len(one.plans) == 1 and one.plans[0].startswith("ov-native")  # one plan is always allowed
    assert set(choose(cells, keeps, fits=lambda plans: len({*plans}) <= 2).plans) == {"ov-native4", "ov-native8"}


@pytest.fixture(scope="module")
def shipped(exported, tmp_path_factory) -> Path:
    """A workspace in which the stage `benchmark` chose between the plans, in few rounds: a dense one."""
    root = Path(shutil.copytree(exported, tmp_path_factory.mktemp("shipped") / "root"))
    settings = ("name=tiny", "benchmark.shapes=[[1,4]]", "benchmark.rounds=2", "gate.min_retention=0.5")
    benchmark.run(make_stage("benchmark", root, *settings))
    return root


def test_the_export_has_the_files_of_what_is_used_and_no_others(shipped):
    export, whole = shipped / "exports/tiny", shipped / "models/exported"
    manifest, plan = read_manifest(export), read_plan(export)
    assert plan is not None and {*plan["plans"], manifest["portable"]} == {*manifest["plans"]}
    assert {*manifest["plans"], *manifest["left_out"]} == {*plans_of("embedding")} and manifest["left_out"]
    graphs = {file.relative_to(export).as_posix() for file in (export / "onnx").iterdir()}
    assert graphs == {entry["file"] for entry in manifest["plans"].values()}
    for part in ("checkpoint", "tokenizer"):
        for file in (whole / part).iterdir():
            assert (export / part / file.name).read_bytes() == file.read_bytes()
    files = [file for file in export.rglob("*") if file.is_file() and file.suffix != ".json"]
    files += [*(export / "tokenizer").glob("*.json"), *(export / "checkpoint").glob("*.json")]
    assert manifest["bytes"]["export"] == sum(file.stat().st_size for file in files)
    assert ffn2moe.open_export(export).plan == plan["default_plan"]
    assert all(check.passed for check in verify(export, texts=2, threads=1))


def test_a_plan_that_was_left_out_is_named_with_what_brings_it_back(shipped, capsys):
    export = shipped / "exports/tiny"
    gone = next(iter(read_manifest(export)["left_out"]))
    with pytest.raises(ValueError, match=f"is shipped without the plan '{gone}'; make plans NAME=tiny brings it back"):
        ffn2moe.open_export(export, gone)
    assert cli.main(["info", str(export)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "make plans NAME=tiny brings them back" in shown and "x the dense model" in shown


def test_the_plans_that_lost_come_back_and_only_from_the_same_export(shipped, tmp_path):
    export = Path(shutil.copytree(shipped / "exports/tiny", tmp_path / "tiny"))
    whole = Path(shutil.copytree(shipped / "models/exported", tmp_path / "whole"))
    before = read_manifest(export)
    other = read_manifest(whole)
    gone = next(iter(before["left_out"]))
    other["plans"][gone]["sha256"] = "another"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=f"has other graphs of {gone} than"):
        complete(export, tmp_path / "other")
    assert read_manifest(export) == before
    assert complete(export, whole) == list(before["left_out"])
    assert read_manifest(export)["plans"] == read_manifest(whole)["plans"]
    assert ffn2moe.open_export(export, gone).encode(["a text"]).shape == (1, 32)
    assert complete(export, whole) == []


def test_plans_that_were_brought_back_are_left_out_again_to_the_same_bytes(shipped, tmp_path):
    export = Path(shutil.copytree(shipped / "exports/tiny", tmp_path / "tiny"))
    written = bytes_of(export)
    leave_out(export)
    assert brought_back(export) == [] and bytes_of(export) == written
    gone = complete(export, shipped / "models/exported")
    assert brought_back(export) == gone and len(bytes_of(export)) > len(written)
    leave_out(export)
    assert bytes_of(export) == written
    (export / "manifest.json").write_text("{")
    assert brought_back(export) == []


def test_an_export_is_completed_as_it_was_before_unless_its_graphs_are_others(shipped, tmp_path):
    slim, before, export = (
        Path(shutil.copytree(shipped / "exports/tiny", tmp_path / name)) for name in ("slim", "before", "export")
    )
    assert complete_as(export, slim) == []
    gone = complete(before, shipped / "models/exported")
    assert complete_as(export, before) == gone and bytes_of(export) == bytes_of(before)
    manifest = read_manifest(slim)
    manifest["left_out"][gone[0]]["sha256"] = "another"
    (slim / "manifest.json").write_text(json.dumps(manifest))
    written = bytes_of(slim)
    assert complete_as(slim, before) == [] and bytes_of(slim) == written


def test_a_run_keeps_the_plans_that_were_brought_back_until_it_makes_other_graphs(shipped, tmp_path):
    export = Path(shutil.copytree(shipped / "exports/tiny", tmp_path / "exports/tiny"))
    written = bytes_of(export)
    complete(export, shipped / "models/exported")
    whole = bytes_of(export)
    with kept(tmp_path, "tiny"):
        assert bytes_of(export) == written  # what DVC compares with dvc.lock
    assert bytes_of(export) == whole
    with pytest.raises(KeyboardInterrupt), kept(tmp_path, "tiny"):
        raise KeyboardInterrupt
    assert bytes_of(export) == whole
    killed = kept(tmp_path, "tiny")
    killed.__enter__()
    with kept(tmp_path, "tiny"):
        manifest = read_manifest(export)
        for entry in manifest["left_out"].values():
            entry["sha256"] = "another"
        (export / "manifest.json").write_text(json.dumps(manifest))
    assert set(bytes_of(export)) == set(written)


def test_a_run_with_settings_keeps_the_plans_that_were_brought_back(shipped, tmp_path):
    workspace = Workspace(tmp_path / ".workspaces/tiny", tmp_path, "tiny", ("name=tiny",))
    shutil.copytree(shipped / "exports/tiny", workspace.root / "exports/tiny")
    for name in ("metrics", "reports"):
        (workspace.root / name).mkdir()
    (workspace.root / "reports/report.html").write_text("a report")
    bring_back(workspace)
    assert read_manifest(workspace.export)["left_out"]
    complete(workspace.export, shipped / "models/exported")
    whole = bytes_of(workspace.export)
    bring_back(workspace)
    assert bytes_of(workspace.export) == whole


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_slim_export_is_planned_with_what_it_has(shipped, tmp_path, capsys):
    export = Path(shutil.copytree(shipped / "exports/tiny", tmp_path / "tiny"))
    assert cli.main(["plan", str(export), "--workload", "1x4", "--minutes", "0.01", "--threads", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not in this export: " in shown and "make plans NAME=tiny brings them back" in shown
    plan = read_plan(export)
    assert plan is not None and {*plan["timings"]} == {*read_manifest(export)["plans"]}


def test_a_machine_without_the_engine_opens_the_portable_plan_and_says_so(shipped, tmp_path, monkeypatch, caplog):
    export = Path(shutil.copytree(shipped / "exports/tiny", tmp_path / "tiny"))
    manifest, plan = read_manifest(export), read_plan(export)
    assert plan is not None
    manifest["plans"]["ov-sorted"] = {**manifest["plans"][manifest["portable"]], "engine": "openvino"}
    plan |= {"default_plan": "ov-sorted", "plans": ["ov-sorted"]}
    plan["choices"] = [row | {"plan": "ov-sorted"} for row in plan["choices"]]
    for name, content in (("manifest.json", manifest), ("plan.json", plan)):
        (export / name).write_text(json.dumps(content))

    def missing(*_: Any, **__: Any) -> Any:
        raise EngineMissing("this plan runs in OpenVINO, which is not installed")

    monkeypatch.setitem(ENGINES._rows, "openvino", replace(ENGINES["openvino"], require=missing, open=missing))
    with caplog.at_level(logging.WARNING):
        opened = ffn2moe.open_export(export)
    assert opened.plan == manifest["portable"] and opened.encode(["a text"]).shape == (1, 32)
    (line,) = caplog.messages
    assert "ov-sorted cannot run here: this plan runs in OpenVINO" in line and f"using {manifest['portable']}" in line
    with pytest.raises(EngineMissing):  # a plan that is asked for by its name is not replaced
        ffn2moe.open_export(export, "ov-sorted")


def test_portable_plans_are_made_of_standard_ops_alone(exported):
    folder = exported / "models/exported"
    entries = read_manifest(folder)["plans"]
    assert {plan for plan in entries if is_portable(plan)} == {"dense", "dense8", "sorted", "sorted8"}
    for plan, entry in entries.items():
        model = onnx.load(folder / entry["file"])
        standard = {node.domain for node in model.graph.node} | {one.domain for one in model.opset_import} <= {
            "",
            "ai.onnx",
        }
        assert standard == is_portable(plan), plan
        if standard:
            onnx.checker.check_model(model, full_check=True)
    assert not any(PLANS[name].portable for name in PLANS.names() if PLANS[name].engine != "onnxruntime")
