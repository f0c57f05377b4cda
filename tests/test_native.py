"""The fused experts operator against its numpy reference, on every path that this machine can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ffn2moe import native
from ffn2moe.native import PATHS, WEIGHTS

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


class Layer:
    """Random experts, packed, and a compiled model of one node."""

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
        threads: int = 1,
    ) -> None:
        import openvino as ov

        numbers = np.random.default_rng(0)
        self.width, self.num_experts = D, E
        self.parts: dict[str, Any] = {
            "w_in_EMD": numbers.standard_normal((E, M, D)).astype(np.float32) / np.float32(D**0.5),
            "w_out_EDM": numbers.standard_normal((E, D, M)).astype(np.float32) / np.float32(M**0.5),
            "b_in_EM": numbers.standard_normal((E, M)).astype(np.float32) if biased else None,
            "w_gate_EMD": numbers.standard_normal((E, M, D)).astype(np.float32) / np.float32(D**0.5) if gated else None,
            "b_gate_EM": numbers.standard_normal((E, M)).astype(np.float32) if gated and biased else None,
        }
        packed = native.pack_experts(weights, **self.parts)
        self.rounded = {
            name: native.round_weights(weights, part) if part is not None and name.startswith("w_") else part
            for name, part in self.parts.items()
        }
        self.activation = activation
        described = native.attributes(
            D, M, gated=gated, activation=activation, weights=weights, activations=activations
        )
        core = ov.Core()
        core.add_extension(library)
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        model = core.compile_model(core.read_model(one_node(packed, D, described)), "CPU", settings)
        self.request = model.create_infer_request()

    def __call__(self, x_TD: np.ndarray, chosen_TK: np.ndarray, gates_TK: np.ndarray) -> np.ndarray:
        # Not infer(): with one thread, that of openvino 2026.4 loses the errors of any node.
        self.request.start_async([x_TD, chosen_TK, gates_TK])
        self.request.wait()
        return np.array(self.request.get_output_tensor().data)

    def expected(self, x_TD: np.ndarray, chosen_TK: np.ndarray, gates_TK: np.ndarray) -> np.ndarray:
        return native.reference(x_TD, chosen_TK, gates_TK, activation=self.activation, **self.rounded)

    def tokens(self, T: int, K: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        numbers = np.random.default_rng(1)
        x_TD = numbers.standard_normal((T, self.width)).astype(np.float32)
        chosen_TK = np.argsort(numbers.random((T, self.num_experts)), axis=1)[:, :K]
        return x_TD, chosen_TK, numbers.random((T, K)).astype(np.float32)


def one_node(packed: np.ndarray, width: int, attributes: dict[str, Any]) -> bytes:
    node = helper.make_node(
        native.OP_TYPE, ["x", "chosen", "gates", "experts"], ["y"], domain=native.DOMAIN, **attributes
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", "width"]),
            helper.make_tensor_value_info("chosen", TensorProto.INT64, ["tokens", "active"]),
            helper.make_tensor_value_info("gates", TensorProto.FLOAT, ["tokens", "active"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", width])],
        [numpy_helper.from_array(packed, "experts")],
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
        Layer(library, D=16, M=16)
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
    layer = Layer(library, weights=weights, activations=activations, activation=activation, gated=gated, biased=biased)
    tokens = layer.tokens(53)
    assert difference(layer(*tokens), layer.expected(*tokens)) < TOLERANCE[activations]


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_a_path_computes_widths_that_fill_its_tiles(library: Path, path: str, weights: str, activations: str) -> None:
    layer = Layer(library, weights=weights, activations=activations, D=128, M=64)
    tokens = layer.tokens(130)
    assert difference(layer(*tokens), layer.expected(*tokens)) < TOLERANCE[activations]


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_threads_and_company_do_not_change_a_bit(library: Path, path: str, weights: str, activations: str) -> None:
    one, two = (
        Layer(library, weights=weights, activations=activations, gated=True, D=64, M=48, threads=threads)
        for threads in (1, 2)
    )
    x_TD, chosen_TK, gates_TK = one.tokens(600)
    y_TD = one(x_TD, chosen_TK, gates_TK)
    assert np.array_equal(y_TD, two(x_TD, chosen_TK, gates_TK))
    for part in (slice(0, 1), slice(5, 22), slice(100, 400)):  # few tokens are computed in another order
        for layer in (one, two):
            assert np.array_equal(y_TD[part], layer(x_TD[part], chosen_TK[part], gates_TK[part]))


def test_no_token_and_one_token(library: Path, path: str) -> None:
    layer = Layer(library)
    for count in (1, 0, 1):
        tokens = layer.tokens(count)
        y_TD = layer(*tokens)
        assert y_TD.shape == (count, layer.width)
        assert count == 0 or difference(y_TD, layer.expected(*tokens)) < TOLERANCE["int16"]


def test_tokens_may_all_choose_one_expert_or_one_expert_twice(library: Path, path: str) -> None:
    layer = Layer(library)
    x_TD, chosen_TK, gates_TK = layer.tokens(40)
    chosen_TK[:] = 2
    y_TD = layer(x_TD, chosen_TK, gates_TK)
    assert difference(y_TD, layer.expected(x_TD, chosen_TK, gates_TK)) < TOLERANCE["int16"]


def test_a_pair_of_gate_0_is_not_computed(library: Path, path: str) -> None:
    """Its expert may be any number, and a token without pairs is exactly 0."""
    layer = Layer(library)
    x_TD, chosen_TK, gates_TK = layer.tokens(20)
    gates_TK[::2, 1] = 0
    gates_TK[3] = 0
    expected = layer.expected(x_TD, chosen_TK, gates_TK)
    chosen_TK[::2, 1] = 99
    y_TD = layer(x_TD, chosen_TK, gates_TK)
    assert (y_TD[3] == 0).all()
    assert difference(y_TD, expected) < TOLERANCE["int16"]


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_nan_and_infinity_stay_in_their_token(library: Path, path: str, weights: str, activations: str) -> None:
    layer = Layer(library, weights=weights, activations=activations)
    x_TD, chosen_TK, gates_TK = layer.tokens(20)
    expected = layer(x_TD, chosen_TK, gates_TK)
    x_TD[4, 7], x_TD[11, 0] = np.nan, np.inf
    y_TD = layer(x_TD, chosen_TK, gates_TK)
    assert np.isnan(y_TD[4]).all()
    assert not np.isfinite(y_TD[11]).all()
    others = np.delete(np.arange(20), [4, 11])
    assert np.array_equal(y_TD[others], expected[others])


@pytest.mark.parametrize(("weights", "activations"), NUMBERS)
def test_a_column_of_heavy_activations_costs_precision_of_8_bits_alone(
    library: Path, path: str, weights: str, activations: str
) -> None:
    layer = Layer(library, weights=weights, activations=activations, D=128, M=64)
    x_TD, chosen_TK, gates_TK = layer.tokens(64)
    x_TD[:, 3] *= 30
    y_TD = layer(x_TD, chosen_TK, gates_TK)
    exact = native.reference(x_TD, chosen_TK, gates_TK, activation="gelu", **layer.parts)
    tolerance = {"bf16": 0.01, "int8": 0.015, "int4": 0.2}[weights] + (0.07 if activations == "int8" else 0)
    assert difference(y_TD, exact) < tolerance


def test_an_expert_that_is_not_there_is_refused(library: Path) -> None:
    layer = Layer(library)
    x_TD, chosen_TK, gates_TK = layer.tokens(3)
    chosen_TK[1, 0] = 4
    with pytest.raises(RuntimeError, match="token 1 has chosen expert 4, but there are 0 to 3"):
        layer(x_TD, chosen_TK, gates_TK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"expert_width": 999}, "pack them by ffn2moe.native.pack_experts"),
        ({"activation": "swish"}, "'swish' is not one of gelu"),
        ({"weights": "int2"}, "'int2' is not one of bf16, int8, int4"),
        ({"activations": "bf16"}, "activations 'bf16' do not go with weights 'int8': int16 and int8 do"),
        ({"width": 0}, "width and expert_width must be 1 to"),
    ],
)
def test_a_node_that_does_not_fit_its_weights_is_refused(library: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        read_a_node(library, wrong)


def read_a_node(library: Path, wrong: dict[str, Any]) -> None:
    """Reads a model whose node says what `native.attributes` may refuse to write."""
    import openvino as ov

    attributes = native.attributes(16, 16, gated=False, activation="relu", weights="int8") | wrong
    core = ov.Core()
    core.add_extension(library)
    core.read_model(one_node(np.zeros((2, 64), dtype=np.uint8), 16, attributes))


def test_x_of_another_width_is_refused(library: Path) -> None:
    layer = Layer(library)
    x_TD, chosen_TK, gates_TK = layer.tokens(3)
    with pytest.raises(RuntimeError, match="x has shape"):
        layer(x_TD[:, 1:], chosen_TK, gates_TK)


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
    monkeypatch.setattr(native, "FOLDER", tmp_path / "_native")
    assert not native.is_built()
    with pytest.raises(FileNotFoundError, match="not built; build it: make native"):
        native.library()


def test_a_library_for_another_openvino_is_to_be_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    current = native._library(tmp_path).name
    version = native.importlib.metadata.version("openvino")
    (tmp_path / current.replace(version, "2020.1.0")).touch()
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert not native.is_built()
    with pytest.raises(FileNotFoundError, match=r"built for openvino 2020.1.0, and .* is installed"):
        native.library()


def test_without_a_compiler_the_build_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler was found: install one"):
        native.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="CXX=no-such-compiler is not there"):
        native.build(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="the compiler failed"):
        native.build(tmp_path)
    assert not list(tmp_path.iterdir())
