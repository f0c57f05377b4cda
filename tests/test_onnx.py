"""ONNX graphs equal PyTorch at every shape, in every plan, and are the same bytes every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffn2moe.dense.load import load_dense
from ffn2moe.moe.layer import moe_layers
from ffn2moe.onnx import graph as onnx_graph
from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.onnx.parity import Run, Sample, parity, reference, text_samples
from ffn2moe.onnx.verify import Known, plan_parity
from ffn2moe.runtime.engines.onnxruntime import session as open_session
from tests.conftest import make_tiny_bert, make_tokenizer
from tests.mixtures import carve

Runs = dict[str, Run]
HIDDEN, EMBEDDING = onnx_graph.OUTPUTS


def run_of(graph: ir.Model, threads: int = 1) -> Run:
    session = open_session(ir.to_proto(graph).SerializeToString(), threads=threads)
    return lambda sample: dict(
        zip(onnx_graph.OUTPUTS, session.run(list(onnx_graph.OUTPUTS), dict(sample)), strict=True)
    )


def plans_of(model, spec, names=("fused", "sorted", "sorted8"), canonical: ir.Model | None = None) -> Runs:
    canonical = canonical or onnx_graph.canonical_graph(model)
    return {name: run_of(onnx_plans.lower(canonical, name)) for name in names}


def batch_of(random: np.random.Generator, batch: int, sequence: int, vocabulary: int = 100) -> Sample:
    ids = random.integers(5, vocabulary, (batch, sequence))
    length = random.integers(1, sequence + 1, (batch, 1))
    return {"input_ids": ids, "attention_mask": (np.arange(sequence) < length).astype(np.int64)}


@pytest.fixture(scope="module")
def mixture(tiny_teacher):
    return carve(tiny_teacher)


@pytest.fixture(scope="module")
def canonical(mixture) -> ir.Model:
    return onnx_graph.canonical_graph(mixture[0])


@pytest.fixture(scope="module")
def plans(mixture, canonical) -> Runs:
    return plans_of(*mixture, canonical=canonical)


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory) -> Path:
    """One layer: tracing costs time by the layer."""
    return make_tiny_bert(tmp_path_factory.mktemp("small") / "teacher", num_hidden_layers=1)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 5), sequence=st.integers(1, 64), seed=st.integers(0, 2**16))
def test_the_float_plans_equal_pytorch_at_any_shape(mixture, plans, batch, sequence, seed):
    model, spec = mixture
    batches = [batch_of(np.random.default_rng(seed), batch, sequence)]
    known = Known.of(spec, model, batches)
    for plan in ("fused", "sorted"):
        plan_parity(plan, plans[plan], known)  # raises where it is too far


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 1), (1, 64), (3, 64)])
def test_the_edges_of_the_shapes_work_in_every_plan(mixture, plans, batch, sequence):
    for plan, run in plans.items():
        found = run(batch_of(np.random.default_rng(0), batch, sequence))
        assert found[HIDDEN].shape == (batch, sequence, mixture[1].width)
        np.testing.assert_allclose(np.linalg.norm(found[EMBEDDING], axis=1), 1, atol=1e-5, err_msg=plan)


def test_the_dense_graph_equals_the_teacher(tiny_teacher):
    teacher, _ = load_dense(str(tiny_teacher))
    run = run_of(onnx_graph.canonical_graph(teacher))
    random = np.random.default_rng(1)
    for batch, sequence in ((1, 1), (2, 7), (4, 33), (3, 64)):
        known = reference(teacher, [batch_of(random, batch, sequence)], "embedding")
        assert parity(run, known).max_abs < 1e-5


def test_padding_does_not_change_an_embedding(plans):
    ids = batch_of(np.random.default_rng(2), 1, 9)["input_ids"]
    short = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    padded = {name: np.pad(array, ((0, 0), (0, 20))) for name, array in short.items()}
    np.testing.assert_allclose(plans["sorted"](padded)[EMBEDDING], plans["sorted"](short)[EMBEDDING], atol=1e-5)


@pytest.mark.parametrize("num_active", [1, 3])
def test_any_number_of_chosen_experts_is_exported(small_teacher, num_active):
    model, spec = carve(small_teacher, num_active=num_active)
    batches = [batch_of(np.random.default_rng(3), 3, 20)]
    known = Known.of(spec, model, batches)
    for plan, run in plans_of(model, spec, ("fused", "sorted")).items():
        plan_parity(plan, run, known)


def test_all_experts_chosen_give_the_teachers_numbers(small_teacher):
    teacher, _ = load_dense(str(small_teacher))
    model, spec = carve(small_teacher, num_active=4, output_scale=1.0)
    known = reference(teacher, [batch_of(np.random.default_rng(4), 2, 30)], "embedding")
    assert parity(plans_of(model, spec, ("sorted",))["sorted"], known).max_abs < 1e-5


def test_an_expert_that_no_token_chooses_is_no_problem(small_teacher):
    model, spec = carve(small_teacher)
    for moe in moe_layers(model):
        moe.router.balance_bias[0] = -1000  # never chosen
        moe.router.balance_bias[1] = 1000  # always
    batches = [batch_of(np.random.default_rng(5), 2, 12)]
    known = Known.of(spec, model, batches)
    runs = plans_of(model, spec)
    for plan in ("fused", "sorted"):
        plan_parity(plan, runs[plan], known)
    assert np.isfinite(runs["sorted8"](batches[0])[EMBEDDING]).all()


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_every_activation_is_exported(tmp_path, activation):
    model, spec = carve(make_tiny_bert(tmp_path / "teacher", hidden_act=activation, num_hidden_layers=1))
    known = Known.of(spec, model, [batch_of(np.random.default_rng(6), 2, 15)])
    for plan, run in plans_of(model, spec, ("fused", "sorted")).items():
        plan_parity(plan, run, known)


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_encoders_of_other_shapes_are_exported(tmp_path, family):
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    make_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=200, max_position_embeddings=70, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model, spec = carve(tmp_path)
    random = np.random.default_rng(11)
    known = Known.of(spec, model, [batch_of(random, batch, sequence) for batch, sequence in ((1, 1), (3, 50))])
    for plan, run in plans_of(model, spec, ("fused", "sorted")).items():
        plan_parity(plan, run, known)


def test_the_first_token_is_the_embedding_where_the_spec_says_cls(small_teacher):
    model, spec = carve(small_teacher, pooling="cls")
    found = plans_of(model, spec, ("sorted",))["sorted"](batch_of(np.random.default_rng(7), 2, 6))
    first = found[HIDDEN][:, 0] / np.linalg.norm(found[HIDDEN][:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(found[EMBEDDING], first, atol=1e-5)


def test_a_plan_gives_the_same_numbers_on_more_than_one_thread(mixture, canonical, plans):
    sample = batch_of(np.random.default_rng(8), 8, 64)
    two = run_of(onnx_plans.lower(canonical, "sorted"), threads=2)
    expected = plans["sorted"](sample)[HIDDEN]
    for _ in range(20):
        np.testing.assert_allclose(two(sample)[HIDDEN], expected, atol=1e-5)


def test_int8_embeddings_point_the_same_way(mixture, plans):
    sample = batch_of(np.random.default_rng(9), 8, 40)
    cosine = (plans["sorted8"](sample)[EMBEDDING] * plans["sorted"](sample)[EMBEDDING]).sum(1)
    assert cosine.mean() > 0.95


def test_there_is_one_moe_node_a_layer_and_none_in_the_sorted_plan(mixture, canonical):
    spec = mixture[1]
    operators = [node.op_type for node in canonical.graph]
    assert operators.count("Mixture") == spec.num_layers
    assert operators.count("Attention") == spec.num_layers and "Transpose" not in operators
    fused = [node.op_type for node in onnx_plans.lower(canonical, "fused").graph]
    assert fused.count("MoE") == spec.num_layers and "Mixture" not in fused
    lowered = onnx_plans.lower(canonical, "sorted")
    assert {node.domain for node in lowered.graph} == {""}
    assert [node.op_type for node in canonical.graph] == operators, "lowering changed the canonical graph"


def test_all_linear_maps_but_the_router_are_int8(mixture, canonical):
    lowered = onnx_plans.lower(canonical, "sorted8")
    left = [node for node in lowered.graph if node.op_type in ("Gemm", "MatMul")]
    assert len(left) == mixture[1].num_layers
    assert all(node.name.endswith(".router") for node in left)


def test_exporting_leaves_the_model_as_it_was(small_teacher):
    model, _ = carve(small_teacher)
    before = {name: id(module) for name, module in model.named_modules()}
    model.train()
    onnx_graph.canonical_graph(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.training


def test_two_exports_are_the_same_bytes_in_other_folders_and_processes(tiny_teacher, canonical, mixture, tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from ffn2moe.onnx import graph as onnx_graph, lower as onnx_plans\n"
        "from tests.mixtures import carve\n"
        "model, spec = carve(Path(sys.argv[1]))\n"
        "canonical = onnx_graph.canonical_graph(model)\n"
        "for plan in ('fused', 'sorted', 'sorted8'):\n"
        "    onnx_graph.save_graph(onnx_plans.lower(canonical, plan), plan + '.onnx')\n"
    )
    root = Path(__file__).parent.parent
    environment = {"PYTHONPATH": str(root), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(tiny_teacher)], cwd=tmp_path, env=environment, check=True)
    for plan in ("fused", "sorted", "sorted8"):
        onnx_graph.save_graph(onnx_plans.lower(canonical, plan), tmp_path / "here.onnx")
        here, there = (tmp_path / "here.onnx").read_bytes(), (tmp_path / f"{plan}.onnx").read_bytes()
        assert here == there, plan
        assert str(root).encode() not in here and b"stack_trace" not in here


def test_routing_that_rounding_decides_is_refused_with_the_remedy(small_teacher):
    model, _ = carve(small_teacher)
    for moe in moe_layers(model):
        torch.nn.init.zeros_(moe.router.weight)
        moe.router.balance_bias.zero_()
    known = reference(model, [batch_of(np.random.default_rng(10), 2, 5)], "embedding")
    with pytest.raises(ValueError, match="train the router first"):
        parity(lambda sample: known[0].outputs, known)


def test_a_text_whose_output_rounding_alone_moves_is_left_out_and_no_other_one(small_teacher):
    model, _ = carve(small_teacher)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 1000.0  # LayerNorm divides by what is left beside this constant
    (known,) = reference(model, list(text_samples([[5, 7, 6], [5, 8, 6]], "embedding", 0)), "embedding")
    moved_B = (known.sample["input_ids"] == 7).any(1)
    assert moved_B.tolist().count(True) == 1
    assert (known.margin_B[moved_B] == 0).all() and (known.margin_B[~moved_B] > 0).all()
    found = parity(lambda sample: known.outputs, [known])
    assert (found.rows, found.near_ties) == (1, 1)


def test_a_difference_above_the_tolerance_is_an_error(mixture, plans):
    model, spec = mixture
    known = Known.of(spec, model, list(text_samples([[5, 6, 7]] * 4, "embedding", 0)))

    def off_by(amount: float) -> Run:
        def run(sample: Sample):
            found = plans["sorted"](sample)
            return found | {HIDDEN: found[HIDDEN] + amount}

        return run

    plan_parity("sorted", off_by(0), known)
    with pytest.raises(
        ValueError, match=r"sorted does not compute .* its last_hidden_state differs by 1\.00e-03 where"
    ):
        plan_parity("sorted", off_by(1e-3), known)
    with pytest.raises(ValueError, match="last_hidden_state differs by nan where"):
        plan_parity("sorted", off_by(np.nan), known)


@pytest.mark.parametrize("where", [slice(None), slice(0, 1)], ids=["all numbers are large", "one of a vector is"])
def test_the_bound_is_a_share_of_what_the_model_gives(small_teacher, where):
    model, spec = carve(small_teacher)
    with torch.no_grad():
        norm = model.encoder.layer[-1].output.LayerNorm
        norm.weight[where] *= 1000
        norm.bias[where] *= 1000
    known = Known.of(spec, model, list(text_samples([[5, 6, 7], [8, 9]] * 8, "embedding", 0)))
    exact = plans_of(model, spec, ("sorted",))["sorted"]

    def noisy(share: float) -> Run:
        def run(sample: Sample):
            found = dict(exact(sample))
            largest = np.abs(found[HIDDEN]).max(axis=-1, keepdims=True)
            return found | {HIDDEN: found[HIDDEN] + share * largest}

        return run

    largest, found = plan_parity("sorted", noisy(5e-5), known)  # what float32 does, a thousand times as large
    assert largest > 1e-2 and found.gaps[HIDDEN].share < 1e-4 and found.gaps[EMBEDDING].scale == 1
    with pytest.raises(ValueError, match="last_hidden_state differs"):
        plan_parity("sorted", noisy(2e-4), known)


def test_a_graph_that_sends_tokens_to_other_experts_is_an_error(small_teacher):
    model, spec = carve(small_teacher)
    known = Known.of(spec, model, list(text_samples([[5, 6, 7], [8, 9]] * 8, "embedding", 0)))
    with torch.no_grad():
        weight = moe_layers(model)[0].router.weight
        weight.copy_(weight.flip(0))
    with pytest.raises(ValueError, match="the plan sorted does not compute what PyTorch does"):
        plan_parity("sorted", plans_of(model, spec, ("sorted",))["sorted"], known)


def test_a_causal_model_is_refused_with_the_reason(tiny_teacher_gated):
    model, _ = load_dense(str(tiny_teacher_gated))
    with pytest.raises(ValueError, match="makes no sentence embeddings"):
        onnx_graph.canonical_graph(model)
