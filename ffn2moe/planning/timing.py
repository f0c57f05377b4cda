"""Time the plans of an export side by side. What is chosen by that is in `ffn2moe.planning.autoplan`.

A model that reads all at once has one time a batch, the `whole`. One that generates has three: `prefill` reads the
prompts (of a seq2seq model: runs its encoder) and gives a first token, `decode` is each token after that, with the
cache, and `request` is both together.

Plans are timed in turn within each round, on the same texts and threads: what else the machine does falls on all of
them, and ratios are taken within a round before their median. The order is drawn anew for every round, so that no plan
always comes after the same other one. Noise is the confidence interval of that median.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from ffn2moe.runtime.decoders import CausalExport, Seq2SeqExport
from ffn2moe.runtime.engines import ENGINES, cores, distribution
from ffn2moe.runtime.export import Export, ModelExport, open_export
from ffn2moe.runtime.files import read_manifest
from ffn2moe.runtime.plans import is_dense

AnyExport = Export | CausalExport | Seq2SeqExport | ModelExport
Batch = tuple[np.ndarray, np.ndarray]  # token ids and mask, int64 [B, L]
Phase = Literal["whole", "prefill", "decode", "request"]
DECISIVE: tuple[Phase, ...] = ("whole", "request")  # what a plan is chosen by

SHORTEST_SAMPLE = 0.02  # seconds; faster plans are run several times for one sample
BATCHES = 16  # of different texts: no one batch's routing decides, nor do shapes that an engine has seen before
# Of an interval: high, as it is looked at for several plans, and again and again until it is narrow.
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Timing:
    """One plan at one shape; speed-ups above 1 are faster.

    Milliseconds a batch: of `decode`, those of one token of each of its texts. `low` and `high` are the interval of
    `speedup_vs_best_dense`: 0 and infinity where there were too few rounds to tell.
    """

    plan: str
    batch: int
    sequence: int
    threads: int
    median_ms: float
    speedup_vs_dense: float
    speedup_vs_best_dense: float
    phase: Phase = "whole"
    best_dense: str = "dense"  # the plan that it is compared with
    low: float = 0.0
    high: float = math.inf
    rounds: int = 0  # that this plan took part in

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
            fix(exports, [(batch, sequence)])
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


def fix(exports: Mapping[str, AnyExport], shapes: Iterable[tuple[int, int]]) -> None:
    """Compile for these batches apart, as plans of OpenVINO are used: dense and mixture alike, in place of others."""
    kept = list(shapes)
    for export in exports.values():
        if isinstance(export, Export | ModelExport):
            export.fix(kept)


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
    race = Race(exports, batches, threads=threads, decode_tokens=decode_tokens)
    for _ in track(range(rounds)):
        race.round()
    return race.timings()


class Race:
    """Plans that are timed in turn on the batches of one shape, round by round. One of them at least is dense.

    `comparable` are the dense plans that others are compared with: None means all that are there.
    """

    def __init__(
        self,
        exports: Mapping[str, AnyExport],
        batches: Sequence[Batch],
        *,
        threads: int,
        decode_tokens: int = 16,
        comparable: Collection[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.batch, self.sequence = batches[0][0].shape
        self.threads = threads
        self.running = list(exports)
        self.rounds = 0
        self._exports = exports
        self._batches = batches
        self._decode_tokens = decode_tokens
        self._comparable = [plan for plan in exports if is_dense(plan) and (comparable is None or plan in comparable)]
        assert self._comparable, "something dense to compare with"
        self._order = random.Random(seed)
        self._samples: dict[str, dict[int, dict[Phase, float]]] = {plan: {} for plan in exports}  # by round
        self._calls = {}
        for plan, export in exports.items():
            seconds = max(sample(export, batches[0], decode_tokens).values())
            if seconds < SHORTEST_SAMPLE:  # the first call also allocates
                seconds = max(sample(export, batches[0], decode_tokens).values())
            self._calls[plan] = max(1, min(50, int(SHORTEST_SAMPLE / max(seconds, 1e-9))))

    def round(self) -> None:
        """One more sample of every plan that is still running, on the next batch, in an order of its own."""
        batch = self._batches[self.rounds % len(self._batches)]
        for plan in self._order.sample(self.running, len(self.running)):
            calls = self._calls[plan]
            if calls > 1:  # another plan's weights are in the cache, its threads may still look for work
                sample(self._exports[plan], batch, self._decode_tokens)
            self._samples[plan][self.rounds] = sample(self._exports[plan], batch, self._decode_tokens, calls)
        self.rounds += 1

    def drop(self, plan: str) -> None:
        """Leave a plan out from now on; what is known of it stays. Not the best dense plan: it is what counts."""
        assert all(plan != self.best_dense(phase) for phase in self.phases)
        self.running.remove(plan)

    @property
    def phases(self) -> list[Phase]:
        return list(next(iter(self._samples[self.running[0]].values()), {}))

    def best_dense(self, phase: Phase) -> str:
        """The fastest of the dense plans to compare with."""
        running = [plan for plan in self._comparable if plan in self.running]
        return min(running, key=lambda plan: median(self.seconds(plan, phase)))

    def seconds(self, plan: str, phase: Phase) -> list[float]:
        return [sample[phase] for sample in self._samples[plan].values()]

    def ratios(self, plan: str, over: str, phase: Phase) -> list[float]:
        """How many times as fast as another plan, in each of the rounds that both took part in."""
        mine, others = self._samples[plan], self._samples[over]
        return [others[index][phase] / mine[index][phase] for index in mine if index in others]

    def timings(self) -> list[Timing]:
        """Every plan beside `dense` (where that is missing, beside the best dense plan) and the best dense plan."""
        found = []
        for phase in self.phases:
            best = self.best_dense(phase)
            plain = "dense" if "dense" in self._exports else best
            for plan in self._exports:
                ratios = self.ratios(plan, best, phase)
                low, high = (1.0, 1.0) if plan == best else median_interval(ratios)
                found.append(
                    Timing(
                        plan,
                        self.batch,
                        self.sequence,
                        self.threads,
                        1000 * median(self.seconds(plan, phase)),
                        median(self.ratios(plan, plain, phase)),
                        median(ratios),
                        phase,
                        best,
                        low,
                        high,
                        len(self._samples[plan]),
                    )
                )
        return found


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of the median, by order statistics, which asks nothing of how the values are distributed.

    Of n values above or below the median like tosses of a coin, the k-th smallest lies above it with the probability
    of fewer than k tails (Conover, Practical Nonparametric Statistics, 1999, 3.2). (0, infinity) where n is too small
    for this confidence: 8 are needed for 99 %.
    """
    ordered, n = sorted(values), len(values)
    most = (1 - confidence) / 2 * 2**n
    tosses = k = 0
    while k < n and (tosses := tosses + math.comb(n, k)) <= most:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


def sample(export: AnyExport, batch: Batch, decode_tokens: int = 16, calls: int = 1) -> dict[Phase, float]:
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


def machine() -> dict[str, Any]:
    """What was measured on, and with which engines; no name of the host."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{engine: metadata.version(name) for engine in ENGINES if (name := distribution(engine))},
    }


_FLAGS = {
    "AVX2": "avx2",
    "AVX512-VNNI": "avx512_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AMX-INT8": "amx_int8",
    "AMX-BF16": "amx_bf16",
}


def _cpu_name() -> str:
    """The processor's name, and which of the instructions it has that int8 and bfloat16 arithmetic is fast with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    known = [label for label, flag in _FLAGS.items() if flag in flags]
    return f"{name} ({', '.join(known)})" if known else name
