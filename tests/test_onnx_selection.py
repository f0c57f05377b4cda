"""Whatever chooses the experts, and however many, the graphs compute what PyTorch does, or say why they cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ffn2moe.dense.load import load_dense
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import moe_layers, set_active
from ffn2moe.onnx import decoder as onnx_decoder
from ffn2moe.onnx import graph as onnx_graph
from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.onnx.parity import NEAR_TIE, Run, Sample, agreement, parity, random_samples, reference, torch_outputs
from ffn2moe.onnx.verify import Known, plan_parity, verify
from ffn2moe.onnx.write import write_manifest
from ffn2moe.planning import autoplan
from ffn2moe.runtime import export as runtime
from ffn2moe.runtime.files import read_manifest, read_plan, sha256
from ffn2moe.runtime.plans import DENSE_PLANS, PLANS, QUANTIZED_PLANS, Plan, form_of
from ffn2moe.spec import MoESpec
from tasks import benchmark, export
from tests.conftest import make_tiny_bert, make_tiny_classifier, make_tiny_llama
from tests.mixtures import carve, make_workspace
from tests.test_decoder import opened
from tests.test_export import SETTINGS
from tests.test_onnx import EMBEDDING, batch_of, run_of
from tests.texts import make_stage

SELECTIONS: dict[str, dict[str, Any]] = {
    "threshold": {"selection": "threshold"},
    "threshold, at most 3": {"selection": "threshold", "max_active": 3},
    "prefix": {"selection": "prefix"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Two layers, so that an error in the first moves what the second chooses."""
    return make_tiny_bert(tmp_path_factory.mktemp("teacher") / "bert")


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory) -> Path:
    """One layer: tracing costs time by the layer."""
    return make_tiny_bert(tmp_path_factory.mktemp("small") / "bert", num_hidden_layers=1)


@pytest.fixture(scope="module")
def mixtures(teacher) -> dict[str, tuple[Any, MoESpec, ir.Model]]:
    """A model of each selection, its spec and its canonical graph; not to be changed."""
    made = {name: carve(teacher, **options) for name, options in SELECTIONS.items()}
    return {
        name: (model, spec, onnx_graph.canonical_graph(model, spec.pooling)) for name, (model, spec) in made.items()
    }


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("teacher") / "llama")


def samples(seed: int = 0) -> list[Sample]:
    """Texts of many lengths in batches with padding, one token alone among them."""
    random = np.random.default_rng(seed)
    return [batch_of(random, batch, sequence) for batch, sequence in ((1, 1), (4, 20), (3, 50), (1, 33))]


@contextmanager
def observed(model: Any, observer: Any) -> Iterator[None]:
    """For a while, what every layer scores and chooses is told."""
    for moe in moe_layers(model):
        moe.observer = observer
    try:
        with torch.no_grad():
            yield
    finally:
        for moe in moe_layers(model):
            moe.observer = None


def check(model: Any, spec: MoESpec, plans: tuple[Plan, ...], canonical: ir.Model | None = None) -> dict[str, Run]:
    """Each plan of an encoder equals PyTorch; gives the plans as functions."""
    canonical = canonical or onnx_graph.canonical_graph(model, spec.pooling)
    known = Known.of(spec, model, samples() + samples(1))
    runs = {plan: run_of(onnx_plans.lower(canonical, plan)) for plan in plans}
    for plan, run in runs.items():
        _, found = plan_parity(plan, run, known)  # raises where it is too far
        assert found.rows >= 12
        if plan in QUANTIZED_PLANS:
            assert agreement(run, known.student, EMBEDDING) > 0.9
    return runs


@pytest.mark.parametrize("name", SELECTIONS)
def test_tokens_that_use_as_many_experts_as_they_need_are_computed_as_in_pytorch(mixtures, name):
    model, spec, canonical = mixtures[name]
    check(model, spec, ("sorted", "sorted8"), canonical)


