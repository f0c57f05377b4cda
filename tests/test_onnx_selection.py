"""Whatever chooses the experts, and however many, the graphs compute what PyTorch does, or say why they cannot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import moe_layers, set_active
from ffn2moe.onnx import decoder as onnx_decoder
from ffn2moe.onnx import graph as onnx_graph
from ffn2moe.onnx.lower import lower
from ffn2moe.onnx.mixture import PlanRefused
from ffn2moe.onnx.names import MIXTURE
from ffn2moe.onnx.parity import NEAR_TIE, Run, Sample, agreement, parity, random_samples, reference
from ffn2moe.onnx.verify import Known, plan_parity, verify
from ffn2moe.onnx.write import write_manifest
from ffn2moe.planning import plan_file
from ffn2moe.runtime import export as runtime
from ffn2moe.runtime.files import read_manifest, read_plan, sha256
from ffn2moe.runtime.plans import PLANS, form_of, is_dense, plans_of
from ffn2moe.spec import MoESpec
from tasks import benchmark, export
from tests.conftest import make_tiny_bert, make_tiny_llama
from tests.mixtures import carve, make_workspace
from tests.test_decoder import opened
from tests.test_export import SETTINGS
from tests.test_onnx import EMBEDDING, batch_of, run_of
from tests.texts import make_stage


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Two layers, so that an error in the first moves what the second chooses."""
    return make_tiny_bert(tmp_path_factory.mktemp("teacher") / "bert")


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory) -> Path:
    """One layer: tracing costs time by the layer."""
    return make_tiny_bert(tmp_path_factory.mktemp("small") / "bert", num_hidden_layers=1)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("teacher") / "llama")


def samples(seed: int = 0) -> list[Sample]:
    """Texts of many lengths in batches with padding, one token alone among them."""
    random = np.random.default_rng(seed)
    return [batch_of(random, batch, sequence) for batch, sequence in ((1, 1), (4, 20), (3, 50), (1, 33))]


def check(model: Any, spec: MoESpec, plans: tuple[str, ...], canonical: ir.Model | None = None) -> dict[str, Run]:
    """Each plan of an encoder equals PyTorch; gives the plans as functions."""
    canonical = canonical or onnx_graph.canonical_graph(model)
    known = Known.of(spec, model, samples() + samples(1))
    runs = {plan: run_of(lower(canonical, plan)) for plan in plans}
    for plan, run in runs.items():
        _, found = plan_parity(plan, run, known)  # raises where it is too far
        assert found.rows >= 12
        if PLANS[plan].is_quantised:
            assert agreement(run, known.student, EMBEDDING) > 0.9
    return runs


@pytest.mark.parametrize(("layers", "plans"), [((1, 3), ("fused", "sorted", "sorted8")), ((4, 2), ("fused", "sorted"))])
def test_each_layer_has_a_number_of_experts_of_its_own(teacher, layers: tuple[int, ...], plans: tuple[str, ...]):
    model, spec = carve(teacher, active_per_layer=layers)
    assert [moe.num_active for moe in moe_layers(model)] == list(layers)
    check(model, spec, plans)


def test_the_quantised_operators_have_a_number_of_experts_by_layer(language_model):
    model, spec = carve(language_model, head="causal", active_per_layer=(1, 3), gate="softmax_topk")
    canonical = onnx_decoder.canonical_graphs(model, "causal")["main"]
    known = reference(model, random_samples(model, spec, 12), "causal")
    for plan, least in (("qmoe8", 0.99), ("qmoe4", 0.8)):
        lowered = lower(canonical, plan)
        assert [node.attributes["k"].as_int() for node in lowered.graph if node.op_type == "QMoE"] == [1, 3]
        assert agreement(opened({"main": lowered}).outputs, known, "logits") > least


# --- several budgets ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elastic(tmp_path_factory, teacher) -> Path:
    """A workspace in which the stage `export` has run on a mixture of three budgets."""
    root = make_workspace(tmp_path_factory.mktemp("elastic"), teacher, elastic=(1, 3))
    export.run(make_stage("export", root, *SETTINGS))
    return root


