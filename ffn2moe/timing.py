"""Time the plans of an export side by side, and choose one.

A model that reads all at once has one time a batch, the `whole`. One that generates has three: `prefill` reads the
prompts (of a seq2seq model: runs its encoder) and gives a first token, `decode` is each token after that, with the
cache, and `request` is both together.

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
from typing import Any, Literal

import numpy as np

from ffn2moe.runtime import (
    DENSE_PLANS,
    CausalExport,
    Export,
    ModelExport,
    Seq2SeqExport,
    open_export,
    read_manifest,
)

AnyExport = Export | CausalExport | Seq2SeqExport | ModelExport
Batch = tuple[np.ndarray, np.ndarray]  # token ids and mask, int64 [B, L]
Phase = Literal["whole", "prefill", "decode", "request"]
DECISIVE: tuple[Phase, ...] = ("whole", "request")  # what a plan is chosen by

SHORTEST_SAMPLE = 0.02  # seconds; faster plans are run several times for one sample
BATCHES = 4  # of different texts, so that no one batch's routing decides


@dataclass(frozen=True)
class Timing:
    """One plan at one shape; speed-ups above 1 are faster.

    Milliseconds a batch: of `decode`, those of one token of each of its texts.
    """

    plan: str
    batch: int
    sequence: int
    threads: int
    median_ms: float
    speedup_vs_dense: float
    speedup_vs_best_dense: float
    phase: Phase = "whole"

    @property
    def tokens_per_second(self) -> float:
        """Tokens read, or of `decode` generated, a second."""
        return 1000 * self.batch * (1 if self.phase == "decode" else self.sequence) / self.median_ms


# Wraps the rounds of one shape while they are worked through: (what they time, rounds) -> rounds.
Track = Callable[[str, range], Iterator[int]]


def time_export(
    path: str | Path,
    texts: Sequence[str],
    *,
    shapes: Sequence[tuple[int, int]],
    threads: Sequence[int],
    rounds: int,
    decode_tokens: int = 16,
    plans: Sequence[str] | None = None,
    track: Track = lambda _, rounds: iter(rounds),
) -> Iterator[list[Timing]]:
    """Times the plans of an export (all by default; `dense` always) on real texts: one list a shape and threads.

    `shapes` are batch x sequence, in tokens; a model that generates goes on for `decode_tokens` after them.
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
            yield interleaved(
                exports,
                batches,
                rounds=rounds,
                threads=count,
                decode_tokens=decode_tokens,
                track=partial(track, label),
            )


def full_batches(
    export: AnyExport, texts: Sequence[str], batch: int, sequence: int, count: int = BATCHES
) -> list[Batch]:
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


def _cycle(export: AnyExport, texts: Sequence[str]) -> Iterator[list[int]]:
    while True:
        for text in filter(str.strip, texts):
            if isinstance(export, CausalExport):
                yield export.token_ids(text)
            elif isinstance(export, Export):
                yield export.token_ids([text])[0]
            else:
                read = export.source if isinstance(export, Seq2SeqExport) else export.batch
                yield read([text])["input_ids"][0].tolist()


def interleaved(
    exports: Mapping[str, AnyExport],
    batches: Sequence[Batch],
    *,
    rounds: int,
    threads: int,
    decode_tokens: int = 16,
    track: Callable[[range], Iterator[int]] = iter,
) -> list[Timing]:
    """Times each plan on the batches, `rounds` samples each, and compares them. `exports` must hold `dense`.

    `threads` is recorded; it is up to the exports to be open on that many.
    """
    calls = {}
    for plan, export in exports.items():  # the first call also allocates
        _seconds(export, batches[0], 1, decode_tokens)
        seconds = max(_seconds(export, batches[0], 1, decode_tokens).values())
        calls[plan] = max(1, min(50, int(SHORTEST_SAMPLE / seconds)))
    samples: dict[str, list[dict[Phase, float]]] = {plan: [] for plan in exports}
    plans = list(exports)
    for index in track(range(rounds)):
        first = index % len(plans)  # every plan gets every place in the order
        for plan in plans[first:] + plans[:first]:
            samples[plan].append(_seconds(exports[plan], batches[index % len(batches)], calls[plan], decode_tokens))
    batch, sequence = batches[0][0].shape
    return [
        row
        for phase in samples["dense"][0]
        for row in _compared(
            {plan: [sample[phase] for sample in found] for plan, found in samples.items()},
            batch=batch,
            sequence=sequence,
            threads=threads,
            phase=phase,
        )
    ]


def _compared(
    samples: Mapping[str, Sequence[float]], *, batch: int, sequence: int, threads: int, phase: Phase
) -> list[Timing]:
    """Each plan beside `dense` and the best dense plan, from seconds of the same rounds."""
    medians = {plan: median(seconds) for plan, seconds in samples.items()}
    best_dense = min((plan for plan in DENSE_PLANS if plan in samples), key=lambda plan: medians[plan])

    def speedup(plan: str, over: str) -> float:
        return median(slow / fast for slow, fast in zip(samples[over], samples[plan], strict=True))

    return [
        Timing(
            plan,
            batch,
            sequence,
            threads,
            1000 * medians[plan],
            speedup(plan, "dense"),
            speedup(plan, best_dense),
            phase,
        )
        for plan in samples
    ]


def _seconds(export: AnyExport, batch: Batch, calls: int, decode_tokens: int) -> dict[Phase, float]:
    """Mean seconds of each phase over some calls."""
    ids_BL, mask_BL = batch
    start = time.perf_counter()
    if not isinstance(export, CausalExport | Seq2SeqExport):
        for _ in range(calls):
            if isinstance(export, ModelExport):
                export.run(input_ids=ids_BL, attention_mask=mask_BL)
            else:
                export.run(ids_BL, mask_BL)
        return {"whole": (time.perf_counter() - start) / calls}
    source = {"input_ids": ids_BL, "attention_mask": mask_BL}
    read: Any = ids_BL.tolist() if isinstance(export, CausalExport) else source
    prefill = decode = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        tokens = export.generate_tokens(read, max_new_tokens=1 + decode_tokens, stop_at_end=False)
        next(tokens)
        first = time.perf_counter()
        made = sum(1 for _ in tokens)
        prefill += first - start
        decode += (time.perf_counter() - first) / max(1, made)
    prefill, decode = prefill / calls, decode / calls
    return {"prefill": prefill, "decode": decode, "request": prefill + decode_tokens * decode}


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
    """The timings that decide: of all the work, at the most tokens, on the first number of threads."""
    whole = [row for row in timings if row.phase in DECISIVE]
    most = max(row.batch * row.sequence for row in whole)
    rows = [row for row in whole if row.batch * row.sequence == most]
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