@pytest.mark.parametrize("gate", ["softmax", "softmax_topk", "sigmoid"])
def test_every_gate_weighs_the_experts_within_the_threshold(small_teacher, gate):
    check(*carve(small_teacher, gate=gate, **SELECTIONS["threshold, at most 3"]), ("sorted",))


@pytest.mark.parametrize("name", ["threshold, at most 3", "prefix"])
def test_language_models_decode_with_a_number_of_experts_by_token(language_model, name):
    model, spec = carve(language_model, head="causal", **SELECTIONS[name])
    graphs = onnx_decoder.canonical_graphs(model, "causal")
    known = reference(model, random_samples(model, spec, 12), "causal")
    export = opened({"main": onnx_plans.lower(graphs["main"], "sorted")})
    found = parity(export.outputs, known)
    assert found.rows >= 6 and found.relative < 1e-5


@pytest.mark.parametrize("selection", ["threshold", "prefix"])
def test_only_used_experts_are_computed(mixtures, selection):
    model, _, canonical = mixtures[selection]
    lowered = onnx_plans.lower(canonical, "sorted")
    for node in lowered.graph:  # the neurons of every expert are an output, too
        if node.op_type == "Gelu":
            lowered.graph.outputs.append(node.outputs[0])
    session = runtime.session(ir.to_proto(lowered).SerializeToString(), threads=1)
    sample = batch_of(np.random.default_rng(1), 4, 30)
    names = [output.name for output in session.get_outputs()][len(onnx_graph.OUTPUTS) :]
    rows = [len(array) for array in session.run(names, dict(sample))]
    seen: list[int] = []
    with observed(model, lambda scores_TE, choice: seen.extend(choice.load_E(4).tolist())):
        torch_outputs(model, "embedding", sample, "mean")
    assert sorted(rows) == sorted(seen) and sum(seen) < 0.75 * 2 * 4 * 120  # of 2 layers, 4 experts and 120 tokens


@pytest.mark.parametrize("selection", ["threshold", "prefix"])
def test_a_plan_of_used_experts_gives_the_same_numbers_on_more_than_one_thread(mixtures, selection):
    lowered = onnx_plans.lower(mixtures[selection][2], "sorted")
    sample = batch_of(np.random.default_rng(8), 8, 64)
    expected, two = run_of(lowered)(sample), run_of(lowered, threads=2)
    for _ in range(20):
        np.testing.assert_allclose(two(sample)[EMBEDDING], expected[EMBEDDING], atol=1e-5)


@pytest.mark.parametrize("selection", ["threshold", "prefix"])
def test_with_all_experts_chosen_every_selection_is_the_teacher(small_teacher, selection):
    dense, _ = load_dense(str(small_teacher))
    model, spec = carve(small_teacher, selection=selection, num_active=4, output_scale=1.0)
    known = reference(dense, samples(), "embedding", "mean")
    run = run_of(onnx_plans.lower(onnx_graph.canonical_graph(model, spec.pooling), "sorted"))
    assert parity(run, known).max_abs < 1e-5


@pytest.mark.parametrize("selection", ["threshold", "prefix"])
def test_operators_of_a_fixed_number_of_experts_are_refused_with_the_plan_that_has_none(mixtures, selection):
    _, _, canonical = mixtures[selection]
    for plan in ("fused", "qmoe8", "qmoe4"):
        with pytest.raises(onnx_plans.PlanRefused, match=f"{plan}: .* same number of experts .*; the plan `sorted`"):
            onnx_plans.lower(canonical, plan)


@pytest.mark.parametrize(("layers", "plans"), [((1, 3), ("fused", "sorted", "sorted8")), ((4, 2), ("fused", "sorted"))])
def test_each_layer_has_a_number_of_experts_of_its_own(teacher, layers: tuple[int, ...], plans: tuple[Plan, ...]):
    model, spec = carve(teacher, active_per_layer=layers)
    assert [moe.num_active for moe in moe_layers(model)] == list(layers)
    check(model, spec, plans)


