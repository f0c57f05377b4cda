"""Static int8 measures ranges on real tokens, stays near the model, and computes the same without VNNI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ffn2moe.dense.load import load_dense
from ffn2moe.onnx.editor import constant_of
from ffn2moe.onnx.graph import canonical_graph
from ffn2moe.onnx.lower import lower
from ffn2moe.onnx.parity import random_samples
from ffn2moe.onnx.static import MOST_ROWS, RANGES, measure_ranges
from ffn2moe.onnx.write import export_model
from ffn2moe.runtime.engines import installed_engines
from ffn2moe.runtime.engines.openvino import OpenVinoGraph
from tests.conftest import make_tiny_bert
from tests.mixtures import carve

PLAN = "ov-dense8s"
needs_openvino = pytest.mark.skipif("openvino" not in installed_engines(), reason="OpenVINO is not installed")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("small") / "teacher", num_hidden_layers=1)


@pytest.fixture(scope="module")
def samples(teacher) -> list[dict[str, np.ndarray]]:
    return random_samples(*carve(teacher), 32)


@pytest.fixture
def dense(teacher) -> ir.Model:
    return canonical_graph(load_dense(str(teacher))[0])


def ranges_of(graph: ir.Model) -> list[tuple[float, float]]:
    return list(graph.graph.meta[RANGES].values())


def test_padding_and_texts_beyond_the_first_widen_no_range(dense, samples):
    measure_ranges(dense, samples, dense)
    before = ranges_of(dense)
    assert before and all(low < high for low, high in before)
    again = dense.clone()
    padded = [{name: np.pad(array, ((0, 0), (0, 9))) for name, array in sample.items()} for sample in samples]
    measure_ranges(again, padded, again)
    np.testing.assert_allclose(ranges_of(again), before, atol=1e-5)
    full = [{name: np.repeat(samples[0][name][:1], MOST_ROWS, axis=0) for name in samples[0]}]
    once, more = dense.clone(), dense.clone()
    measure_ranges(once, full, once)
    measure_ranges(more, [*full, *samples], more)
    assert ranges_of(once) == ranges_of(more)


def test_every_linear_map_is_a_product_of_bytes_and_weights_have_seven_bits(dense, samples):
    measure_ranges(dense, samples, dense)
    graph = lower(dense, PLAN).graph
    products = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == len([node for node in dense.graph if node.op_type == "Gemm"])
    for node in products:
        x, weight = (value.producer() for value in node.inputs)
        assert [x.op_type, weight.op_type] == ["DequantizeLinear"] * 2
        assert constant_of(x.inputs[2]).dtype == np.uint8
        assert np.abs(constant_of(weight.inputs[0]).astype(int)).max() == 63
    inputs = {node.inputs[0] for node in products}
    assert len(inputs) < len(products), "queries, keys and values read one rounded input"


def test_without_calibration_texts_the_plan_is_refused_with_the_reason_and_others_are_made(teacher, tmp_path):
    dense, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    manifest = export_model(student, dense, tokenizer, spec, tmp_path / "export", plans=("dense", PLAN))
    assert set(manifest["plans"]) == {"dense"}
    assert "measured on calibration texts, and it got none" in manifest["refused"][PLAN]


@needs_openvino
def test_the_products_are_of_bytes_where_openvino_runs_them_and_the_rest_in_its_own_precision(dense, samples):
    measure_ranges(dense, samples, dense)
    graph = OpenVinoGraph(ir.to_proto(lower(dense, PLAN)).SerializeToString(), threads=1)
    assert graph.precision == OpenVinoGraph(ir.to_proto(dense).SerializeToString(), threads=1).precision
    found = [node.get_rt_info() for node in graph._compiled[None].get_runtime_model().get_ordered_ops()]
    products = [info for info in found if str(info["layerType"].value).startswith("FullyConnected")]
    assert products and {str(info["runtimePrecision"].value) for info in products} <= {"u8", "i8"}


SATURATES = """
import numpy as np, onnx_ir as ir, sys
from ffn2moe.onnx.editor import Editor
from ffn2moe.onnx.static import RANGES, quantise_statically
from ffn2moe.runtime.engines.openvino import OpenVinoGraph
from ffn2moe.runtime.plans import plan_of

x = ir.val("x", ir.DataType.FLOAT, ["tokens", 64])
model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}), ir_version=10)
editor = Editor(model)
y = editor.node("MatMul", x, editor.constant("linear.weight", np.ones((64, 64), np.float32)))
y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["tokens", 64])
model.graph.outputs.append(y)
model.graph.meta[RANGES] = {"linear": (0.0, 1.0)}
quantise_statically(model, plan_of("ov-dense8s"))
graph = OpenVinoGraph(ir.to_proto(model).SerializeToString(), threads=1, precision="float32")
for tokens in (1, 40):
    np.testing.assert_allclose(graph.run(["y"], {"x": np.ones((tokens, 64), np.float32)})[0], 64, rtol=1e-5)
"""


@needs_openvino
@pytest.mark.parametrize("processor", ["AVX2", "AVX512_CORE", "ALL"])
def test_the_largest_numbers_do_not_saturate_on_a_processor_without_vnni(processor):
    """With 127 in place of 63 the first two give half of the sum."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": processor}
    subprocess.run([sys.executable, "-c", SATURATES], check=True, env=environment, timeout=120)
