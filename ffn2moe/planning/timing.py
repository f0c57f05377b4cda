"""Time the plans of an export side by side.

A model that reads all at once has one time a batch, `whole`. A model that generates has three: `prefill` reads the
prompts (a seq2seq model runs its encoder) and gives a first token, `decode` is each token after that, with the
cache, and `request` is both together. A list of texts of mixed lengths, cut into batches, has one time, `list`.

Plans are timed in turn within each round, on the same texts and threads: other load of the machine falls on all of
them, and ratios are taken within a round before their median. Every round draws its order again, so that no plan always
comes after the same other one. Noise is the confidence interval of that median.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from ffn2moe.runtime.decoders import CausalExport, Seq2SeqExport
from ffn2moe.runtime.engines import ENGINES, cores, distribution
from ffn2moe.runtime.export import Export, ModelExport
from ffn2moe.runtime.plans import is_dense

AnyExport = Export | CausalExport | Seq2SeqExport | ModelExport
Batch = tuple[np.ndarray, np.ndarray]  # token ids and mask, int64 [B, L]
Texts = list[str]  # a list that is cut into batches by length: `encode` and `classify` do that
Phase = Literal["whole", "prefill", "decode", "request", "list"]
DECISIVE: tuple[Phase, ...] = ("whole", "request")  # the phases that choose a plan

SHORTEST_SAMPLE = 0.02  # seconds; faster plans are run several times for one sample
BATCHES = 16  # of different texts: neither one batch's routing nor shapes that an engine has seen before decide
CLOSE = 0.97  # of another plan's speed: a plan this near is measured as precisely, and may stand for it
CONFIDENCE = 0.99  # of an interval; high, because several plans are compared, repeatedly, until it is narrow


@dataclass(frozen=True)
class Timing:
    """One plan at one shape; speed-ups above 1 are faster.

    Milliseconds are for a batch; those of `decode` are for one token of each of its texts. `low` and `high` are the
    interval of `speedup_vs_best_dense`: 0 and infinity where there were too few rounds to tell. A list has `batch`
    texts, and no `sequence` (0).
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
        """Tokens a second: read, or generated in `decode`."""
        return 1000 * self.batch * (1 if self.phase == "decode" else self.sequence) / self.median_ms


def full_batches(
    export: AnyExport, texts: Sequence[str], batch: int, sequence: int, count: int = BATCHES
) -> list[Batch]:
    """Return batches [B, L] of real text without padding: each row runs through the texts until it is full.

    Routing decides the cost of a mixture, and random ids would load the experts in another way than real text.
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
    """Compile plans of OpenVINO for exactly these batches, as they are used: dense plans and mixtures alike."""
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


class Race:
    """Time plans in turn on the batches of one shape, or on lists of so many texts, round by round.

    Each round takes the next batch or list. A list runs once a round, as its shapes are to be new ones.
    `comparable` names those that others are compared with, at least one; None takes all dense plans, and then every
    name is a plan's. In an export without dense plans its portable plan stands for the best dense one.
    """

    def __init__(
        self,
        exports: Mapping[str, AnyExport],
        batches: Sequence[Batch] | Sequence[Texts],
        *,
        threads: int,
        decode_tokens: int = 16,
        comparable: Collection[str] | None = None,
        seed: int = 0,
    ) -> None:
        first, warmup = batches[0], batches[-1]
        self.batch, self.sequence = (len(first), 0) if isinstance(first, list) else first[0].shape
        self.threads = threads
        self.running = list(exports)
        self.rounds = 0
        self._exports = exports
        self._batches = batches
        self._decode_tokens = decode_tokens
        self.comparable = [plan for plan in exports if (is_dense(plan) if comparable is None else plan in comparable)]
        assert self.comparable, "something to compare with"
        self._order = random.Random(seed)
        self._samples: dict[str, dict[int, dict[Phase, float]]] = {plan: {} for plan in exports}  # by round
        self._calls = {}
        for plan, export in exports.items():
            seconds = max(sample(export, warmup, decode_tokens).values())
            if seconds < SHORTEST_SAMPLE:  # the first call also allocates
                seconds = max(sample(export, warmup, decode_tokens).values())
            enough = int(SHORTEST_SAMPLE / max(seconds, 1e-9))
            self._calls[plan] = 1 if isinstance(warmup, list) else max(1, min(50, enough))

    def round(self) -> None:
        """Take one more sample of every running plan, on the next batch, in a new order."""
        batch = self._batches[self.rounds % len(self._batches)]
        for plan in self._order.sample(self.running, len(self.running)):
            calls = self._calls[plan]
            if calls > 1:  # another plan's weights are in the cache, its threads may still look for work
                sample(self._exports[plan], batch, self._decode_tokens)
            self._samples[plan][self.rounds] = sample(self._exports[plan], batch, self._decode_tokens, calls)
        self.rounds += 1

    def drop(self, plan: str) -> None:
        """Stop timing a plan and keep its samples. The best dense plan must stay: others are compared with it."""
        assert all(plan != self.best_dense(phase) for phase in self.phases)
        self.running.remove(plan)

    @property
    def phases(self) -> list[Phase]:
        return list(next(iter(self._samples[self.running[0]].values()), {}))

    def best_dense(self, phase: Phase) -> str:
        """Return the fastest of the comparable dense plans."""
        running = [plan for plan in self.comparable if plan in self.running]
        return min(running, key=lambda plan: median(self.seconds(plan, phase)))

    def seconds(self, plan: str, phase: Phase) -> list[float]:
        return [sample[phase] for sample in self._samples[plan].values()]

    def ratios(self, plan: str, over: str, phase: Phase) -> list[float]:
        """Return how many times as fast as another plan this one was, in each round that both took part in."""
        mine, others = self._samples[plan], self._samples[over]
        return [others[index][phase] / mine[index][phase] for index in mine if index in others]

    def timings(self) -> list[Timing]:
        """Return the times of every plan, compared with the best dense plan and with `dense`, if it is in the race."""
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
    """Return the confidence interval of the median, by order statistics: it assumes no distribution of the values.

    Each of n values falls above or below the median like a tossed coin, so the k-th smallest lies above it with the
    probability of fewer than k tails (Conover, Practical Nonparametric Statistics, 1999, 3.2). The interval is
    (0, infinity) where n is too small for this confidence: 99 % need 8.
    """
    ordered, n = sorted(values), len(values)
    most = (1 - confidence) / 2 * 2**n
    tosses = k = 0
    while k < n and (tosses := tosses + math.comb(n, k)) <= most:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


def sample(export: AnyExport, batch: Batch | Texts, decode_tokens: int = 16, calls: int = 1) -> dict[Phase, float]:
    """Return mean seconds of each phase over some calls; of a list of texts with its tokenisation."""
    start = time.perf_counter()
    if isinstance(batch, list):
        one: Any = export
        for _ in range(calls):
            one.encode(batch) if hasattr(one, "encode") else one.classify(batch)
        return {"list": (time.perf_counter() - start) / calls}
    ids_BL, mask_BL = batch
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
    """Return what was measured on, and with which engines, without the name of the host."""
    return {
        "cpu": cpu_name(),
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


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, its family and its instructions for fast int8 and bfloat16 arithmetic.

    Virtual machines name many generations alike, such as "AMD EPYC": 25 with AVX-512 is Zen 4 and 26 is Zen 5, which
    has twice its speed.
    """
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    known = [f"family {fields['cpu family']}"] if "cpu family" in fields else []
    known += [label for label, flag in _FLAGS.items() if flag in flags]
    return f"{name} ({', '.join(known)})" if known else name
