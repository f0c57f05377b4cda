"""Decompose, train_router and distill: paths in, paths out, on a tiny teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ffn2moe
from ffn2moe.dense.ffn import ACTIVATIONS
from ffn2moe.dense.load import load_dense
from ffn2moe.distill import layerwise
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import moe_layers
from tasks import decompose, distill, evaluate, prepare, train_router
from tests.conftest import make_tiny_bert
from tests.texts import make_stage, make_texts, write_corpus

SMALL = (
    "data.corpus=texts.jsonl",
    "data.calibration_texts=40",
    "data.evaluation_pairs=30",
    "teacher.max_length=32",
    "decompose.calibration_tokens=400",
    "train_router.tokens=600",
    "train_router.steps=20",
    "train_router.batch_tokens=256",
    "distill.steps=12",
    "distill.batch_tokens=256",
    "distill.checkpoint_every=5",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A workspace in which `prepare` has run; 60 neurons, which 8 experts do not divide."""
    root = tmp_path_factory.mktemp("prepared")
    make_tiny_bert(root / "teacher", ffn_width=60)
    write_corpus(root / "texts.jsonl", make_texts(400))
    prepare.run(make_stage("prepare", root, "teacher.source=teacher", *SMALL))
    return root


@pytest.fixture(scope="module")
def routed(prepared, tmp_path_factory) -> Path:
    """The same after `decompose` and `train_router`."""
    root = tmp_path_factory.mktemp("routed") / "root"
    shutil.copytree(prepared, root)
    decompose.run(stage(root, "decompose"))
    train_router.run(stage(root, "train_router"))
    return root


def stage(root: Path, name: str, *overrides: str):
    return make_stage(name, root, "teacher.source=teacher", *SMALL, *overrides)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_decompose_proves_that_all_experts_are_the_dense_model_and_says_it_pads(routed):
    found = json.loads((routed / "metrics/decompose.json").read_text())
    assert found["identity_max_abs"] <= 1e-5
    assert found["expert_width"] == 8 and len(found["layers"]) == 2
    spec = checkpoint.load_spec(routed / "models/decomposed")
    assert (spec.num_experts, spec.num_active, spec.ffn_width) == (8, 2, 60)


