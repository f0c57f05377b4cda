"""Time the plans of an export side by side, and choose one.

Plans are timed in turn within each round, on the same texts: what else the machine does falls on all of them, and
ratios are taken within a round before their median.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ffn2moe.runtime import DENSE_PLANS, Export, open_export, read_manifest

SHORTEST_SAMPLE = 0.02  # seconds; faster plans are run several times for one sample
BATCHES = 4  # of different texts, so that no one batch's routing decides


@dataclass(frozen=True)
class Timing:
    """One plan at one shape; speed-ups above 1 are faster."""

    plan: str
    batch: int
    sequence: int
    threads: int
    median_ms: float
    speedup_vs_dense: float
    speedup_vs_best_dense: float


# Wraps the rounds of one shape while they are worked through: (what they time, rounds) -> rounds.
Track = Callable[[str, range], Iterator[int]]


def time_export(
    path: str | Path,
    texts: Sequence[str],
    *,
    shapes: Sequence[tuple[int, int]],
    threads: Sequence[int],
    rounds: int,
    plans: Sequence[str] | None = None,
    track: Track = lambda _, rounds: iter(rounds),
) -> Iterator[list[Timing]]:
    """Times the plans of an export (all by default; `dense` always) on real texts: one list a shape and threads.

    `shapes` are batch x sequence, in tokens.
    """
    if not any(text.strip() for text in texts):
        raise ValueError("there is no text to time the plans on")
    known = read_manifest(Path(path))["plans"]
    chosen = [plan for plan in known if plans is None or plan in plans or plan == "dense"]
    for count in threads:
        exports = {plan: open_export(path, plan, count) for plan in chosen}
        for batch, sequence in shapes:
            batches = full_batches(exports["dense"], texts, batch, sequence)
            label = f"{batch} x {sequence}, {count} {'thread' if count == 1 else 'threads'}"
            yield interleaved(exports, batches, rounds=rounds, threads=count, track=partial(track, label))


def full_batches(
    export: Export, texts: Sequence[str], batch: int, sequence: int, count: int = BATCHES
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches [B, L] of real text without padding: each row runs through the texts until it is full.

    Real text because routing decides the cost of a mixture: random ids would load the experts in another way.
    """
    tokens: list[np.ndarray] = []
    row: list[int] = []
    source = _cycle(export, texts)
    while len(tokens) < batch * count:
        row += next(source)
        if len(row) >= sequence:
            tokens.append(np.array(row[:sequence], dtype=np.int64))
            row = []
    ids = np.stack(tokens).reshape(count, batch, sequence)
    return [(ids_BL, np.ones_like(ids_BL)) for ids_BL in ids]


def _cycle(export: Export, texts: Sequence[str]) -> Iterator[list[int]]:
    while True:
        for text in texts:
            yield export.token_ids([text])[0]


def interleaved(
    exports: Mapping[str, Export],
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    rounds: int,
    threads: int,
    track: Callable[[range], Iterator[int]] = iter,
) -> list[Timing]:
    """Times each plan on the batches, `rounds` samples each, and compares them. `exports` must hold `dense`.

    `threads` is recorded; it is up to the exports to be open on that many.
    """
    calls = {}
    for plan, export in exports.items():  # the first call also allocates
        export.run(*batches[0])
        seconds = _seconds(export, batches[0], 1)
        calls[plan] = max(1, min(50, int(SHORTEST_SAMPLE / seconds)))
    samples: dict[str, list[float]] = {plan: [] for plan in exports}
    plans = list(exports)
    for index in track(range(rounds)):
        first = index % len(plans)  # every plan gets every place in the order
        for plan in plans[first:] + plans[:first]:
            samples[plan].append(_seconds(exports[plan], batches[index % len(batches)], calls[plan]))
    medians = {plan: median(seconds) for plan, seconds in samples.items()}
    best_dense = min((plan for plan in DENSE_PLANS if plan in exports), key=lambda plan: medians[plan])
    batch, sequence = batches[0][0].shape

    def speedup(plan: str, over: str) -> float:
        return median(slow / fast for slow, fast in zip(samples[over], samples[plan], strict=True))

    return [
        Timing(plan, batch, sequence, threads, 1000 * medians[plan], speedup(plan, "dense"), speedup(plan, best_dense))
        for plan in exports
    ]


def _seconds(export: Export, batch: tuple[np.ndarray, np.ndarray], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        export.run(*batch)
    return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Choice:
    """The plan to use, and why."""

    plan: str
    best_dense: str
    speedup_vs_best_dense: float
    reason: str


def choose(timings: Sequence[Timing], keeps_quality: Mapping[str, bool]) -> Choice:
    """The fastest mixture plan that keeps its quality, if it beats the fastest dense plan that does; else that one.

    `timings` of one shape and number of threads. `dense` itself always counts as keeping its quality.
    """
    fast = sorted(timings, key=lambda timing: timing.median_ms)
    kept = [timing for timing in fast if timing.plan == "dense" or keeps_quality.get(timing.plan, False)]
    dense = next(timing for timing in kept if timing.plan in DENSE_PLANS)
    mixture = next((timing for timing in kept if timing.plan not in DENSE_PLANS), None)
    if mixture is None:
        return Choice(dense.plan, dense.plan, 1.0, f"no mixture plan keeps the quality: {dense.plan} is the default")
    ratio = mixture.speedup_vs_dense / dense.speedup_vs_dense
    if ratio > 1:
        return Choice(mixture.plan, dense.plan, ratio, f"{mixture.plan} is {ratio:.2f}x as fast as {dense.plan}")
    return Choice(
        dense.plan,
        dense.plan,
        1.0,
        f"no mixture plan beats {dense.plan} here ({mixture.plan} has {ratio:.2f}x its speed): "
        f"{dense.plan} is the default",
    )


def largest_shape(timings: Sequence[Timing]) -> list[Timing]:
    """The timings that decide: at the most tokens, on the first number of threads."""
    most = max(row.batch * row.sequence for row in timings)
    rows = [row for row in timings if row.batch * row.sequence == most]
    first = (rows[0].batch, rows[0].threads)
    return [row for row in rows if (row.batch, row.threads) == first]


def machine() -> dict[str, Any]:
    """What was measured on; no name of the host."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": metadata.version("onnxruntime-gpu"),
    }


_INT8_FLAGS = {"AVX2": "avx2", "AVX512-VNNI": "avx512_vnni", "AMX-INT8": "amx_int8"}


def _cpu_name() -> str:
    """The processor's name, and which of the instructions it has that int8 arithmetic is fast with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    known = [label for label, flag in _INT8_FLAGS.items() if flag in flags]
    return f"{name} ({', '.join(known)})" if known else name