def test_the_quantised_operators_have_a_number_of_experts_by_layer(language_model):
    model, spec = carve(language_model, head="causal", active_per_layer=(1, 3), gate="softmax_topk")
    canonical = onnx_decoder.canonical_graphs(model, "causal")["main"]
    known = reference(model, random_samples(model, spec, 12), "causal")
    for plan, least in (("qmoe8", 0.99), ("qmoe4", 0.8)):
        lowered = onnx_plans.lower(canonical, plan)
        assert [node.attributes["k"].as_int() for node in lowered.graph if node.op_type == "QMoE"] == [1, 3]
        assert agreement(opened({"main": lowered}).outputs, known, "logits") > least


# --- one choice for a text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"selection": "threshold", "gate": "softmax"}, {"selection": "prefix"}], ids=str
)
def test_a_choice_for_a_text_is_that_of_its_real_tokens(teacher, options):
    model, spec = carve(teacher, routing="sequence", **options)
    runs = check(model, spec, ("sorted",) if options else ("fused", "sorted", "sorted8"))
    ids = samples()[3]["input_ids"]
    short = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    padded = {name: np.pad(array, ((0, 0), (0, 11))) for name, array in short.items()}
    np.testing.assert_allclose(runs["sorted"](padded)[EMBEDDING], runs["sorted"](short)[EMBEDDING], atol=1e-5)


def test_a_classifier_reads_a_text_as_a_whole(tmp_path):
    teacher = make_tiny_classifier(tmp_path / "classifier")
    model, _ = carve(teacher, head="classification", routing="sequence")
    canonical = onnx_decoder.canonical_graphs(model, "classification")["main"]
    known = reference(model, samples() + samples(1), "classification")
    for plan in ("fused", "sorted"):
        found = parity(opened({"main": onnx_plans.lower(canonical, plan)}, runtime.ModelExport).outputs, known)
        assert found.rows >= 12 and found.relative < (1e-5 if plan == "sorted" else 1e-2)  # of GELU in the tanh form


# --- several budgets ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elastic(tmp_path_factory, teacher) -> Path:
    """A workspace in which the stage `export` has run on a mixture of three budgets."""
    root = make_workspace(tmp_path_factory.mktemp("elastic"), teacher, elastic=(1, 3))
    export.run(make_stage("export", root, *SETTINGS))
    return root


def test_every_budget_of_an_elastic_mixture_has_plans_with_a_quality_of_their_own(elastic):
    manifest = read_manifest(elastic / "exports/tiny")
    mixtures = [plan for plan in PLANS if plan not in DENSE_PLANS]
    others = {f"{plan}-k{K}": K for plan in mixtures for K in (1, 3)}
    assert {*manifest["plans"]} == {*PLANS, *others} and not manifest["refused"]
    for plan, entry in manifest["plans"].items():
        assert entry.get("num_active") == others.get(plan)
        assert entry["sha256"] == sha256(elastic / "exports/tiny" / entry["file"])
        if form_of(plan) == "sorted":
            assert entry["parity_max_abs"] <= 1e-4
    found = {plan: manifest["plans"][plan]["retrieval_ndcg_at_10"] for plan in ("sorted", "sorted-k1", "sorted-k3")}
    assert len(set(found.values())) == 3  # judged, each of them


def test_a_budget_is_opened_by_its_name_and_is_the_model_with_so_many_experts(elastic):
    student = checkpoint.load(elastic / "models/distilled")
    set_active(student, 1)
    known = reference(student, samples(), "embedding", "mean")
    one, two = (runtime.open_export(elastic / "exports/tiny", plan, 1) for plan in ("sorted-k1", "sorted"))
    assert parity(one.outputs, known).max_abs < 1e-4 < parity(two.outputs, known).max_abs


def test_the_benchmark_times_every_budget_and_knows_what_each_can_gain(elastic, tmp_path):
    root = Path(shutil.copytree(elastic, tmp_path / "copy"))
    benchmark.run(make_stage("benchmark", root, "name=tiny", "benchmark.shapes=[[2,4]]", "benchmark.rounds=2"))
    plan = read_plan(root / "exports/tiny")
    assert plan is not None and {*plan["timings"]} == {*read_manifest(root / "exports/tiny")["plans"]}
    plans = ("sorted-k1", "sorted", "sorted-k3")
    one, own, three = (autoplan.bounds_of(root / "exports/tiny", 16, plan)["flops"] for plan in plans)
    assert one > own > three


