"""Run graphs in OpenVINO, on the CPU."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ffn2moe.runtime.engines import Engine, EngineMissing, EngineRefused, Precision

OPENVINO_EXTRA = 'pip install "ffn2moe[openvino]"'
MASKED = -1e9  # added to the score of a masked token: its share is 0 in float32 and bfloat16, and nothing is infinite
ROOM = 1.25  # a batch is padded to a fixed shape of at most this many times its numbers: that is what the shape gains


@cache
def import_openvino() -> Any:
    """Return the package openvino, without its telemetry; EngineMissing where it is not installed.

    OpenVINO reports each import to its makers if it can import the package openvino-telemetry. So that package is
    hidden while OpenVINO is imported for the first time.
    """
    hidden = "openvino_telemetry"
    before = sys.modules.get(hidden)
    sys.modules[hidden] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise EngineMissing(f"this plan runs in OpenVINO, which is not installed: {OPENVINO_EXTRA}") from error
    finally:
        if before is None:
            del sys.modules[hidden]
        else:
            sys.modules[hidden] = before
    return openvino


def openvino_precision() -> Precision:
    """Return what OpenVINO multiplies in on this CPU: bfloat16 where it has instructions for that, else float32."""
    capabilities = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if "BF16" in capabilities else "float32"


class OpenVinoGraph:
    """Run a graph in OpenVINO, on the CPU, compiled for every shape; a new shape costs the making of its kernels.

    Fixed shapes (`fix`) are compiled for apart when a batch first needs one, which costs a fraction of a second and
    packed weights once more, and saves what OpenVINO does for a shape that it cannot know: docs/decisions/0015.
    A batch that is a little smaller than a fixed shape is filled up to it. Threads share the graph: each has requests
    of its own, and OpenVINO runs them one after the other.
    """

    def __init__(
        self, graph: Path | bytes, *, threads: int | None, precision: Precision, extension: Path | None = None
    ) -> None:
        ov = import_openvino()
        self._core = ov.Core()
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads or 0,
            "ENABLE_CPU_PINNING": False,  # another process may be pinned to the same core, and stay there
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        }
        self._name = graph.name if isinstance(graph, Path) else "this graph"
        try:
            if extension is not None:
                self._core.add_extension(str(extension))
            self._model = self._core.read_model(graph)
        except RuntimeError as error:
            raise self._cannot(error) from error
        _share_weights(self._model)
        _plain_attention(self._model)
        self.precision = precision
        self.inputs = {port.any_name: _shape(port) for port in self._model.inputs}
        self.outputs = {port.any_name: _shape(port) for port in self._model.outputs}
        self._compiled: dict[tuple[int, ...] | None, Any] = {None: self._compile(None)}  # None: for every shape
        self._compiling = threading.Lock()
        self._fixed: tuple[tuple[int, ...], ...] = ()
        self._requests = threading.local()

    def fix(self, shapes: Iterable[tuple[int, ...]]) -> None:
        with self._compiling:
            self._fixed = tuple(dict.fromkeys(tuple(shape) for shape in shapes))
            # The model for every shape takes memory, too: it is compiled again if a batch needs it.
            kept: set[tuple[int, ...] | None] = {*self._fixed} or {None}
            self._compiled = {shape: compiled for shape, compiled in self._compiled.items() if shape in kept}
            self._requests = threading.local()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        fixed = self._fixed_for(inputs)
        given = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        if fixed is not None:
            given = {name: _filled(value, fixed) for name, value in given.items()}
        request = self._request(fixed)
        request.start_async(given, share_inputs=True)  # `infer` on one thread keeps a node's error to itself
        request.wait()
        found = [request.get_tensor(name).data for name in outputs]
        if fixed is not None:
            size = next(iter(inputs.values())).shape
            found = [array[self._part(name, size)] for name, array in zip(outputs, found, strict=True)]
        return [array.copy() for array in found]  # the next run writes over them

    def run_values(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        return self.run(outputs, inputs)

    def array(self, value: Any) -> np.ndarray:
        found: np.ndarray = value
        return found

    def _fixed_for(self, inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return the smallest fixed shape that holds these inputs without too much padding; None if there is none."""
        able = []
        for fixed in self._fixed:
            sizes = {value.shape[: len(fixed)] for value in inputs.values()}
            if len(sizes) == 1:
                size = sizes.pop()
                fits = all(own <= held for own, held in zip(size, fixed, strict=True))
                if fits and math.prod(fixed) <= ROOM * math.prod(size):
                    able.append(fixed)
        return min(able, key=math.prod, default=None)

    def _request(self, fixed: tuple[int, ...] | None) -> Any:
        """Return this thread's own request of the model compiled for a shape."""
        own: dict[tuple[int, ...] | None, Any] | None = getattr(self._requests, "own", None)
        if own is None:
            own = self._requests.own = {}
        if fixed not in own:
            with self._compiling:
                if fixed not in self._compiled:
                    self._compiled[fixed] = self._compile(fixed)
                own[fixed] = self._compiled[fixed].create_infer_request()
        return own[fixed]

    def _compile(self, fixed: tuple[int, ...] | None) -> Any:
        model = self._model.clone()  # shares the weights
        try:
            if fixed is not None:
                model.reshape({name: [*fixed, *shape[len(fixed) :]] for name, shape in self.inputs.items()})
            return self._core.compile_model(model, "CPU", self._settings)
        except RuntimeError as error:
            raise self._cannot(error) from error

    def _cannot(self, error: RuntimeError) -> EngineRefused:
        if "ffn2moe.Experts" in str(error):
            return EngineRefused(
                f"{self._name} needs the operator ffn2moe.Experts: ffn2moe 0.1.0 wrote it, and this version does not "
                "have that operator. Export the model again, or open this export with the plan sorted"
            )
        return EngineRefused(
            f"OpenVINO {import_openvino().__version__.partition('-')[0]} cannot run {self._name} on this machine "
            f"({_cause(error)}): take a plan of another engine, without ov-"
        )

    def _part(self, output: str, size: Sequence[int]) -> tuple[slice, ...]:
        """Return the part of an output that belongs to inputs of a size, without the padding."""
        free = zip(self.outputs[output], size, strict=False)
        return tuple(slice(length) if axis is None else slice(None) for axis, length in free)


