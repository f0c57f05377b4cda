"""Engines: what runs a graph. ONNX Runtime and, where it is installed, OpenVINO, behind one interface.

A graph is standard ONNX in both (but for plans that rest on an operator of one of them, `ffn2moe.onnx_plans`), and so
one file may serve plans of both. OpenVINO is imported when a plan asks for it, and never by itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

Engine = Literal["onnxruntime", "openvino"]
Precision = Literal["float32", "bfloat16"]  # of what float arithmetic is done in
CPU = ("CPUExecutionProvider",)
OPENVINO_EXTRA = 'pip install "ffn2moe[openvino]"'


class EngineMissing(ValueError):
    """An engine, or an operator for it, that is not on this machine, with the remedy."""


class Graph(Protocol):
    """An open graph. Shapes name their free axes, or have None there."""

    @property
    def inputs(self) -> Mapping[str, Sequence[Any]]: ...

    @property
    def outputs(self) -> Mapping[str, Sequence[Any]]: ...

    @property
    def precision(self) -> Precision: ...

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Those outputs as arrays. Inputs are arrays, or values of `run_values`."""

    def run_values(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        """The same as values that stay where the engine has them: to go into another run, or into `array`."""

    def array(self, value: Any) -> np.ndarray:
        """The array behind a value of `run_values`."""


def open_graph(
    file: Path,
    engine: Engine = "onnxruntime",
    *,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    precision: Precision | None = None,
    extension: Path | None = None,
) -> Graph:
    """Open the graph in a file on `threads` threads (None: one a core).

    `providers` are ONNX Runtime's. `precision` is OpenVINO's: None takes bfloat16 where the CPU multiplies it in
    hardware, else float32. `extension` is a library of operators for OpenVINO. Raises EngineMissing, or ValueError
    where the engine cannot run the graph on this machine.
    """
    if engine == "onnxruntime":
        return OnnxRuntimeGraph(session(file, threads=threads, providers=providers))
    if tuple(providers) != CPU:
        raise ValueError(
            f"an execution provider ({', '.join(providers)}) is for plans of ONNX Runtime; this plan runs in OpenVINO, "
            "on the CPU: leave the provider out, or take a plan without ov-"
        )
    return OpenVinoGraph(file, threads=threads, precision=precision or openvino_precision(), extension=extension)


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


def session(
    graph: str | Path | bytes, *, threads: int | None = None, providers: Sequence[str] = CPU
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on `threads` threads (None: one a core), on the named execution providers.

    Denormal numbers are taken as zero: they are what a masked token's attention comes to, they change nothing,
    and a CPU multiplies them many times slower. (ONNX Runtime decides this for the process, in its first session.)
    """
    import onnxruntime as ort

    available = ort.get_available_providers()
    for provider in providers:
        if provider not in available:
            raise ValueError(
                f"the execution provider {provider!r} is not in this onnxruntime; it has: {', '.join(available)}"
            )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; a failed run raises anyway
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if threads == 1:  # a lone thread need not wait for others
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = graph if isinstance(graph, bytes) else str(graph)
    if tuple(providers) != CPU:  # a provider that cannot start says so below, once; not in red, and twice
        ort.set_default_logger_severity(4)
    opened = ort.InferenceSession(content, options, providers=list(providers))
    started = opened.get_providers()
    if started[0] != providers[0]:
        raise ValueError(
            f"the execution provider {providers[0]!r} does not start on this machine (no such device, or its driver "
            f"or libraries are missing); leave it out to use {started[0]}"
        )
    return opened


class OnnxRuntimeGraph:
    """A graph in ONNX Runtime."""

    precision: Precision = "float32"

    def __init__(self, opened: onnxruntime.InferenceSession) -> None:
        self._session = opened
        self.inputs = {value.name: value.shape for value in opened.get_inputs()}
        self.outputs = {value.name: value.shape for value in opened.get_outputs()}

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        if any(not isinstance(value, np.ndarray) for value in inputs.values()):
            return [self.array(value) for value in self.run_values(outputs, inputs)]
        found: list[np.ndarray] = self._session.run(list(outputs), dict(inputs))
        return found

    def run_values(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        import onnxruntime as ort

        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            if isinstance(value, np.ndarray)
            else value
            for name, value in inputs.items()
        }
        found: list[Any] = self._session.run_with_ort_values(list(outputs), values)
        return found

    def array(self, value: Any) -> np.ndarray:
        found: np.ndarray = value.numpy()
        return found


# --- OpenVINO -------------------------------------------------------------------------------------------------------


@cache
def openvino() -> Any:
    """The package openvino, without its telemetry; EngineMissing where it is not installed.

    OpenVINO reports each import to its makers where its package openvino-telemetry can be imported. Where it cannot,
    it goes without: so it is hidden while OpenVINO is imported for the first time.
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


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    try:
        openvino()
    except EngineMissing:
        return False
    return True


def openvino_precision() -> Precision:
    """What OpenVINO multiplies in on this CPU: bfloat16 where it has instructions for that, else float32."""
    capabilities = openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if "BF16" in capabilities else "float32"


class OpenVinoGraph:
    """A graph in OpenVINO, on the CPU. Compiled once for every shape; new shapes cost what their kernels cost to make.

    Threads share it: each has a request of its own, and OpenVINO runs them one after the other.
    """

    def __init__(
        self, graph: Path | bytes, *, threads: int | None, precision: Precision, extension: Path | None = None
    ) -> None:
        ov = openvino()
        core = ov.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads or 0,
            "ENABLE_CPU_PINNING": False,  # another process may be pinned to the same core, and stay there
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        }
        try:
            if extension is not None:
                core.add_extension(str(extension))
            self._compiled = core.compile_model(core.read_model(graph), "CPU", settings)
        except RuntimeError as error:
            name = graph.name if isinstance(graph, Path) else "this graph"
            raise ValueError(
                f"OpenVINO {ov.__version__.partition('-')[0]} cannot run {name} on this machine "
                f"({_cause(error)}): take a plan without ov-, or install the versions of constraints.txt"
            ) from error
        self.precision = precision
        self.inputs = {port.any_name: _shape(port) for port in self._compiled.inputs}
        self.outputs = {port.any_name: _shape(port) for port in self._compiled.outputs}
        self._requests = threading.local()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._compiled.create_infer_request()
        contiguous = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        request.start_async(contiguous, share_inputs=True)  # `infer` on one thread keeps a node's error to itself
        request.wait()
        return [request.get_tensor(name).data.copy() for name in outputs]  # the next run writes over them

    def run_values(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        return self.run(outputs, inputs)

    def array(self, value: Any) -> np.ndarray:
        found: np.ndarray = value
        return found


def _shape(port: Any) -> list[int | None]:
    return [None if axis.is_dynamic else axis.get_length() for axis in port.partial_shape]


def _cause(error: RuntimeError) -> str:
    """The part of OpenVINO's message that says what is wrong: the last line that is not about its own sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return told[-1] if told else "no reason given"
