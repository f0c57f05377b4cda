"""The fused experts operator against its numpy reference, on every path that this machine can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.onnx.editor import Editor
from ffn2moe.onnx.names import PARTS
from ffn2moe.runtime import native
from ffn2moe.runtime.engines.openvino import OpenVinoGraph
from ffn2moe.runtime.native import PATHS, WEIGHTS

NUMBERS = [(weights, activations) for weights in WEIGHTS for activations in native.ACTIVATIONS_OF[weights]]
TOLERANCE = {"bf16": 0.005, "int16": 3e-4, "int8": 0.015}  # of the output's norm; weights are rounded in the reference


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator as built, or built here."""
    if native.is_built():
        return native.library()
    try:
        return native.build(tmp_path_factory.mktemp("native"))
    except FileNotFoundError as why:
        pytest.skip(str(why))


def compiled(library: Path, model: bytes, threads: int) -> Any:
    import openvino as ov

    core = ov.Core()
    core.add_extension(library)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()


class Layer:
    """A compiled model of one node with random experts, router, output bias and norms."""

    def __init__(
        self,
        library: Path,
        *,
        weights: str = "int8",
        activations: str | None = None,
        activation: str = "gelu",
        gated: bool = False,
        biased: bool = True,
        E: int = 4,
        M: int = 37,
        D: int = 45,
        gate: str = "unit",
        norm_in: str | None = "layer",
        norm_out: str | None = "layer",
        added: str = "x",
        half: bool = False,
        K: int = 2,
        threads: int = 1,
        parts: dict[str, Any] | None = None,
        routed: dict[str, Any] | None = None,
    ) -> None:
        numbers = np.random.default_rng(0)
        self.width, self.half = D, half
        self.parts: dict[str, Any] = {
            "w_in_EMD": numbers.standard_normal((E, M, D)).astype(np.float32) / np.float32(D**0.5),
            "w_out_EDM": numbers.standard_normal((E, D, M)).astype(np.float32) / np.float32(M**0.5),
            "b_in_EM": numbers.standard_normal((E, M)).astype(np.float32) if biased else None,
            "w_gate_EMD": numbers.standard_normal((E, M, D)).astype(np.float32) / np.float32(D**0.5) if gated else None,
            "b_gate_EM": numbers.standard_normal((E, M)).astype(np.float32) if gated and biased else None,
        } | (parts or {})
        self.packed = native.pack_experts(weights, **self.parts)
        self.rounded = {
            name: native.round_weights(weights, part) if part is not None and name.startswith("w_") else part
            for name, part in self.parts.items()
        }
        numbers = np.random.default_rng(2)

        def norm(kind: str | None) -> native.Norm | None:
            scale_D, bias_D = numbers.uniform(0.5, 1.5, D), numbers.standard_normal(D)
            return kind and native.Norm(kind, scale_D, bias_D if kind == "layer" else None, 1e-3)

        self.routed: dict[str, Any] = {
            "router_ED": numbers.standard_normal((E, D)).astype(np.float32),
            "router_bias_E": numbers.standard_normal(E).astype(np.float32),
            "choice_bias_E": 0.3 * numbers.standard_normal(E).astype(np.float32),
            "b_out_D": numbers.standard_normal(D).astype(np.float32),
            "norm_in": norm(norm_in),
            "norm_out": norm(norm_out),
        } | (routed or {})
        self.how: dict[str, Any] = {"num_active": K, "gate": gate, "added": added, "activation": activation}
        norms = {name: self.routed[name] for name in ("norm_in", "norm_out")}
        self.described = native.experts_attributes(
            D, M, gated=gated, activation=activation, weights=weights, activations=activations
        ) | native.frame_attributes(E, K, gate, added=added, output="bf16" if half else "f32", **norms)
        self.request = compiled(library, self.model(), threads)

    def model(self) -> bytes:
        return one_node(self.packed, native.frame(**self.routed), self.width, self.described, half=self.half)

    def __call__(self, given_TD: np.ndarray, residual_TD: np.ndarray) -> np.ndarray:
        # Not infer(): with one thread, that of openvino 2026.4 loses the errors of any node.
        self.request.start_async([given_TD, residual_TD] if self.routed["norm_in"] else [given_TD])
        self.request.wait()
        return np.array(self.request.get_output_tensor().data)

    def expected(self, given_TD: np.ndarray, residual_TD: np.ndarray, *, rounded: bool = True) -> np.ndarray:
        residual = residual_TD if self.routed["norm_in"] else None
        experts = self.rounded if rounded else self.parts
        return native.reference(given_TD, residual_TD=residual, **self.routed, **self.how, **experts)

    def tokens(self, T: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.random.default_rng(1)
        given_TD, residual_TD = numbers.standard_normal((2, T, self.width)).astype(np.float32)
        return given_TD, residual_TD


def experts_alone(library: Path, **described: Any) -> Layer:
    """A layer without norms, residual and output bias: nothing hides what its experts give."""
    D = described.get("D", 45)
    alone: dict[str, Any] = {"norm_in": None, "norm_out": None, "added": "none", "gate": "softmax_topk"}
    routed = {"b_out_D": np.zeros(D, np.float32)} | described.pop("routed", {})
    return Layer(library, **alone | described, routed=routed)


def one_node(
    packed: np.ndarray, frame: np.ndarray, width: int, attributes: dict[str, Any], *, half: bool = False
) -> bytes:
    """A model of one node; `half`: it is given bfloat16, and gives it."""
    tokens = ["given", "residual"] if attributes["norm_in"] != "none" else ["given"]
    short = [f"{name} in bfloat16" if half else name for name in tokens]
    nodes = [
        helper.make_node("Cast", [name], [cast], to=TensorProto.BFLOAT16)
        for name, cast in zip(tokens, short, strict=True)
        if half
    ]
    inputs = [short[0], "experts", "frame", *short[1:]]
    out = "y in bfloat16" if half else "y"
    nodes.append(helper.make_node(native.OP_TYPE, inputs, [out], domain=native.DOMAIN, **attributes))
    if half:
        nodes.append(helper.make_node("Cast", [out], ["y"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "one_node",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", "width"]) for name in tokens],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", width])],
        [numpy_helper.from_array(packed, "experts"), numpy_helper.from_array(frame, "frame")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(native.DOMAIN, native.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def difference(y: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path of the kernels, forced; skipped where this processor has not got it."""
    monkeypatch.setenv("FFN2MOE_NATIVE", request.param)
    try:
        experts_alone(library, D=16, M=16)
    except RuntimeError as error:
        assert "is not a path of this processor" in str(error)
        pytest.skip(f"this processor has no path {request.param}")
    return request.param


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
@pytest.mark.parametrize(
    ("activation", "gated", "biased"),
    [
        ("gelu", False, True),
        ("gelu_tanh", True, True),
        ("quick_gelu", False, True),
        ("relu", False, False),
        ("silu", True, False),
    ],
)
def test_every_path_computes_the_reference(
    library: Path, path: str, weights: str, activations: str, activation: str, gated: bool, biased: bool
) -> None:
    numbers = {"weights": weights, "activations": activations}
    layer = experts_alone(library, **numbers, activation=activation, gated=gated, biased=biased)
    tokens = layer.tokens(53)
    assert difference(layer(*tokens), layer.expected(*tokens)) < TOLERANCE[activations]


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_a_path_computes_widths_that_fill_its_tiles(library: Path, path: str, weights: str, activations: str) -> None:
    layer = experts_alone(library, weights=weights, activations=activations, D=128, M=64)
    tokens = layer.tokens(130)
    assert difference(layer(*tokens), layer.expected(*tokens)) < TOLERANCE[activations]


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_threads_and_company_do_not_change_a_bit(library: Path, path: str, weights: str, activations: str) -> None:
    one, two = (
        experts_alone(library, weights=weights, activations=activations, gated=True, D=64, M=48, threads=threads)
        for threads in (1, 2)
    )
    given_TD, residual_TD = one.tokens(600)
    y_TD = one(given_TD, residual_TD)
    assert np.array_equal(y_TD, two(given_TD, residual_TD))
    for part in (slice(0, 1), slice(5, 22), slice(100, 400)):  # few tokens are computed in another order
        for layer in (one, two):
            assert np.array_equal(y_TD[part], layer(given_TD[part], residual_TD[part]))


def test_no_token_and_one_token(library: Path, path: str) -> None:
    layer = experts_alone(library)
    for count in (1, 0, 1):
        tokens = layer.tokens(count)
        y_TD = layer(*tokens)
        assert y_TD.shape == (count, layer.width)
        assert count == 0 or difference(y_TD, layer.expected(*tokens)) < TOLERANCE["int16"]


def test_tokens_may_all_choose_one_expert(library: Path, path: str) -> None:
    layer = experts_alone(library, K=1, routed={"choice_bias_E": np.array([0, 0, 1e3, 0], np.float32)})
    tokens = layer.tokens(40)
    assert difference(layer(*tokens), layer.expected(*tokens)) < TOLERANCE["int16"]


def test_a_pair_of_gate_0_is_not_computed(library: Path, path: str) -> None:
    """Its expert would give infinity, and a token without pairs is exactly 0."""
    infinite_EMD = np.random.default_rng(0).standard_normal((2, 37, 45)).astype(np.float32)
    infinite_EMD[1] *= 1e30
    infinite_EDM = infinite_EMD.transpose(0, 2, 1).copy()
    parts = {"w_in_EMD": infinite_EMD, "w_out_EDM": infinite_EDM}
    for biases_E, gate, pairs in (([0, -1e3], "softmax_topk", 1), ([-1e3, -1e3], "sigmoid", 0)):
        routed = {"router_bias_E": np.array(biases_E, np.float32), "choice_bias_E": np.zeros(2, np.float32)}
        layer = experts_alone(library, E=2, gate=gate, parts=parts, routed=routed, activation="relu")
        tokens = layer.tokens(20)
        y_TD = layer(*tokens)
        assert np.isfinite(y_TD).all()
        if pairs:
            assert difference(y_TD, layer.expected(*tokens)) < TOLERANCE["int16"]
        else:
            assert (y_TD == 0).all()


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_nan_and_infinity_stay_in_their_token(library: Path, path: str, weights: str, activations: str) -> None:
    layer = experts_alone(library, weights=weights, activations=activations)
    given_TD, residual_TD = layer.tokens(20)
    expected = layer(given_TD, residual_TD)
    given_TD[4, 7], given_TD[11, 0] = np.nan, np.inf
    y_TD = layer(given_TD, residual_TD)
    assert np.isnan(y_TD[4]).all()
    assert not np.isfinite(y_TD[11]).all()
    others = np.delete(np.arange(20), [4, 11])
    assert np.array_equal(y_TD[others], expected[others])


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_a_column_of_heavy_activations_costs_precision_of_8_bits_alone(
    library: Path, path: str, weights: str, activations: str
) -> None:
    layer = experts_alone(library, weights=weights, activations=activations, D=128, M=64)
    given_TD, residual_TD = layer.tokens(64)
    given_TD[:, 3] *= 30
    exact = layer.expected(given_TD, residual_TD, rounded=False)
    tolerance = {"bf16": 0.01, "int8": 0.015, "int4": 0.2}[weights] + (0.07 if activations == "int8" else 0)
    assert difference(layer(given_TD, residual_TD), exact) < tolerance


def test_tokens_of_another_width_are_refused(library: Path) -> None:
    layer = Layer(library)
    given_TD, residual_TD = layer.tokens(3)
    with pytest.raises(RuntimeError, match="given has shape"):
        layer(given_TD[:, 1:], residual_TD[:, 1:])


def test_an_export_with_the_operator_of_an_older_version_is_refused_by_name(library: Path, tmp_path: Path) -> None:
    model = onnx.load_from_string(Layer(library).model())
    model.graph.node[0].op_type = "Experts"
    onnx.save(model, tmp_path / "ov-native8.onnx")
    with pytest.raises(
        ValueError, match=r"ov-native8\.onnx needs the operator ffn2moe\.Experts: ffn2moe 0\.1\.0 wrote it"
    ):
        OpenVinoGraph(tmp_path / "ov-native8.onnx", threads=1, precision="float32", extension=library)


def test_a_path_that_is_not_known_is_refused_with_those_that_are(library: Path) -> None:
    """In a process of its own: the variable is read when a model is loaded."""
    code = (
        "import sys; from pathlib import Path; from tests.test_native import Layer\n"
        "try: Layer(Path(sys.argv[1]))\n"
        "except RuntimeError as error: print(error)"
    )
    environment = os.environ | {"FFN2MOE_NATIVE": "abacus"}
    command = [sys.executable, "-c", code, str(library)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "FFN2MOE_NATIVE=abacus is not a path of this processor; it has " in said and "plain" in said


@pytest.mark.parametrize("gate", ["unit", "softmax", "softmax_topk", "sigmoid"])
def test_every_gate_is_that_of_the_reference(library: Path, path: str, gate: str) -> None:
    layer = Layer(library, gate=gate, E=11, K=3)
    tokens = layer.tokens(53)
    assert difference(layer(*tokens), layer.expected(*tokens)) < TOLERANCE["int16"]


@pytest.mark.parametrize(
    ("norm_in", "norm_out", "added"),
    [(None, None, "none"), (None, "layer", "x"), (None, "rms", "x"), ("layer", None, "sum"), ("rms", "rms", "x")],
)
def test_norms_and_residuals_are_those_of_the_reference(
    library: Path, path: str, norm_in: str | None, norm_out: str | None, added: str
) -> None:
    layer = Layer(library, norm_in=norm_in, norm_out=norm_out, added=added, gated=True, activation="silu")
    tokens = layer.tokens(21)
    assert difference(layer(*tokens), layer.expected(*tokens)) < TOLERANCE["int16"]


def test_the_norms_of_the_reference_are_those_of_pytorch() -> None:
    numbers = np.random.default_rng(0)
    x_TD, scale_D, bias_D = numbers.standard_normal((5, 8)), numbers.standard_normal(8), numbers.standard_normal(8)
    x, scale, bias = (torch.from_numpy(array) for array in (x_TD, scale_D, bias_D))
    ours = native.Norm("layer", scale_D, bias_D, 1e-3)(x_TD)
    np.testing.assert_allclose(ours, F.layer_norm(x, (8,), scale, bias, 1e-3).numpy())
    np.testing.assert_allclose(native.Norm("rms", scale_D, None, 1e-3)(x_TD), F.rms_norm(x, (8,), scale, 1e-3).numpy())


def test_a_layer_may_be_given_bfloat16_and_give_it(library: Path, path: str) -> None:
    layer = Layer(library, half=True)
    given_TD, residual_TD = layer.tokens(40)
    rounded = [native.round_weights("bf16", array[None])[0].astype(np.float32) for array in (given_TD, residual_TD)]
    y_TD = layer(given_TD, residual_TD)
    assert difference(y_TD, layer.expected(*rounded)) < 0.003
    assert np.array_equal(native.round_weights("bf16", y_TD[None])[0], y_TD)


def test_of_equal_scores_the_first_experts_are_chosen(library: Path, path: str) -> None:
    layer = Layer(library, norm_in=None, norm_out=None, added="none")
    layer.routed |= {name: 0 * layer.routed[name] for name in ("router_ED", "router_bias_E", "choice_bias_E")}
    layer.request = compiled(library, layer.model(), 1)
    given_TD, residual_TD = layer.tokens(20)
    chosen_TK = np.tile([0, 1], (20, 1))
    expected = native.experts_reference(given_TD, chosen_TK, np.ones((20, 2)), activation="gelu", **layer.rounded)
    assert difference(layer(given_TD, residual_TD), expected + layer.routed["b_out_D"]) < TOLERANCE["int16"]


@pytest.mark.parametrize("half", [False, True])
def test_threads_and_company_do_not_change_a_bit_of_norms_and_router(library: Path, path: str, half: bool) -> None:
    one, two = (Layer(library, D=64, M=48, half=half, threads=threads) for threads in (1, 2))
    given_TD, residual_TD = one.tokens(1200)
    y_TD = one(given_TD, residual_TD)
    assert np.array_equal(y_TD, two(given_TD, residual_TD))
    for part in (slice(0, 0), slice(0, 1), slice(5, 22), slice(100, 400)):
        for layer in (one, two):
            assert np.array_equal(y_TD[part], layer(given_TD[part], residual_TD[part]))


def test_nan_stays_in_its_token_of_norms_and_router(library: Path, path: str) -> None:
    layer = Layer(library)
    given_TD, residual_TD = layer.tokens(20)
    expected = layer(given_TD, residual_TD)
    given_TD[4, 7], residual_TD[11, 0] = np.nan, np.inf
    y_TD = layer(given_TD, residual_TD)
    assert np.isnan(y_TD[[4, 11]]).all()
    others = np.delete(np.arange(20), [4, 11])
    assert np.array_equal(y_TD[others], expected[others])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"expert_width": 999}, "pack them by ffn2moe.runtime.native.pack_experts"),
        ({"activation": "swish"}, "'swish' is not one of gelu"),
        ({"weights": "int2"}, "'int2' is not one of bf16, int8, int4"),
        ({"activations": "bf16"}, "activations 'bf16' do not go with weights 'int8': int16 and int8 do"),
        ({"width": 0}, "width and expert_width must be 1 to"),
        ({"gate": "hard"}, "gate 'hard' is not one of unit, softmax, softmax_topk, sigmoid"),
        ({"norm_out": "batch"}, "norm_out 'batch' is not one of none, layer, rms"),
        ({"norm_out": "none"}, "make it by ffn2moe.runtime.native.frame"),
        ({"norm_in": "none"}, "takes given, experts, frame; 4 inputs were given"),
        ({"num_active": 5}, "num_active must be 1 to the number of experts, 4, not 5"),
        ({"num_experts": 3}, "num_experts is 3, but experts has shape"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(library: Path, wrong: dict[str, Any], message: str) -> None:
    layer = Layer(library)
    model = onnx.load_from_string(layer.model())
    for attribute in model.graph.node[0].attribute:
        if attribute.name in wrong:
            attribute.CopyFrom(helper.make_attribute(attribute.name, wrong[attribute.name]))
    with pytest.raises(RuntimeError, match=message):
        compiled(library, model.SerializeToString(), 1)


def test_a_residual_of_other_tokens_is_refused(library: Path) -> None:
    layer = Layer(library)
    given_TD, residual_TD = layer.tokens(3)
    with pytest.raises(RuntimeError, match="must have the same shape"):
        layer(given_TD, residual_TD[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_active": 5}, "num_active must be 1 to the number of experts"),
        ({"added": "sum", "norm_in": None}, "come with norm_in"),
    ],
)
def test_what_the_operator_has_not_is_not_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.frame_attributes(**{"num_experts": 4, "num_active": 2, "gate": "unit"} | change)


def test_a_frame_whose_parts_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"b_out has shape \[3\], but the router, \[2, 4\], asks for \[4\]"):
        native.frame(np.ones((2, 4)), np.ones(2), b_out_D=np.ones(3))


@pytest.mark.parametrize("order", ["norm after", "norm before", "x is read elsewhere"])
def test_norms_and_residuals_go_into_the_node_where_nothing_else_reads_them(library: Path, order: str) -> None:
    """The graph of a layer [given, residual] -> y, lowered, computes what it says."""
    layer = Layer(library, **({"norm_out": None, "added": "sum"} if order == "norm before" else {}))
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23, "ffn2moe": 1}), ir_version=10)
    editor = Editor(model)
    rows = ir.Shape(["tokens", layer.width])
    given, residual = (ir.val(name, dtype=ir.DataType.FLOAT, shape=rows) for name in ("given", "residual"))
    model.graph.inputs.extend([given, residual])

    def norm(name: str, value: ir.Value) -> ir.Value:
        how = layer.routed[name]
        parts = [
            editor.constant(f"{name}.{part}", getattr(how, f"{part}_D").astype(np.float32))
            for part in ("scale", "bias")
        ]
        return row(editor.node("LayerNormalization", value, *parts, epsilon=how.epsilon))

    def row(value: ir.Value) -> ir.Value:
        value.shape, value.type = rows, ir.TensorType(ir.DataType.FLOAT)
        return value

    sum_TD = row(editor.node("Add", given, residual))
    x_TD = norm("norm_in", sum_TD)
    parts = {"router": layer.routed["router_ED"], "w_in": layer.parts["w_in_EMD"], "w_out": layer.parts["w_out_EDM"]}
    parts |= {"router_bias": layer.routed["router_bias_E"], "choice_bias": layer.routed["choice_bias_E"]}
    parts |= {"b_in": layer.parts["b_in_EM"], "b_out": layer.routed["b_out_D"]}
    constants = [editor.constant(f"layer.{name}", parts[name]) if name in parts else None for name in PARTS]
    how = {
        "selection": "topk",
        "routing": "token",
        "num_active": 2,
        "gate": "unit",
        "activation": layer.how["activation"],
    }
    y_TD = row(editor.node("Mixture", x_TD, *constants, domain="ffn2moe", **how))
    y_TD = row(editor.node("Add", sum_TD if order == "norm before" else x_TD, y_TD))
    y_TD = y_TD if order == "norm before" else norm("norm_out", y_TD)
    model.graph.outputs.extend([y_TD, x_TD] if order == "x is read elsewhere" else [y_TD])
    lowered = onnx_plans.lower(model, "ov-native8")
    expected_ops = (
        ["Add", "LayerNormalization", "RoutedExperts"] if order == "x is read elsewhere" else ["RoutedExperts"]
    )
    assert [node.op_type for node in lowered.graph] == expected_ops
    request = compiled(library, ir.to_proto(lowered).SerializeToString(), 1)
    tokens = layer.tokens(30)
    request.infer(list(tokens))
    assert difference(request.get_output_tensor(0).data, layer.expected(*tokens)) < TOLERANCE["int16"]


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "error"), [("bf16", 0.002), ("int8", 0.01), ("int4", 0.11)])
def test_packed_weights_are_the_weights_up_to_their_bits(weights: str, error: float) -> None:
    weight_ENK = np.random.default_rng(0).standard_normal((2, 37, 100)).astype(np.float32)
    weight_ENK[0, 5] = 0
    rounded = native.round_weights(weights, weight_ENK)
    assert difference(rounded, weight_ENK) < error
    assert (rounded[0, 5] == 0).all()


def test_packed_experts_are_as_large_as_their_bits() -> None:
    E, M, D = 2, 64, 128
    parts = {"w_in_EMD": np.ones((E, M, D), np.float32), "w_out_EDM": np.ones((E, D, M), np.float32)}
    numbers = 2 * M * D
    biases, scales = 4 * M, 4 * (M + D)
    assert native.pack_experts("bf16", **parts).shape == (E, 2 * numbers + biases)
    assert native.pack_experts("int8", **parts).shape == (E, numbers + biases + scales)
    assert native.pack_experts("int4", **parts).shape[1] < 0.6 * native.pack_experts("int8", **parts).shape[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_out_EDM": np.ones((2, 5, 5), np.float32)}, "w_out has shape"),
        ({"b_gate_EM": np.ones((2, 3), np.float32)}, "b_gate without w_gate"),
        ({"b_in_EM": np.ones((2, 4), np.float32)}, "b_in has shape"),
        ({"w_in_EMD": np.full((2, 3, 5), np.nan, np.float32)}, "must be finite"),
    ],
)
def test_weights_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str) -> None:
    parts = {"w_in_EMD": np.ones((2, 3, 5), np.float32), "w_out_EDM": np.ones((2, 5, 3), np.float32)} | change
    with pytest.raises(ValueError, match=message):
        native.pack_experts("int8", **parts)


# --- the library ----------------------------------------------------------------------------------------------------


def test_a_library_that_is_not_there_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(native.compiler, "FOLDER", tmp_path / "_native")
    assert not native.is_built()
    with pytest.raises(FileNotFoundError, match="not built; build it: make native"):
        native.library()


def test_a_library_for_another_openvino_is_to_be_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    current = native.compiler._library(tmp_path).name
    version = native.compiler.importlib.metadata.version("openvino")
    (tmp_path / current.replace(version, "2020.1.0")).touch()
    monkeypatch.setattr(native.compiler, "FOLDER", tmp_path)
    assert not native.is_built()
    with pytest.raises(FileNotFoundError, match=r"built for openvino 2020.1.0, and .* is installed"):
        native.library()


@pytest.mark.parametrize("in_checkout", [True, False])
def test_a_library_from_other_sources_serves_only_outside_a_checkout(in_checkout, tmp_path, monkeypatch) -> None:
    pytest.importorskip("openvino")
    built = tmp_path / native.compiler._library(tmp_path).name
    other = built.with_name(f"{built.stem.rpartition('-')[0]}-01234567.so")
    other.touch()
    monkeypatch.setattr(native.compiler, "FOLDER", tmp_path)
    monkeypatch.setattr(native.compiler, "_in_checkout", lambda: in_checkout)
    if in_checkout:
        with pytest.raises(FileNotFoundError, match="its sources have changed since it was built"):
            native.library()
    else:
        assert native.library() == other
    built.touch()
    assert native.library() == built


def test_without_a_compiler_the_build_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler was found: install one"):
        native.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="CXX=no-such-compiler was not found"):
        native.build(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="the compiler failed"):
        native.build(tmp_path)
    assert not list(tmp_path.iterdir())
