"""Run graphs: one file per engine, behind one interface.

A graph is standard ONNX in every engine, except where a plan needs an operator of one of them, so one file may serve
plans of several engines. An engine's package is imported when a plan asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ffn2moe.table import Table

Precision = Literal["float32", "bfloat16"]  # what float arithmetic is done in
CPU = ("CPUExecutionProvider",)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EngineMissing(ValueError):
    """An engine, or an operator for it, is not on this machine; the message has the remedy."""


class EngineRefused(ValueError):
    """An engine that is installed cannot run a graph on this machine; the message has the reason."""


class Graph(Protocol):
    """An open graph. A free axis of a shape is a name or None."""

    @property
    def inputs(self) -> Mapping[str, Sequence[Any]]: ...

    @property
    def outputs(self) -> Mapping[str, Sequence[Any]]: ...

    @property
    def precision(self) -> Precision: ...

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Return these outputs as arrays. Inputs are arrays, or values of `run_values`."""

    def run_values(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        """Return these outputs as values that stay with the engine, for another run or for `array`."""

    def array(self, value: Any) -> np.ndarray:
        """Return the array behind a value of `run_values`."""

    def fix(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Compile for inputs of these shapes (leading axes), in place of earlier ones; other shapes run as before."""


@dataclass(frozen=True)
class Engine:
    """Software that runs graphs."""

    name: str
    open: Callable[..., Graph]  # (file, *, threads, providers, precision, extension)
    require: Callable[[], Any]  # raises EngineMissing where it is not installed
    precision: Callable[[], Precision]  # what it computes in on this CPU when nobody asks for a precision
    distributions: tuple[str, ...]  # on PyPI; the first installed one is used
    takes_providers: bool = False  # whether execution providers, such as CUDA, are its own
    lacks: Callable[[Any], str | None] = lambda config: None  # why it cannot run a model of this configuration

    @property
    def is_installed(self) -> bool:
        """Whether the engine can be used on this machine."""
        try:
            self.require()
        except EngineMissing:
            return False
        return True


ENGINES: Table[Engine] = Table("engine", __name__)


def distribution(engine: str) -> str | None:
    """Return the name of the installed distribution that holds an engine, or None where there is none."""
    for name in ENGINES[engine].distributions:
        with suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return name
    return None


def installed_engines() -> tuple[str, ...]:
    """Return the names of the engines that are installed."""
    return tuple(name for name, engine in ENGINES.items() if engine.is_installed)


def open_graph(
    file: Path,
    engine: str = "onnxruntime",
    *,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    precision: Precision | None = None,
    extension: Path | None = None,
) -> Graph:
    """Open the graph in a file on `threads` threads (None: one a core).

    `providers` belong to ONNX Runtime. `precision` belongs to OpenVINO: None takes bfloat16 where the CPU multiplies it
    in hardware, else float32. `extension` is a library of operators for OpenVINO. Raises EngineMissing, or ValueError
    where the engine is unknown or cannot run the graph on this machine.
    """
    row = ENGINES[engine]
    if tuple(providers) != CPU and not row.takes_providers:
        raise ValueError(
            f"an execution provider ({', '.join(providers)}) is for plans of ONNX Runtime; this plan runs in {engine}, "
            "on the CPU: leave the provider out, or take a plan of ONNX Runtime"
        )
    return row.open(file, threads=threads, providers=providers, precision=precision, extension=extension)
