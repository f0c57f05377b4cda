"""Run graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffn2moe.runtime.engines import CPU, Engine, EngineMissing, Precision

if TYPE_CHECKING:
    import onnxruntime


def import_onnxruntime() -> Any:
    """Return the package onnxruntime. Raises EngineMissing, with the remedy, where it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise EngineMissing(
            "ONNX Runtime is not installed: pip install onnxruntime (with an NVIDIA GPU: pip install onnxruntime-gpu)"
        ) from error
    return onnxruntime


def session(
    graph: str | Path | bytes, *, threads: int | None = None, providers: Sequence[str] = CPU
) -> onnxruntime.InferenceSession:
    """Return an ONNX Runtime session on `threads` threads (None: one a core) and the named execution providers.

    Denormal numbers count as zero: a masked token's attention yields them, they change nothing, and a CPU multiplies
    them many times slower. (ONNX Runtime decides this for the process, in its first session.)
    """
    ort = import_onnxruntime()
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
    if tuple(providers) != CPU:  # the error below says it once when a provider cannot start
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
    """Run a graph in ONNX Runtime."""

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

    def fix(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Do nothing: ONNX Runtime runs every shape alike."""


def _open(
    file: Path, *, threads: int | None, providers: Sequence[str], precision: Precision | None, extension: Path | None
) -> OnnxRuntimeGraph:
    return OnnxRuntimeGraph(session(file, threads=threads, providers=providers))


ROW = Engine(
    "onnxruntime",
    open=_open,
    require=import_onnxruntime,
    precision=lambda: "float32",
    distributions=("onnxruntime-gpu", "onnxruntime"),  # they overwrite each other, so ffn2moe requires neither
    takes_providers=True,
)
