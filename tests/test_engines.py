"""Plans that run in OpenVINO compute what PyTorch does, and say why where they cannot run."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import transformers

from ffn2moe.conversion.settings import Settings
from ffn2moe.conversion.task import request_of
from ffn2moe.dense.load import load_dense
from ffn2moe.onnx import graph as onnx_graph
from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.onnx.parity import random_samples
from ffn2moe.onnx.verify import PlanDiffers, plan_parity, verify
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.planning import plan_file
from ffn2moe.preflight import mixture
from ffn2moe.preflight.case import Case
from ffn2moe.runtime import engines, native
from ffn2moe.runtime.engines import openvino as openvino_engine
from ffn2moe.runtime.export import open_export, open_graphs
from ffn2moe.runtime.native import compiler, selftest
from ffn2moe.runtime.plans import PLANS, is_dense, plans_of, plans_on_request
from tests import test_decoder as decoder
from tests.conftest import make_tiny_bert, make_tiny_llama, make_tokenizer
from tests.mixtures import carve

pytest.importorskip("openvino")
OPENVINO_PLANS = plans_of("embedding", ("openvino",))
NATIVE_PLANS = [plan for plan in OPENVINO_PLANS if PLANS[plan].operator is not None]
TEXTS = ["a first text", "another text that is longer than the first"]
needs_operator = pytest.mark.skipif(not native.is_built(), reason="the operator is not built (make native)")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """One layer: tracing costs time by the layer."""
    return make_tiny_bert(tmp_path_factory.mktemp("small") / "teacher", num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher) -> Path:
    """An export with the plans of both engines."""
    path = tmp_path_factory.mktemp("engines") / "export"
    dense, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    plans = ("dense", "sorted", *OPENVINO_PLANS)
    calibration = random_samples(student, spec, 32, seed=1)
    write_manifest(path, export_model(student, dense, tokenizer, spec, path, plans=plans, calibration=calibration))
    return path


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_every_plan_of_openvino_is_made_and_says_what_it_runs_in(folder):
    manifest = manifest_of(folder)
    made = {*manifest["plans"], *manifest["refused"]}
    assert made == {"dense", "sorted", *OPENVINO_PLANS}
    assert {*manifest["refused"]} == (set() if native.is_built() else {*NATIVE_PLANS})
    entries = manifest["plans"]
    assert {entries[plan]["engine"] for plan in entries if plan.startswith("ov-")} == {"openvino"}
    assert entries["ov-sorted"]["precision"] == openvino_engine.openvino_precision()
    assert entries["ov-dense8"]["precision"] == "int8"


def test_the_graphs_equal_pytorch_in_float32_and_agree_as_they_run(folder):
    entries = manifest_of(folder)["plans"]
    for plan in ("ov-dense", "ov-sorted"):
        assert entries[plan]["parity_max_abs"] < 1e-4
        assert entries[plan].get("agreement", 1) > 0.95
    assert entries["ov-dense8"]["agreement"] > 0.99
    assert entries["ov-dense8s"]["agreement"] > 0.99


def test_plans_of_two_engines_share_a_file(folder):
    entries = manifest_of(folder)["plans"]
    assert entries["ov-sorted"]["file"] == entries["sorted"]["file"]
    assert entries["ov-dense"]["file"] == entries["dense"]["file"]
    assert not (folder / "onnx/ov-sorted.onnx").exists()


def test_verify_passes_on_the_plans_of_openvino(folder):
    plans = [plan for plan in manifest_of(folder)["plans"] if plan != "sorted"]
    failed = [check for check in verify(folder, plans=plans, texts=4, threads=1) if not check.passed]
    assert not failed


def test_the_number_of_threads_changes_no_meaning(folder):
    one, two = (open_export(folder, "ov-sorted", threads, precision="float32") for threads in (1, 2))
    np.testing.assert_allclose(one.encode(TEXTS), two.encode(TEXTS), atol=1e-5)
    expected = open_export(folder, "sorted", 1).encode(TEXTS)
    np.testing.assert_allclose(one.encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("plan", ["ov-dense", "ov-dense8", "ov-sorted"])
def test_a_fixed_shape_gives_the_numbers_of_every_shape(folder, plan):
    free, fixed = (open_export(folder, plan, 1, precision="float32") for _ in range(2))
    fixed.fix([(2, 8), (3, 12)])
    random = np.random.default_rng(0)
    for batch, length in ((2, 8), (3, 12), (2, 7), (3, 11), (5, 3), (1, 30)):
        ids_BL = random.integers(4, 100, (batch, length))
        mask_BL = np.ones_like(ids_BL)
        mask_BL[-1, length // 2 :] = 0
        for one, other in zip(fixed.run(ids_BL, mask_BL), free.run(ids_BL, mask_BL), strict=True):
            assert one.shape == other.shape
            keep = mask_BL.astype(bool) if one.ndim == 3 else slice(None)
            # The weights of 8 bits go through other kernels, which round the activations, too.
            np.testing.assert_allclose(one[keep], other[keep], atol=0.1 if plan == "ov-dense8" else 2e-5)


def test_a_batch_is_filled_up_to_a_fixed_shape_only_where_that_is_near(folder):
    graph = open_graphs([folder / "onnx/dense.onnx"], "ov-dense", threads=1)[0]
    graph.fix([(2, 16), (4, 16)])

    def runs_as(batch: int, length: int) -> tuple[int, ...] | None:
        ids = np.ones((batch, length), dtype=np.int64)
        return graph._fixed_for({"input_ids": ids, "attention_mask": ids})

    assert [runs_as(*shape) for shape in ((2, 16), (2, 13), (4, 16), (3, 16), (4, 15))] == [
        *((2, 16), (2, 16), (4, 16)),
        None,  # (4, 16) would be a third more
        (4, 16),
    ]
    assert [runs_as(*shape) for shape in ((1, 16), (2, 17), (8, 4), (2, 12))] == [None] * 4


def test_other_fixed_shapes_take_the_place_of_those_before(folder):
    graph = open_graphs([folder / "onnx/dense.onnx"], "ov-dense", threads=1)[0]
    ids = np.ones((2, 6), dtype=np.int64)

    def run() -> np.ndarray:
        return graph.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": ids})[0]

    expected = run()
    graph.fix([(2, 6), (1, 1)])
    np.testing.assert_allclose(run(), expected, atol=0.02)
    assert {*graph._compiled} == {(2, 6)}, "what no batch has asked for is not compiled, and takes no memory"
    graph.fix([])
    np.testing.assert_array_equal(run(), expected)
    assert {*graph._compiled} == {None}


def test_plans_are_opened_with_the_shapes_that_they_were_chosen_for(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    row = {"phase": "whole", "threads": 1, "weight": 0.5}
    for second in ("ov-dense", "dense"):
        rows = [row | {"batch": 2, "sequence": 8, "plan": "ov-dense"}, row | {"batch": 8, "sequence": 30}]
        rows[1]["plan"] = second
        plan_file.write(copied, {"default_plan": "ov-dense", "timings": {}, "choices": rows})
        graph = open_export(copied, threads=1)._graph
        opened = graph.opened["ov-dense"] if second == "dense" else graph
        assert opened._fixed == (((2, 8),) if second == "dense" else ((2, 8), (8, 30)))
    assert open_export(copied, "ov-dense", 1)._graph._fixed == ()


def test_threads_share_the_fixed_shapes(folder):
    export = open_export(folder, "ov-dense", 1)
    export.fix([(1, 9), (2, 9)])
    ids = [np.full((1 + index % 2, 9), 5 + index, dtype=np.int64) for index in range(8)]
    expected = [export.run(one, np.ones_like(one))[1] for one in ids]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: export.run(one, np.ones_like(one))[1], ids))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_execution_provider_is_no_matter_of_openvino(folder):
    with pytest.raises(ValueError, match="leave the provider out"):
        open_export(folder, "ov-dense", providers=("CUDAExecutionProvider",))


def test_without_openvino_the_plan_names_the_extra(folder, monkeypatch):
    openvino_engine.import_openvino.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        with pytest.raises(engines.EngineMissing, match=r"pip install \"ffn2moe\[openvino\]\""):
            open_export(folder, "ov-dense")
        assert open_export(folder, "dense", 1).encode(TEXTS).shape[0] == 2
    finally:
        openvino_engine.import_openvino.cache_clear()


def test_without_openvino_a_run_leaves_its_plans_out_and_says_so(teacher, tmp_path, monkeypatch):
    dense, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    asked = request_of(str(teacher), None, Settings(num_experts=4))
    asked = replace(asked, every_plan=True, engines=("onnxruntime", "openvino"))
    by_name = next(plan for plan in plans_on_request("causal") if PLANS[plan].engine == "openvino")
    writer = request_of(str(make_tiny_llama(tmp_path / "llama")), None, Settings(num_experts=4))
    openvino_engine.import_openvino.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        made, *left_out = map(str, mixture.plans(Case(asked)))
        assert "dense8" in made and "ov-" not in made
        assert any("ov-dense8s" in line and "OpenVINO, which is not installed" in line for line in left_out)
        with pytest.raises(engines.EngineMissing):
            list(mixture.plans(Case(replace(writer, more_plans=(by_name,)))))
        manifest = export_model(student, dense, tokenizer, spec, tmp_path / "export", engines=asked.engines)
        assert {"dense", "sorted8"} <= {*manifest["plans"]} and not {*OPENVINO_PLANS} & {*manifest["plans"]}
        assert {*OPENVINO_PLANS} <= {*manifest["refused"]}
        assert "which is not installed" in manifest["refused"]["ov-dense"]
        with pytest.raises(engines.EngineMissing):
            export_model(student, dense, tokenizer, spec, tmp_path / "other", plans=["dense", "ov-dense"])
    finally:
        openvino_engine.import_openvino.cache_clear()


def test_openvino_is_imported_by_its_plans_alone_and_without_its_telemetry(folder):
    script = (
        "import sys, ffn2moe\n"
        f"ffn2moe.open_export({str(folder)!r}, 'dense', 1)\n"
        "assert 'openvino' not in sys.modules\n"
        f"ffn2moe.open_export({str(folder)!r}, 'ov-dense', 1)\n"
        "assert 'openvino' in sys.modules and 'openvino_telemetry' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


def test_a_graph_with_an_operator_that_openvino_lacks_is_refused_with_the_reason(teacher, tmp_path):
    student, _ = carve(teacher)
    fused = onnx_plans.lower(onnx_graph.canonical_graph(student), "fused")
    file = tmp_path / "fused.onnx"
    file.write_bytes(ir.to_proto(fused).SerializeToString())
    with pytest.raises(ValueError, match=r"OpenVINO .* cannot run fused\.onnx"):
        engines.open_graph(file, "openvino", threads=1)


@pytest.mark.parametrize("moment", ["opened", "run"])
def test_a_plan_that_openvino_cannot_run_leaves_the_plans_of_other_engines(teacher, tmp_path, monkeypatch, moment):
    def cannot(self, *given, **options):
        raise self._cannot(RuntimeError("Check failed: no kernel for this"))

    dense, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    if moment == "run":
        monkeypatch.setattr(engines.openvino.OpenVinoGraph, "_compile", cannot)
    else:
        monkeypatch.setattr(engines.openvino.OpenVinoGraph, "__init__", lambda self, *_, **__: cannot(self))
        monkeypatch.setattr(engines.openvino.OpenVinoGraph, "_name", "this graph", raising=False)
    plans = ("dense", "sorted", "ov-dense", "ov-dense8")
    manifest = export_model(student, dense, tokenizer, spec, tmp_path, plans=plans)
    assert set(manifest["plans"]) == {"dense", "sorted"} and set(manifest["refused"]) == {"ov-dense", "ov-dense8"}
    assert "no kernel for this" in manifest["refused"]["ov-dense"]
    assert {file.name for file in (tmp_path / "onnx").iterdir()} == {"dense.onnx", "sorted.onnx"}
    with pytest.raises(engines.EngineRefused, match="no kernel for this"):
        export_model(student, dense, tokenizer, spec, tmp_path / "alone", plans=("ov-dense",))


@pytest.mark.parametrize("wrong", ["fused", "sorted"])
def test_an_operator_that_computes_something_else_is_left_out_and_a_wrong_graph_stops(
    teacher, tmp_path, monkeypatch, wrong
):
    def measured(plan, run, known, *tolerances):
        def off(sample):
            return {name: 1.01 * array for name, array in run(sample).items()}

        return plan_parity(plan, off if plan == wrong else run, known, *tolerances)

    monkeypatch.setattr("ffn2moe.onnx.write.plan_parity", measured)
    dense, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    if wrong == "sorted":
        with pytest.raises(PlanDiffers, match="the plan sorted does not compute what PyTorch does"):
            export_model(student, dense, tokenizer, spec, tmp_path, plans=("dense", "sorted", "fused"))
        return
    manifest = export_model(student, dense, tokenizer, spec, tmp_path, plans=("dense", "sorted", "fused"))
    assert set(manifest["plans"]) == {"dense", "sorted"}
    assert "does not compute what PyTorch does" in manifest["refused"]["fused"]


def test_bytes_that_are_no_graph_are_refused(tmp_path):
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"cannot run broken\.onnx"):
        engines.open_graph(file, "openvino", threads=1)


def test_a_plan_whose_operator_is_not_built_is_refused_with_the_remedy(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "FOLDER", tmp_path / "nothing")
    _, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    manifest = export_model(student, None, tokenizer, spec, tmp_path / "export", plans=("sorted", "ov-native"))
    assert "make native" in manifest["refused"]["ov-native"] and "ov-native" not in manifest["plans"]


@needs_operator
@pytest.mark.parametrize("plan", NATIVE_PLANS)
def test_the_operator_passes_its_test_on_this_machine(plan):
    assert selftest.check_plan(PLANS[plan], "gelu", False, engines.CPU) < selftest.TOLERANCE[PLANS[plan].activations]


@needs_operator
def test_an_operator_that_computes_something_else_is_refused(folder, monkeypatch):
    monkeypatch.setattr(native, "reference", lambda x_TD, *_, **__: x_TD)
    with pytest.raises(RuntimeError, match="computes something else"):
        open_export(folder, "ov-native", 1)


@needs_operator
def test_the_operator_runs_a_mixture_near_pytorch(teacher, tmp_path):
    student, spec = carve(teacher)
    _, tokenizer = load_dense(str(teacher))
    manifest = export_model(student, None, tokenizer, spec, tmp_path, plans=("ov-native8",))
    assert manifest["plans"]["ov-native8"]["agreement"] > 0.95


# --- plans that are asked for ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> tuple:
    """An export of a tiny LLaMA, whose heads share keys, with plans of OpenVINO; and its models."""
    teacher = decoder.language_model("llama")
    student, spec = decoder.carve(copy.deepcopy(teacher), "causal")
    path = tmp_path_factory.mktemp("causal") / "export"
    make_tokenizer(path.parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent)
    more = ("ov-dense", "ov-sorted")
    blocks = ("dense4", "dense8b", "ov-dense4", "ov-dense8b", "ov-native8b", "ov-native4b")
    manifest = export_model(student, teacher, tokenizer, spec, path, plans=("sorted", *blocks), more_plans=more)
    write_manifest(path, manifest)
    return path, teacher, student


@pytest.mark.parametrize("batch", [1, 3])
def test_language_models_decode_in_openvino_as_in_pytorch(language_model, batch):
    path, teacher, student = language_model
    for plan, model in (("ov-dense", teacher), ("ov-sorted", student)):
        export = open_export(path, plan, 1, precision="float32")
        assert decoder.check_decoding(model, export, decoder.PROMPTS[batch], 12) < 1e-4


def test_attention_writes_keys_and_values_in_place_in_openvino(language_model):
    path, *_ = language_model
    graph = open_graphs([path / "onnx/dense.onnx"], "ov-dense", threads=1)[0]
    kinds = [
        node.get_rt_info()["layerType"].astype(str) for node in graph._compiled[None].get_runtime_model().get_ops()
    ]
    layers = len(graph._kept) // 2
    assert kinds.count("ScaledDotProductAttention") == layers, "attention is taken apart, and copies its cache"
    assert kinds.count("MemoryInput") == 2 * layers


def test_texts_that_are_written_in_turns_keep_their_own_cache_in_openvino(language_model):
    path, teacher, _ = language_model
    export = open_export(path, "ov-dense", 1, precision="float32")
    prompts = decoder.PROMPTS[3]
    running = [export.generate_tokens([prompt], max_new_tokens=6, stop_at_end=False) for prompt in prompts]
    tokens_NB = [[int(token) for steps in running for token in next(steps)] for _ in range(6)]
    expected = [decoder.greedy(teacher, prompt, 6)[0] for prompt in prompts]
    assert [list(row) for row in zip(*tokens_NB, strict=True)] == expected


def test_a_language_models_mixture_is_compared_with_dense_plans_of_few_bits_in_both_engines():
    compared = {plan for plan in plans_of("causal", ("onnxruntime", "openvino")) if is_dense(plan)}
    assert {"dense4", "dense8b", "ov-dense4", "ov-dense8b"} <= compared


@pytest.mark.parametrize("bits", ["4", "8b"])
def test_weights_in_blocks_are_the_same_numbers_in_both_engines(language_model, bits):
    path, *_ = language_model
    entries = manifest_of(path)["plans"]
    assert entries[f"ov-dense{bits}"]["file"] == entries[f"dense{bits}"]["file"]
    one, other = (
        open_export(path, plan, 1).logits(decoder.PROMPTS[1][0]) for plan in (f"dense{bits}", f"ov-dense{bits}")
    )
    assert np.linalg.norm(one - other) < 0.03 * np.linalg.norm(one), "activations alone are rounded differently"


def test_queries_keys_and_values_are_one_product_in_blocks(language_model):
    path, *_ = language_model
    nodes = ir.load(path / "onnx/dense4.onnx").graph
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == 1 + 1 + 3 + 1, "attention's inputs and output, the FFN, the logits"


@needs_operator
def test_mixtures_with_all_weights_in_blocks_are_near_pytorch(language_model):
    path, *_ = language_model
    entries = manifest_of(path)["plans"]
    assert entries["ov-native8b"]["agreement"] > 0.98 and entries["ov-native4b"]["agreement"] > 0.7
    assert entries["ov-native8b"]["precision"] == "int8" and entries["ov-native4b"]["precision"] == "int4"


@pytest.mark.parametrize("engines_in_order", [("ov-sorted", "sorted"), ("sorted", "ov-sorted")])
def test_prefill_and_decoding_may_run_in_two_engines(language_model, engines_in_order):
    path, _, student = language_model
    row = {"batch": 1, "sequence": 4, "threads": 1, "weight": 1.0}
    rows = [
        row | {"phase": phase, "plan": plan}
        for phase, plan in zip(("prefill", "decode"), engines_in_order, strict=True)
    ]
    plan_file.write(path, {"default_plan": "sorted", "timings": {}, "choices": rows})
    try:
        export = open_export(path, threads=1, precision="float32")
        assert decoder.check_decoding(student, export, decoder.PROMPTS[1], 6) < 1e-4
    finally:
        (path / "plan.json").unlink()


def test_a_soft_cap_on_attention_is_refused_in_openvino_with_the_reason(tmp_path):
    student, spec = decoder.carve(decoder.language_model("gemma2"), "causal")
    manifest = export_model(student, None, None, spec, tmp_path, plans=(), more_plans=("ov-sorted",))
    assert "soft cap" in manifest["refused"]["ov-sorted"] and not manifest["plans"]


def test_plans_of_few_bits_are_made_for_encoders_that_ask_for_them(teacher, tmp_path):
    dense, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    more = ("dense4", "qmoe8", "qmoe4")
    manifest = export_model(student, dense, tokenizer, spec, tmp_path, plans=("dense",), more_plans=more)
    write_manifest(tmp_path, manifest)
    assert {*manifest["plans"]} == {"dense", *more}
    assert manifest["plans"]["qmoe8"]["agreement"] > 0.98 and manifest["plans"]["dense4"]["agreement"] > 0.8
    for plan in more:
        assert open_export(tmp_path, plan, 1).encode(TEXTS).shape[0] == 2


def test_a_plan_that_the_head_has_not_cannot_be_asked_for(teacher, tmp_path):
    student, spec = carve(teacher)
    with pytest.raises(ValueError, match=r"'sorted' cannot be asked for with .* 'embedding': dense4, dense8b, "):
        export_model(student, None, None, spec, tmp_path, plans=(), more_plans=("sorted",))
