"""Where a stage has the work on its layers done: on Dask workers where an address is given, else on this machine.

The address comes from the environment and is no parameter: results are the same to the bit wherever they are made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffn2moe.decompose.layer_map import LayerJob, LayerMap, LayerResult

DASK = "FFN2MOE_DASK"  # the scheduler's address, such as tcp://127.0.0.1:8786


def layer_map() -> LayerMap:
    """Does jobs of layers, each in one thread, and yields results as they come."""
    import torch

    from ffn2moe.decompose.layer_map import on_this_machine

    return dask_map() or (lambda jobs: on_this_machine(jobs, torch.get_num_threads()))


def dask_map() -> LayerMap | None:
    """The same on the workers of the scheduler that the environment names, if it names one."""
    from ffn2moe.decompose.layer_map import by_command

    address = os.environ.get(DASK)

    def on_workers(jobs: Sequence[LayerJob]) -> Iterator[LayerResult]:
        # A program of its own, as only flows know Prefect.
        return by_command(
            [sys.executable, "-m", "flows.layers", "--address", str(address)],
            jobs,
            cwd=Path(__file__).resolve().parent.parent,
        )

    return on_workers if address else None


def in_order(results: Iterable[LayerResult]) -> list[LayerResult]:
    """Results in the order of their layers."""
    return sorted(results, key=lambda result: result.layer)
