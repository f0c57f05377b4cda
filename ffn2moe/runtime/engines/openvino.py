"""Run graphs in OpenVINO, on the CPU."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ffn2moe.runtime.engines import Engine, EngineMissing, EngineRefused, Precision
from ffn2moe.runtime.engines._openvino_attention import fuse_attention
from ffn2moe.runtime.engines._openvino_model import BEAMS, has_blocks, keep_cache, plain_attention, share_weights

OPENVINO_EXTRA = 'pip install "ffn2moe[openvino]"'
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

    The keys and values of a model that decodes stay in OpenVINO (`keep_cache`): every text, or batch of texts, has a
    request of its own, which holds them. `run_values` takes an empty cache, or what the last run gave.
    """

    def __init__(
        self,
        graph: Path | bytes,
        *,
        threads: int | None,
        precision: Precision | None = None,
        extension: Path | None = None,
    ) -> None:
        ov = import_openvino()
        self._core = ov.Core()
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads or 0,
            "ENABLE_CPU_PINNING": False,  # another process may be pinned to the same core, and stay there
        }
        self._name = graph.name if isinstance(graph, Path) else "this graph"
        try:
            if extension is not None:
                self._core.add_extension(str(extension))
            self._model = self._core.read_model(graph)
        except RuntimeError as error:
            raise self._cannot(error) from error
        share_weights(self._model)
        plain_attention(self._model)
        self.inputs = {port.any_name: _shape(port) for port in self._model.inputs}
        self.outputs = {port.any_name: _shape(port) for port in self._model.outputs}
        self._kept = keep_cache(self._model)
        blocks = has_blocks(self._model)  # in float32 their kernels quantise activations, which is faster than bfloat16
        self.precision: Precision = precision or ("float32" if blocks else openvino_precision())
        if extension is not None and self.precision == "bfloat16" and not self._kept:
            fuse_attention(self._model, extension)
        exact = self.precision == "float32" and not blocks
        self._settings |= {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
            "KV_CACHE_PRECISION": "f32" if exact else "f16",
        }
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

    def profiled(self) -> Any:
        """Return a request of the model for every shape that counts the time of each node."""
        return self._core.compile_model(
            self._model, "CPU", self._settings | {"PERF_COUNT": True}
        ).create_infer_request()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        if self._kept:
            return [self.array(value) for value in self.run_values(outputs, inputs)]
        fixed = self._fixed_for(inputs)
        given = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        if fixed is not None:
            given = {name: _filled(value, fixed) for name, value in given.items()}
        request = self._request(fixed)
        _run(request, given)
        found = [request.get_tensor(name).data for name in outputs]
        if fixed is not None:
            size = next(iter(inputs.values())).shape
            found = [array[self._part(name, size)] for name, array in zip(outputs, found, strict=True)]
        return [array.copy() for array in found]  # the next run writes over them

    def run_values(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        if not self._kept:
            return self.run(outputs, inputs)
        cache = self._cache_of({name: value for name, value in inputs.items() if name in self._kept})
        given = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name not in self._kept}
        _run(cache.request, given | {BEAMS: np.arange(len(inputs["input_ids"]), dtype=np.int32)})
        cache.steps += 1
        held = {output: _Held(cache, name, cache.steps) for name, output in self._kept.items()}
        return [held[name] if name in held else cache.request.get_tensor(name).data.copy() for name in outputs]

    def array(self, value: Any) -> np.ndarray:
        return value.array() if isinstance(value, _Held) else np.asarray(value)

    def _cache_of(self, past: Mapping[str, Any]) -> _Cache:
        """Return the cache that these values are of; arrays begin a new one."""
        first = next(iter(past.values()))
        if isinstance(first, _Held):
            assert first.steps == first.cache.steps, "a cache goes on from its last token only"
            return first.cache
        cache = _Cache(self._compiled[None].create_infer_request())
        if first.shape[2]:  # of another engine
            for name, array in past.items():
                cache.state(name).state = import_openvino().Tensor(np.ascontiguousarray(array))
        return cache

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


class _Cache:
    """The keys and values of a text, or a batch of texts, in a request of their own."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.steps = 0  # runs of the model that made it

    def state(self, name: str) -> Any:
        """Return the state that stands for an input: its name begins with that of the input."""
        return next(state for state in self.request.query_state() if state.name.startswith(name))


@dataclass(frozen=True)
class _Held:
    """A part of a cache, by the name of its input, after a number of runs."""

    cache: _Cache
    name: str
    steps: int

    def array(self) -> np.ndarray:
        assert self.steps == self.cache.steps, "a cache holds its last tokens only"
        return np.array(self.cache.state(self.name).state.data, dtype=np.float32)


def _run(request: Any, given: Mapping[str, np.ndarray]) -> None:
    request.start_async(given, share_inputs=True)  # `infer` on one thread keeps a node's error to itself
    request.wait()


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
    return OpenVinoGraph(file, threads=threads, precision=precision, extension=extension)


ROW = Engine(
    "openvino",
    open=_open,
    require=import_openvino,
    precision=openvino_precision,
    distributions=("openvino",),
    lacks=_lacks,
)