def _share_weights(model: Any) -> None:
    """Transpose the matrices of products once, to [out, in] in float32, as OpenVINO wants them.

    Otherwise it does so whenever it compiles the model, and every compiled model has a copy of its own.
    """
    from openvino import opset13

    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        weight, turned = product.input_value(1).get_node(), product.get_attributes()
        if weight.get_type_name() == "Convert":  # the plan keeps them in float16
            weight = weight.input_value(0).get_node()
        if weight.get_type_name() != "Constant" or turned["transpose_b"] or len(weight.shape) != 2:
            continue
        weight_NK = opset13.constant(np.ascontiguousarray(weight.data.T, dtype=np.float32))
        same = opset13.matmul(product.input_value(0), weight_NK, turned["transpose_a"], True)
        same.set_friendly_name(product.get_friendly_name())
        product.output(0).replace(same.output(0))


def _plain_attention(model: Any) -> None:
    """Rewrite attention so that OpenVINO computes it, and fast; the numbers stay those of ONNX's operator.

    - Masks are numbers to add, made of booleans once and not in every layer, and finite: so nothing is NaN that ONNX
      wants as 0, and the two nodes that look for NaN go.
    - Keys and values that several heads share are repeated: OpenVINO 2026.4 takes such a model, and then finds batches
      of products that do not fit (on one thread without a word, and the outputs stay empty).
    """
    from openvino import opset13

    def number(value: Any, kind: type = np.int64) -> Any:
        return opset13.constant(np.array(value, dtype=kind))

    masks: dict[Any, Any] = {}  # of booleans -> of numbers
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_input_size() < 4:
            continue
        query, key, value, mask = (node.input_value(index) for index in range(4))
        if mask.get_element_type().get_type_name() == "boolean":
            source = (mask.get_node().get_friendly_name(), mask.get_index())
            if source not in masks:
                masks[source] = opset13.select(mask, number(0, np.float32), number(MASKED, np.float32))
            node.input(3).replace_source_output(masks[source].output(0))
            for checked in [target.get_node() for target in node.output(0).get_target_inputs()]:
                if checked.get_type_name() == "Select":
                    checked.output(0).replace(node.output(0))
        heads, shared = query.get_partial_shape()[1], key.get_partial_shape()[1]
        if heads.is_static and shared.is_static and heads.get_length() == shared.get_length():
            continue
        heads_1 = opset13.gather(opset13.shape_of(query), number([1]), number(0))
        for index, one in ((1, key), (2, value)):
            size = opset13.shape_of(one)
            before, held, after = (opset13.gather(size, number(axes), number(0)) for axes in ([0], [1], [2, 3]))
            times = opset13.divide(heads_1, held)
            repeats = opset13.concat([number([1, 1]), times, number([1, 1])], 0)
            repeated = opset13.tile(opset13.unsqueeze(one, number(2)), repeats)
            whole = opset13.reshape(repeated, opset13.concat([before, heads_1, after], 0), False)
            node.input(index).replace_source_output(whole.output(0))
    model.validate_nodes_and_infer_types()


def _filled(value: np.ndarray, fixed: Sequence[int]) -> np.ndarray:
    """Pad an input [B, L, ...] to a fixed shape: texts with 0 (masked), then the batch by repeating the last text.

    A text of masked tokens only would have nothing to attend to.
    """
    missing = [held - own for own, held in zip(value.shape, fixed, strict=False)]
    rest = [(0, 0)] * (value.ndim - len(missing))
    if any(missing[1:]):
        value = np.pad(value, [(0, 0), *((0, count) for count in missing[1:]), *rest])
    return np.pad(value, [(0, missing[0])] + [(0, 0)] * (value.ndim - 1), mode="edge") if missing[0] else value


def _shape(port: Any) -> list[int | None]:
    return [None if axis.is_dynamic else axis.get_length() for axis in port.partial_shape]


def _cause(error: RuntimeError) -> str:
    """Return the cause in OpenVINO's message: the last line that is not about its own sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    causes = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return causes[-1] if causes else "no reason given"


def _lacks(config: Any) -> str | None:
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        # OpenVINO takes such attention apart as it reads the graph, and keys that heads share no longer fit.
        return "OpenVINO has no attention with a soft cap on its scores; plans of ONNX Runtime have it"
    return None


def _open(
    file: Path, *, threads: int | None, providers: Sequence[str], precision: Precision | None, extension: Path | None
) -> OpenVinoGraph:
    return OpenVinoGraph(file, threads=threads, precision=precision or openvino_precision(), extension=extension)


ROW = Engine(
    "openvino",
    open=_open,
    require=import_openvino,
    precision=openvino_precision,
    distributions=("openvino",),
    lacks=_lacks,
)
