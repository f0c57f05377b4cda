"""Choose where a stage works on its layers: on Dask workers if an address is set, else on this machine.

The address comes from the environment. It is not a parameter, because the results are the same to the bit everywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffn2moe.decompose.layer_map import LayerJob, LayerMap, LayerResult

DASK = "FFN2MOE_DASK"  # the scheduler's address, for example tcp://127.0.0.1:8786


def layer_map() -> LayerMap:
    """Return a function that runs jobs of layers, each in one thread, and yields results as they arrive."""
    import torch

    from ffn2moe.decompose.layer_map import on_this_machine

    return dask_map() or (lambda jobs: on_this_machine(jobs, torch.get_num_threads()))


def dask_map() -> LayerMap | None:
    """Return the same for the workers of the scheduler that the environment names; None if it names none."""
    from ffn2moe.decompose.layer_map import by_command

    address = os.environ.get(DASK)

    def on_workers(jobs: Sequence[LayerJob]) -> Iterator[LayerResult]:
        # It runs as a program of its own, because only flows import Prefect.
        return by_command(
            [sys.executable, "-m", "flows.layers", "--address", str(address)],
            jobs,
            cwd=Path(__file__).resolve().parent.parent,
        )

    return on_workers if address else None


def in_order(results: Iterable[LayerResult]) -> list[LayerResult]:
    """Return results in the order of their layers."""
    return sorted(results, key=lambda result: result.layer)
