"""Variants of a mixture: which layers may stay dense, and plans in which they do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffn2moe.dense.load import load_dense
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import moe_layers
from ffn2moe.moe.variants import Variant, may_stay_dense, variants_of
from ffn2moe.onnx import graph as onnx_graph
from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.onnx.parity import parity, random_samples, reference
from ffn2moe.onnx.verify import verify
from ffn2moe.onnx.write import write_manifest
from ffn2moe.planning import plan_file
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import read_manifest, read_plan
from ffn2moe.runtime.plans import form_of, is_dense, plans_of
from ffn2moe.spec import FFNShape, MoESpec
from tasks import benchmark, export
from tests.conftest import make_tiny_bert
from tests.mixtures import carve, flat_spec, make_workspace
from tests.texts import make_stage

SETTINGS = ("name=tiny", "export.parity_texts=8", "export.engines=[onnxruntime]")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("teacher") / "bert")


def of_layers(*active: int, stacks: int = 1, shared_width: int = 0) -> MoESpec:
    """Four experts, of which these numbers are active in the layers, divided among equal stacks."""
    each = len(active) // stacks
    shape = FFNShape("encoder.layer", each, 32, 64, 16, shared_width, gated=False, activation="gelu")
    shapes = tuple(replace(shape, layers=f"stack.{index}") for index in range(stacks))
    varied = active if len(set(active)) > 1 else ()
    return replace(flat_spec(), stacks=shapes, num_active=active[0], active_per_layer=varied)


# --- which, and their names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (of_layers(2, 2, 2), []),  # all alike: a mixture in all of them, or the dense model
        (of_layers(4, 4), []),
        (of_layers(2, 4), []),  # one is dense already, and without the other nothing is left
        (of_layers(1, 3), [(1,)]),
        (of_layers(1, 3, 2, 1, 3), [(1, 4), (1, 2, 4)]),
        (of_layers(3, 2), [(0,)]),
        (of_layers(1, 1, 1, 1, stacks=2), [(0, 1), (2, 3)]),
        (of_layers(1, 3, 1, 3, stacks=2), [(1, 3), (0, 1), (2, 3)]),
        (of_layers(3, 1, 1, 1, stacks=2), [(0,), (0, 1), (2, 3)]),
    ],
)
def test_layers_that_do_the_same_work_stay_dense_together(spec, expected):
    assert may_stay_dense(spec) == expected


def test_layers_with_gates_of_their_own_are_no_dense_ones_even_where_all_experts_run():
    assert may_stay_dense(replace(of_layers(1, 4), gate="softmax")) == [(1,)]


def test_variants_are_other_budgets_and_dense_layers():
    assert variants_of(replace(flat_spec(), elastic=(1, 3))) == [Variant(num_active=1), Variant(num_active=3)]
    assert variants_of(of_layers(1, 3)) == [Variant(dense_layers=(1,))]
    assert not variants_of(of_layers(1, 3), with_teacher=False)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        (Variant(), "ov-dense8"),
        (Variant(num_active=12), "ov-dense8-k12"),
        (Variant(dense_layers=(3,)), "ov-dense8-d3"),
        (Variant(dense_layers=(0, 1, 2, 5, 11, 12)), "ov-dense8-d0-2.5.11-12"),
        (Variant(dense_layers=(1, 3)), "ov-dense8-d1.3"),
    ],
)
def test_names_tell_the_variant_and_the_form(variant, name):
    assert variant.name("ov-dense8") == name
    assert form_of(name) == "ov-dense8"
    assert Variant.of({"file": "x"} | variant.metadata()) == variant


def test_the_spec_of_a_variant_counts_what_it_computes():
    spec = of_layers(1, 3)
    mixed = Variant(dense_layers=(1,)).spec(spec)
    assert mixed.active_per_layer == (1, 4) and mixed.active_share == pytest.approx((0.25 + 1) / 2)
    assert Variant().spec(spec) == spec
    assert Variant(num_active=1).spec(replace(flat_spec(), elastic=(1,))).num_active == 1


# --- the model ------------------------------------------------------------------------------------------------------


def test_a_dense_layer_is_the_teachers_and_the_mixture_comes_back(teacher):
    student, spec = carve(teacher, active_per_layer=(1, 3), num_active=2)
    dense, _ = load_dense(str(teacher))
    for moe in moe_layers(student):  # as trained: no longer the teacher's neurons
        torch.nn.init.normal_(moe.w_in)
    samples = random_samples(student, spec, 6)

    def hidden(model: torch.nn.Module) -> list[torch.Tensor]:
        found = reference(model, samples, "embedding")
        return [torch.from_numpy(one.outputs["last_hidden_state"]) for one in found]

    before, mixtures = hidden(student), moe_layers(student)
    with Variant(dense_layers=(0, 1)).of_model(student, spec, dense):
        torch.testing.assert_close(hidden(student), hidden(dense))
    with Variant(dense_layers=(1,)).of_model(student, spec, dense):
        half = hidden(student)
        assert moe_layers(student)[0] is mixtures[0] and moe_layers(student)[1] is not mixtures[1]
    assert moe_layers(student) == mixtures
    torch.testing.assert_close(hidden(student), before, rtol=0, atol=0)
    assert not torch.allclose(half[0], before[0]) and not torch.allclose(half[0], hidden(dense)[0])


def test_without_a_teacher_no_layer_can_stay_dense(teacher):
    student, spec = carve(teacher, active_per_layer=(1, 3))
    with pytest.raises(ValueError, match="give the teacher"), Variant(dense_layers=(1,)).of_model(student, spec, None):
        pass


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["ov-native8", "qmoe8", "sorted"])
def test_in_every_form_a_dense_layer_has_neither_router_nor_experts(teacher, plan):
    student, spec = carve(teacher, active_per_layer=(1, 3), num_active=2)
    dense, _ = load_dense(str(teacher))
    with Variant(dense_layers=(1,)).of_model(student, spec, dense):
        lowered = onnx_plans.lower(onnx_graph.canonical_graph(student), plan)
    names = [node.name or "" for node in lowered.graph]
    assert any("layer.0" in name for name in names if name.endswith((".router", ".experts", ".moe")))
    assert not any("layer.1" in name for name in names if name.endswith((".router", ".experts", ".moe")))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, teacher) -> Path:
    """A workspace in which the stage `export` has run on a mixture with one expert in a layer and three in the next."""
    root = make_workspace(tmp_path_factory.mktemp("uneven"), teacher, active_per_layer=(1, 3))
    export.run(make_stage("export", root, *SETTINGS))
    return root


def test_plans_with_dense_layers_are_checked_and_judged_as_others_are(uneven, teacher):
    folder = uneven / "models/exported"
    manifest = read_manifest(folder)
    default = plans_of("embedding")
    mixtures = [plan for plan in default if not is_dense(plan)]
    assert {*manifest["plans"]} == {*default, *(f"{plan}-d1" for plan in mixtures)} and not manifest["refused"]
    entry = manifest["plans"]["sorted-d1"]
    assert entry["dense_layers"] == [1] and entry["parity_max_abs"] <= 1e-4
    assert "dense_layers" not in manifest["plans"]["sorted"]
    assert manifest["plans"]["sorted"]["retrieval_ndcg_at_10"] == 0.5  # as stage 5 found it
    assert entry["retrieval_ndcg_at_10"] != 0.5 and entry["retention"] != 1
    student, spec = checkpoint.load(uneven / "models/distilled"), checkpoint.load_spec(uneven / "models/distilled")
    dense, _ = load_dense(str(teacher))
    with Variant(dense_layers=(1,)).of_model(student, spec, dense):
        known = reference(student, random_samples(student, spec, 8), "embedding")
    mixed, plain = (open_export(folder, plan, 1) for plan in ("sorted-d1", "sorted"))
    assert parity(mixed.outputs, known).max_abs < 1e-4 < parity(plain.outputs, known).max_abs


def test_the_benchmark_races_them_and_bounds_count_their_dense_layers(uneven):
    benchmark.run(make_stage("benchmark", uneven, "name=tiny", "benchmark.shapes=[[2,4]]", "benchmark.rounds=2"))
    folder = uneven / "models/exported"
    plan = read_plan(uneven / "exports/tiny")
    assert plan is not None and {"sorted", "sorted-d1", "sorted8-d1"} <= {*plan["timings"]}
    whole, mixed = (plan_file.bounds_of(folder, 16, name) for name in ("sorted", "sorted-d1"))
    assert 1 < mixed["flops"] < whole["flops"] and 1 < mixed["amdahl"] < whole["amdahl"]


def test_verify_compares_them_with_one_another_as_the_teacher_is_not_there(uneven):
    found = {check.name: check for check in verify(uneven / "models/exported", texts=4, threads=1)}
    assert all(check.passed for check in found.values()), found
    assert "the teacher is not in an export" in found["sorted-d1: parity"].detail
    assert "with sorted-d1, on" in found["sorted8-d1: parity"].detail
    alone = {
        check.name: check for check in verify(uneven / "models/exported", plans=["sorted8-d1"], texts=4, threads=1)
    }
    assert "nothing to compare it with" in alone["sorted8-d1: parity"].detail


def test_verify_sees_a_plan_with_other_dense_layers_than_it_says(uneven, tmp_path):
    copied = Path(shutil.copytree(uneven / "models/exported", tmp_path / "copy"))
    manifest = read_manifest(copied)
    manifest["plans"]["sorted8-d1"] |= {key: manifest["plans"]["dense8"][key] for key in ("file", "sha256")}
    write_manifest(copied, manifest)
    found = {check.name: check for check in verify(copied, texts=4, threads=1)}
    assert not found["sorted8-d1: parity"].passed