def test_verify_looks_at_every_budget(elastic, tmp_path):
    found = list(verify(elastic / "exports/tiny", texts=4, threads=1))
    assert all(check.passed for check in found), found
    assert {"fused-k3: self-test of com.microsoft.MoE", "sorted8-k1: parity"} < {check.name for check in found}
    copied = Path(shutil.copytree(elastic / "exports/tiny", tmp_path / "copy"))
    manifest = read_manifest(copied)
    manifest["plans"]["sorted-k1"] |= {key: manifest["plans"]["sorted"][key] for key in ("file", "sha256")}
    write_manifest(copied, manifest)  # a plan that computes another budget than it says
    checks = {check.name: check for check in verify(copied, plans=["sorted-k1"], texts=4, threads=1)}
    assert not checks["sorted-k1: parity"].passed


def test_the_stage_says_which_plans_a_selection_cannot_have(small_teacher, tmp_path, capsys):
    root = make_workspace(tmp_path, small_teacher, selection="threshold")
    export.run(make_stage("export", root, *SETTINGS))
    manifest = read_manifest(root / "exports/tiny")
    assert {*manifest["plans"]} == {"dense", "dense8", "sorted", "sorted8"}
    assert "selection 'threshold'" in manifest["refused"]["fused"]
    assert "no plan fused: fused: com.microsoft.MoE runs the same number" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=r"no plan 'fused': fused: .* the same number of experts"):
        runtime.open_export(root / "exports/tiny", "fused")
    assert all(check.passed for check in verify(root / "exports/tiny", texts=4, threads=1))


# --- what rounding decides ------------------------------------------------------------------------------------------


def test_a_score_at_the_edge_of_the_margin_is_a_near_tie(small_teacher):
    model, spec = carve(small_teacher, selection="threshold")
    assert all((one.margin_B > NEAR_TIE).all() for one in reference(model, samples(), "embedding", spec.pooling))
    alone, router = samples()[:1], moe_layers(model)[0].router  # a text of one token
    seen: list[torch.Tensor] = []
    with observed(model, lambda scores_TE, choice: seen.append(router.ranked(scores_TE))):
        torch_outputs(model, "embedding", alone[0], spec.pooling)
    best = seen[0][0].sort(descending=True).values
    for margin, near_tie in ((best[0] - best[1], True), (best[0] - (best[1] + best[2]) / 2, False)):
        router.margin.copy_(margin)
        assert (reference(model, alone, "embedding", spec.pooling)[0].margin_B < NEAR_TIE).all() == near_tie


def test_where_as_many_are_used_as_may_be_the_next_one_decides(small_teacher):
    model, spec = carve(small_teacher, selection="threshold", max_active=2)
    router = moe_layers(model)[0].router
    router.margin.fill_(1e6)  # everything is within it
    assert all((one.margin_B > NEAR_TIE).all() for one in reference(model, samples(), "embedding", spec.pooling))
    torch.nn.init.zeros_(router.weight)
    router.balance_bias.copy_(torch.tensor([3.0, 1.0, 1.0, 0.0]))
    assert all((one.margin_B < NEAR_TIE).all() for one in reference(model, samples(), "embedding", spec.pooling))


def test_two_lengths_of_one_score_are_a_near_tie(small_teacher):
    model, spec = carve(small_teacher, selection="prefix")
    assert all((one.margin_B > NEAR_TIE).all() for one in reference(model, samples(), "embedding", spec.pooling))
    router = moe_layers(model)[0].router
    torch.nn.init.zeros_(router.weight)
    router.balance_bias.zero_()
    known = reference(model, samples(), "embedding", spec.pooling)
    with pytest.raises(ValueError, match="train the router first"):
        parity(lambda sample: known[0].outputs, known[:1])