def test_every_budget_of_an_elastic_mixture_has_plans_with_a_quality_of_their_own(elastic):
    manifest = read_manifest(elastic / "models/exported")
    default = plans_of("embedding")
    mixtures = [plan for plan in default if not is_dense(plan)]
    others = {f"{plan}-k{K}": K for plan in mixtures for K in (1, 3)}
    assert {*manifest["plans"]} == {*default, *others} and not manifest["refused"]
    for plan, entry in manifest["plans"].items():
        assert entry.get("num_active") == others.get(plan)
        assert entry["sha256"] == sha256(elastic / "models/exported" / entry["file"])
        if form_of(plan) == "sorted":
            assert entry["parity_max_abs"] <= 1e-4
    found = {plan: manifest["plans"][plan]["retrieval_ndcg_at_10"] for plan in ("sorted", "sorted-k1", "sorted-k3")}
    assert len(set(found.values())) == 3  # judged, each of them


def test_a_budget_is_opened_by_its_name_and_is_the_model_with_so_many_experts(elastic):
    student = checkpoint.load(elastic / "models/distilled")
    set_active(student, 1)
    known = reference(student, samples(), "embedding")
    one, two = (runtime.open_export(elastic / "models/exported", plan, 1) for plan in ("sorted-k1", "sorted"))
    assert parity(one.outputs, known).max_abs < 1e-4 < parity(two.outputs, known).max_abs


def test_the_benchmark_times_every_budget_and_knows_what_each_can_gain(elastic, tmp_path):
    root = Path(shutil.copytree(elastic, tmp_path / "copy"))
    benchmark.run(make_stage("benchmark", root, "name=tiny", "benchmark.shapes=[[2,4]]", "benchmark.rounds=2"))
    plan = read_plan(root / "exports/tiny")
    made = {*read_manifest(root / "models/exported")["plans"]}
    assert plan is not None and {*plan["timings"]} == made - {"fused", "fused-k1", "fused-k3"}  # no race for these
    plans = ("sorted-k1", "sorted", "sorted-k3")
    one, own, three = (plan_file.bounds_of(root / "models/exported", 16, plan)["flops"] for plan in plans)
    assert one > own > three


def test_verify_looks_at_every_budget(elastic, tmp_path):
    found = list(verify(elastic / "models/exported", texts=4, threads=1))
    assert all(check.passed for check in found), found
    assert {"fused-k3: self-test of com.microsoft.MoE", "sorted8-k1: parity"} < {check.name for check in found}
    copied = Path(shutil.copytree(elastic / "models/exported", tmp_path / "copy"))
    manifest = read_manifest(copied)
    manifest["plans"]["sorted-k1"] |= {key: manifest["plans"]["sorted"][key] for key in ("file", "sha256")}
    write_manifest(copied, manifest)  # a plan that computes another budget than it says
    checks = {check.name: check for check in verify(copied, plans=["sorted-k1"], texts=4, threads=1)}
    assert not checks["sorted-k1: parity"].passed


# --- what rounding decides ------------------------------------------------------------------------------------------


def test_experts_of_one_score_are_a_near_tie(small_teacher):
    model, _ = carve(small_teacher)
    assert all((one.margin_B > NEAR_TIE).all() for one in reference(model, samples(), "embedding"))
    router = moe_layers(model)[0].router
    torch.nn.init.zeros_(router.weight)
    router.balance_bias.zero_()
    known = reference(model, samples(), "embedding")
    assert all((one.margin_B < NEAR_TIE).all() for one in known)
    with pytest.raises(ValueError, match="train the router first"):
        parity(lambda sample: known[0].outputs, known[:1])


# --- what has no form in ONNX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "name", "words"),
    [
        ("selection", "threshold", "the selection 'threshold' has no form in ONNX"),
        ("routing", "sequence", r"routers that read a whole text \(routing 'sequence'\)"),
        ("gate", "sofmax", "unknown gate in ONNX 'sofmax'; did you mean 'softmax'"),
    ],
)
def test_what_has_no_form_in_onnx_is_refused_by_name_in_every_plan_of_a_mixture(small_teacher, attribute, name, words):
    model, _ = carve(small_teacher)
    canonical = onnx_graph.canonical_graph(model)
    for node in canonical.graph:
        if node.op_type == MIXTURE:
            node.attributes.add(ir.AttrString(attribute, name))
    for plan, row in PLANS.items():
        if not row.dense and not row.without_experts:
            with pytest.raises(PlanRefused, match=words):
                lower(canonical, plan)


def test_a_dense_plan_does_not_take_a_mixture_for_the_teacher(small_teacher):
    model, _ = carve(small_teacher)
    with pytest.raises(PlanRefused, match="dense8: no step of this plan computes a mixture"):
        lower(onnx_graph.canonical_graph(model), "dense8")