def test_decompose_refuses_a_model_that_its_experts_do_not_reproduce(prepared, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    monkeypatch.setitem(ACTIVATIONS, "gelu", torch.relu)  # as if the family said the wrong thing
    with pytest.raises(ValueError, match=r"with all experts active the mixture differs .* 'bert'"):
        decompose.run(stage(root, "decompose"))
    assert not (root / "models").exists()


def test_training_the_router_leaves_what_experts_read_and_reports_three_errors_a_layer(routed):
    before, after = (ffn2moe.load(routed / "models" / name) for name in ("decomposed", "routed"))
    for old, new in zip(moe_layers(before), moe_layers(after), strict=True):
        assert torch.equal(old.w_in, new.w_in)  # w_out is refitted
        assert not torch.equal(old.router.weight, new.router.weight)
    for row in json.loads((routed / "metrics/train_router.json").read_text())["layers"]:
        assert 0 < row["oracle_error"] <= row["router_error"] < 1
        assert row["gap"] == pytest.approx(row["router_error"] - row["oracle_error"])
        assert 0 < row["router_recall"] <= 1
        assert row["refit_error"] < row["router_error"]


def test_a_trained_router_is_better_than_no_router(routed):
    errors = json.loads((routed / "metrics/train_router.json").read_text())["layers"]
    recall = sum(row["router_recall"] for row in errors) / len(errors)
    assert recall > 1.2 * 2 / 8  # two of eight at random


def test_a_distillation_killed_between_checkpoints_ends_in_the_same_bytes(routed, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        shutil.copytree(routed, root)
    distill.run(stage(whole, "distill"))

    add = distill.Progress.add

    def die_at_step_8(self, metrics):
        if metrics.step == 8:
            raise KeyboardInterrupt
        add(self, metrics)

    monkeypatch.setattr(distill.Progress, "add", die_at_step_8)
    with pytest.raises(KeyboardInterrupt):
        distill.run(stage(killed, "distill"))
    assert not (killed / "models/distilled").exists()
    assert (killed / ".cache/distill.safetensors").is_file()
    monkeypatch.undo()

    said: list[str] = []
    again = stage(killed, "distill")
    monkeypatch.setattr(again, "say", said.append)
    distill.run(again)
    assert "resuming from the checkpoint at step 5" in said
    assert bytes_of(killed / "models/distilled") == bytes_of(whole / "models/distilled")
    for name in ("metrics/distill.json", "metrics/plots/distill.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not (killed / ".cache/distill.safetensors").exists()


def test_layers_that_learn_first_have_a_curve_and_are_not_lost_when_the_stage_is_killed(routed, tmp_path, monkeypatch):
    settings = ("distill.layerwise_steps=12", "distill.steps=2", "compute.threads=1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        shutil.copytree(routed, root)
    distill.run(stage(whole, "distill", *settings))
    curve = (whole / "metrics/plots/layerwise.csv").read_text().splitlines()
    assert curve[0] == "layer,step,loss"
    assert [line.rsplit(",", 1)[0] for line in curve[1:]] == ["0,0", "0,10", "1,0", "1,10"]

    put_back = layerwise.KeptLayers.put_back

    def die_after_layer_0(self, ffn, layer):
        if layer == 1:
            raise KeyboardInterrupt
        return put_back(self, ffn, layer)

    monkeypatch.setattr(layerwise.KeptLayers, "put_back", die_after_layer_0)
    with pytest.raises(KeyboardInterrupt):
        distill.run(stage(killed, "distill", *settings))
    monkeypatch.undo()
    monkeypatch.setattr(layerwise.LayerDistillation, "losses", None)  # both layers are done
    distill.run(stage(killed, "distill", *settings))
    assert bytes_of(killed / "models/distilled") == bytes_of(whole / "models/distilled")
    for name in ("metrics/distill.json", "metrics/plots/layerwise.csv", "metrics/plots/distill.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not (killed / ".cache/layerwise").exists()


def test_layers_may_be_all_that_learns(routed, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(routed, root)
    distill.run(stage(root, "distill", "distill.layerwise_steps=2", "distill.steps=0", "compute.threads=1"))
    assert bytes_of(root / "models/distilled") != bytes_of(root / "models/routed")


def test_a_checkpoint_of_other_parameters_is_not_continued(routed, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(routed, root)
    monkeypatch.setattr(distill.Progress, "discard", lambda self: None)
    distill.run(stage(root, "distill"))
    said: list[str] = []
    other = stage(root, "distill", "distill.learning_rate=0.002")
    monkeypatch.setattr(other, "say", said.append)
    distill.run(other)
    assert not any("resuming" in line for line in said)


def test_without_distillation_the_student_is_the_routed_mixture(routed, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(routed, root)
    distill.run(stage(root, "distill", "distill.steps=0"))
    assert bytes_of(root / "models/distilled") == bytes_of(root / "models/routed")


def test_the_frozen_parts_of_the_student_are_the_teachers(routed, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(routed, root)
    distill.run(stage(root, "distill"))
    teacher, _ = load_dense(str(root / "data/teacher"))
    student = ffn2moe.load(root / "models/distilled").state_dict()
    for name, tensor in teacher.state_dict().items():
        if ".intermediate." not in name and ".output.dense" not in name:
            assert torch.equal(student[name], tensor), name


@pytest.mark.parametrize(
    "settings",
    [
        ("gate=softmax", "shared_width=8"),
        ("active_per_layer=budget",),
    ],
    ids=lambda settings: settings[0],
)
def test_every_way_to_choose_experts_goes_through_all_stages(prepared, tmp_path, settings):
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    for task in (decompose, train_router, distill, evaluate):
        task.run(stage(root, task.__name__.removeprefix("tasks."), *(f"decompose.{one}" for one in settings)))
    layers = json.loads((root / "metrics/evaluate.json").read_text())["layers"]
    assert sum(layer["mean_active"] for layer in layers) / len(layers) == pytest.approx(2, abs=0.3)
    assert all(layer["router_error"] >= layer["oracle_error"] - 1e-6 for layer in layers)
    spec = checkpoint.load_spec(root / "models/distilled")
    assert (spec.selection, spec.routing) == ("topk", "token")
    assert bool(spec.active_per_layer) == ("active_per_layer=budget" in settings)
    assert spec.gate == ("softmax" if "gate=softmax" in settings else "unit")
