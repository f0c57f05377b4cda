"""Measure the memory of a process that opens plans one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from ffn2moe.planning import timing
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.workload import Shape


def memory_of(
    path: Path, shapes_of: Mapping[str, Sequence[tuple[int, int]]], largest: Shape, threads: int
) -> dict[str, float]:
    """Return the peak memory in MiB of a fresh process after opening each plan beside those before it.

    Each plan runs at the largest shape and at the shapes that it is compiled for.
    """
    shapes = {plan: [*dict.fromkeys([*fixed, (largest.batch, largest.sequence)])] for plan, fixed in shapes_of.items()}
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        peaks = alone.submit(_peaks, str(path), shapes_of, shapes, threads).result()
    return dict(zip(shapes, peaks, strict=True))


def _peaks(
    path: str,
    fixed: Mapping[str, Sequence[tuple[int, int]]],
    shapes: Mapping[str, Sequence[tuple[int, int]]],
    threads: int,
) -> list[float]:
    opened, peaks = [], []
    for plan, run in shapes.items():
        export = open_export(path, plan, threads)
        timing.fix({plan: export}, fixed[plan])
        for shape in run:
            batches = timing.full_batches(export, ["the quick brown fox jumps over the lazy dog"], *shape, 1)
            timing.sample(export, batches[0], 1)
        opened.append(export)
        peaks.append(round(_peak_mib(), 1))
    return peaks


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose rusage begins with what the parent process had
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kib) / 2**10
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
