"""Choose, by measuring, which plan of an export runs which batches on this machine.

A workload says which shapes come how often: batch x sequence in tokens, with weights that are shares of the batches.
All plans of all engines are timed side by side at each shape (`ffn2moe.planning.timing`), and what trails the best
dense plan is left behind early: after 3, 6, 12 rounds the slower half of what never once came near it (successive
halving, Jamieson and Talwalkar 2016, with the noise of the measure as a bar). Chosen is, for every shape,

- a mixture, only if the whole confidence interval of its ratio to the best dense plan lies above 1;
- else the best dense plan of all engines, or one that cannot be told from it.

So no batch is slower than with the best dense plan, as far as can be measured. An open plan costs memory: of the sets
of plans whose time for the whole workload cannot be told from the best, the one with the fewest plans is kept.

A model that writes is judged by its two phases, prefill and decode, each as often as it comes; a model with an encoder
and a decoder by whole requests, on one plan.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ffn2moe.planning import timing
from ffn2moe.planning.timing import AnyExport, Phase, Race, Timing
from ffn2moe.runtime.engines import CPU, ENGINES
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import PLAN_FILE, read_manifest
from ffn2moe.runtime.plans import is_dense, plan_of
from ffn2moe.runtime.workload import Shape, Workload

ROUNDS = 60  # of one shape, at most
ENOUGH_ROUNDS = 8  # the fewest that an interval can be told from
RUNGS = (3, 6, 12, 24, 48)  # rounds after which the slower half of the hopeless goes
SLACK = (
    0.6  # by this over the rounds a plan may miss the best dense plan's speed, and is not yet hopeless: 20 % after 3
)
PRECISION = 0.01  # of a ratio: rounds end where its interval reaches no further than this to either side
CLOSE = 0.97  # of another plan's speed: what comes this near is measured as precisely, and may stand for it
WORTH = 0.02  # of the time of the workload: what another open plan has to save at least
MIN_RETENTION = 0.97  # where nothing else was said: what a plan must keep of the teacher's quality

# Wraps the rounds of one shape while they are worked through: (what is timed, rounds) -> rounds.
Track = Callable[[str, range], Iterator[int]]


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was found out on a machine: timings in the order of threads, shapes, phases and plans."""

    timings: list[Timing]
    left_out: dict[str, str]  # plan -> why it does not run here


def measure(
    path: str | Path,
    texts: Sequence[str],
    workload: Workload,
    *,
    threads: Sequence[int],
    keeps_quality: Mapping[str, bool],
    plans: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    decode_tokens: int = 16,
    providers: Sequence[str] = CPU,
    track: Track = lambda _, rounds: iter(rounds),
    tell: Callable[[list[Timing]], None] = lambda _: None,
) -> Measured:
    """Times the plans of an export (None: all) on real texts, at every shape of a workload and number of threads.

    Plans of OpenVINO, dense ones and mixtures, are compiled for the shapes, as `runtime.open_export` does for what is
    chosen. At most `rounds` each, and `seconds` in all, shared out by the tokens of the shapes; but never fewer than
    are needed to tell anything. A plan that does not run here is left out, with the reason. `tell` hears of each shape
    when it is done. ValueError for an unknown plan, a workload that the model cannot read, or an export of which no
    dense plan runs: there is nothing to compare with.
    """
    path = Path(path)
    manifest = read_manifest(path)
    require_plans(path, manifest, plans)
    require_readable(workload, manifest, decode_tokens)
    if not any(text.strip() for text in texts):
        raise ValueError(
            "there is no text to time the plans on: give real ones, as routing decides what a mixture costs"
        )
    left_out: dict[str, str] = {}
    timings: list[Timing] = []
    end = time.monotonic() + seconds
    tokens_left = len(threads) * sum(shape.tokens for shape in workload.shapes)
    for count in threads:
        wanted = [plan for plan in _raced(manifest["plans"], plans, providers) if plan not in left_out]
        exports: dict[str, AnyExport] = {}
        for plan in wanted:
            with _left_out(plan, left_out):
                exports[plan] = _opened(path, plan, count, providers)
        for shape in workload.shapes:
            timing.fix(exports, workload.fixed & {(shape.batch, shape.sequence)})
            batches: list[timing.Batch] = []
            for plan in list(exports):
                with _left_out(plan, left_out):
                    batches = batches or timing.full_batches(exports[plan], texts, shape.batch, shape.sequence)
                    timing.sample(exports[plan], batches[0], decode_tokens)
            exports = {plan: export for plan, export in exports.items() if plan not in left_out}
            dense = [plan for plan in exports if is_dense(plan) and keeps_quality.get(plan, False)]
            if not dense:
                raise ValueError(_no_dense(path, left_out))
            race = Race(exports, batches, threads=count, decode_tokens=decode_tokens, comparable=dense)
            share = (end - time.monotonic()) * shape.tokens / tokens_left
            label = f"{shape}, {count} {'thread' if count == 1 else 'threads'}"
            run_race(race, keeps_quality, rounds=rounds, seconds=share, track=partial(track, label))
            tokens_left -= shape.tokens
            found = race.timings()
            tell(found)
            timings += found
    return Measured([row for row in timings if row.plan not in left_out], left_out)


def _raced(known: Iterable[str], plans: Sequence[str] | None, providers: Sequence[str]) -> list[str]:
    """Return the plans to time: the named ones, else all but those that cannot win on a CPU."""
    if plans is not None:
        return [plan for plan in known if plan in plans]
    on_cpu = tuple(providers) == CPU
    return [plan for plan in known if plan_of(plan).raced or not on_cpu]


def run_race(
    race: Race,
    keeps_quality: Mapping[str, bool],
    *,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    track: Callable[[range], Iterator[int]] = iter,
) -> None:
    """Rounds until the ratios that may decide are known well, there were enough, or the time is spent."""
    end = time.monotonic() + seconds
    for _ in track(range(rounds)):
        race.round()
        if race.rounds in RUNGS:
            for plan in hopeless(race, keeps_quality):
                race.drop(plan)
        if race.rounds >= ENOUGH_ROUNDS and (time.monotonic() > end or settled(race, keeps_quality)):
            return


def hopeless(race: Race, keeps_quality: Mapping[str, bool]) -> list[str]:
    """The slower half of the running plans that came near the best dense plan's speed in no round, in no phase.

    A mixture that does not keep the quality can never be chosen, and goes as soon as its speed is roughly known. The
    best dense plan is never among them.
    """
    best = {phase: race.best_dense(phase) for phase in race.phases}
    trailing: dict[str, float] = {}
    for plan in race.running:
        if plan in best.values():
            continue
        ratios = {phase: race.ratios(plan, best[phase], phase) for phase in race.phases}
        if max(map(max, ratios.values())) < 1 - SLACK / race.rounds or not keeps_quality.get(plan, False):
            trailing[plan] = max(map(median, ratios.values()))
    slowest_first = sorted(trailing, key=lambda plan: (keeps_quality.get(plan, False), trailing[plan]))
    unfit = sum(not keeps_quality.get(plan, False) for plan in trailing)
    return slowest_first[: max(unfit, math.ceil(len(trailing) / 2))]


def settled(race: Race, keeps_quality: Mapping[str, bool]) -> bool:
    """Whether the ratios of the fastest mixture, and of what comes close to it, are known to `PRECISION`."""
    for phase in race.phases:
        best = race.best_dense(phase)
        ratios = {
            plan: race.ratios(plan, best, phase)
            for plan in race.running
            if plan != best and keeps_quality.get(plan, False)
        }
        leading = max((median(found) for found in ratios.values()), default=0.0)
        for found in ratios.values():
            low, high = timing.median_interval(found)
            middle = median(found)
            if high < 1:  # slower for sure: how much slower decides nothing
                continue
            if middle >= CLOSE * leading and max(high - middle, middle - low) > PRECISION * middle:
                return False
    return True


def _opened(path: Path, plan: str, threads: int, providers: Sequence[str]) -> AnyExport:
    """One plan. Execution providers are ONNX Runtime's: plans of other engines are opened as they are."""
    takes_providers = ENGINES[plan_of(plan).engine].takes_providers
    export: AnyExport = open_export(path, plan, threads, providers if takes_providers else CPU)
    return export


@contextmanager
def _left_out(plan: str, reasons: dict[str, str]) -> Iterator[None]:
    """Where the block fails, the plan is one that does not run here, and why is known."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as reason:
        reasons[plan] = str(reason)


def _no_dense(path: Path, left_out: Mapping[str, str]) -> str:
    failed = "; ".join(f"{plan}: {why}" for plan, why in left_out.items() if is_dense(plan))
    remedy = f"those it has do not run ({failed})" if failed else "make it from its teacher again, with dense plans"
    return f"no dense plan of {path} can be timed here, and without one nothing can be said to be faster: {remedy}"


def require_plans(path: Path, manifest: Mapping[str, Any], plans: Sequence[str] | None) -> None:
    """ValueError where an export has no such plans, or none that is dense."""
    known = manifest["plans"]
    for plan in plans or ():
        if plan not in known:
            refused = manifest.get("refused", {}).get(plan)
            because = f": {refused}" if refused else f"; it has: {', '.join(sorted(known))}"
            raise ValueError(f"{path} has no plan {plan!r}{because}")
    if not any(is_dense(plan) for plan in known):
        raise ValueError(_no_dense(path, {}))
    if plans is not None and not any(is_dense(plan) for plan in plans):
        dense = ", ".join(plan for plan in known if is_dense(plan))
        raise ValueError(f"none of the plans {', '.join(plans)} is dense: name one to compare with, of {dense}")


def require_readable(workload: Workload, manifest: Mapping[str, Any], decode_tokens: int) -> None:
    """ValueError where the workload has texts that the model cannot read, or would cut."""
    model, spec = manifest.get("model", {}), manifest["spec"]
    if model.get("reads", "text") != "text":
        raise ValueError("plans are timed on texts, and this model reads images: name a plan when you open it")
    held, longest = model.get("positions"), workload.longest
    if spec["head"] == "causal":
        if held is not None and longest + decode_tokens > held:
            raise ValueError(
                f"the workload has prompts of {longest} tokens, and with {decode_tokens} decoded after them that is "
                f"more than the {held} that the model can hold: lower one"
            )
    elif spec["head"] != "seq2seq" and longest > spec["max_length"]:
        raise ValueError(
            f"the workload has texts of {longest} tokens, and this export cuts them to {spec['max_length']}: "
            "give shorter ones"
        )


def quality_of(manifest: Mapping[str, Any], min_retention: float) -> dict[str, bool]:
    """Which plans keep enough of the teacher's quality; `dense` is the teacher.

    By what was measured (`retention`). Where nobody has measured it, a quantised plan counts by how well its output
    points in PyTorch's direction (`agreement`), and a plan that only computes what PyTorch does keeps all of it.
    """
    return {
        plan: plan == "dense" or float(entry.get("retention", entry.get("agreement", 1.0))) >= min_retention
        for plan, entry in manifest["plans"].items()
    }


# --- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What a plan is chosen for: batches of a shape or one phase of them, on a number of threads.

    The weight is how often it is run for one batch of the workload: of `decode`, once a token.
    """

    batch: int
    sequence: int
    phase: Phase
    weight: float
    rows: Mapping[str, Timing]

    @property
    def best_dense(self) -> Timing:
        return self.rows[next(iter(self.rows.values())).best_dense]

    def ms(self, plan: str) -> float:
        """Milliseconds of a plan, by its ratio to the best dense one within the same rounds."""
        return self.best_dense.median_ms / self.rows[plan].speedup_vs_best_dense

    def ms_at_worst(self, plan: str) -> float:
        row = self.rows[plan]
        return self.best_dense.median_ms / row.low if row.low > 0 else math.inf

    def ms_at_best(self, plan: str) -> float:
        return self.best_dense.median_ms / self.rows[plan].high

    def allows(self, plan: str) -> bool:
        """Whether a plan is faster here than the best dense one beyond the noise, or is dense and not slower."""
        row = self.rows[plan]
        if plan == self.best_dense.plan:
            return True
        if is_dense(plan):
            return row.speedup_vs_best_dense >= CLOSE and 1 <= row.high < math.inf
        return row.low > 1

    def __str__(self) -> str:
        return f"{self.batch} x {self.sequence}" + ("" if self.phase in ("whole", "request") else f" {self.phase}")


@dataclass(frozen=True)
class Choice:
    """The plans to use, for one number of threads, and why."""

    cells: tuple[Cell, ...]
    plan_of: tuple[str, ...]  # of each cell
    speedup: float  # of the whole workload, over the best dense plan of each cell
    low: float  # if every ratio were at the lower end of its interval, or at the upper
    high: float
    reason: str

    @property
    def plans(self) -> tuple[str, ...]:
        """Those that are used, by the time spent in them."""
        spent = {plan: 0.0 for plan in self.plan_of}
        for cell, plan in zip(self.cells, self.plan_of, strict=True):
            spent[plan] += cell.weight * cell.ms(plan)
        return tuple(sorted(spent, key=lambda plan: -spent[plan]))

    @property
    def best_dense(self) -> str:
        """Of the cell that most time would be spent in."""
        return max(self.cells, key=lambda cell: cell.weight * cell.best_dense.median_ms).best_dense.plan


def cells_of(
    timings: Sequence[Timing], workload: Workload, *, threads: int, head: str, decode_tokens: int
) -> list[Cell]:
    """What is to be chosen for on a number of threads: each shape, of a language model its phases."""
    weight_of: dict[Phase, float] = {"whole": 1, "prefill": 1, "decode": decode_tokens}
    if head == "seq2seq":
        weight_of = {"request": 1}
    cells = []
    for shape in workload.shapes:
        for phase, times in weight_of.items():
            rows = {
                row.plan: row
                for row in timings
                if (row.batch, row.sequence, row.threads, row.phase) == (shape.batch, shape.sequence, threads, phase)
            }
            if rows:
                cells.append(Cell(shape.batch, shape.sequence, phase, shape.weight * times, rows))
    return cells


def choose(cells: Sequence[Cell], keeps_quality: Mapping[str, bool], max_plans: int | None = None) -> Choice:
    """A plan for each cell: never one that is measurably slower than the best dense plan there.

    The fewest plans are kept whose time for all the work is the best or cannot be told from it, and `max_plans` at
    most. Where so few cannot be as fast as the best dense plan in every cell, the work as a whole decides: a mixture
    is taken only if all of it is faster, beyond the noise, than by as few dense plans.
    """
    plans = [plan for plan in cells[0].rows if keeps_quality.get(plan, False)]
    allowed = [[plan for plan in plans if cell.allows(plan)] for cell in cells]
    free = [min(some, key=cell.ms) for cell, some in zip(cells, allowed, strict=True)]
    spread = sum(
        cell.weight * (min(cell.ms_at_worst(plan), 2 * cell.ms(plan)) - cell.ms_at_best(plan)) / 2
        for cell, plan in zip(cells, free, strict=True)
    )
    best = _total(cells, free)
    enough = best + max(spread, WORTH * best)
    useful = [plan for plan in plans if any(plan in some for some in allowed)]
    for count in range(1, min(max_plans or len(cells), len(cells), len(useful)) + 1):
        found = [
            _assigned(cells, [[plan for plan in some if plan in kept] for some in allowed])
            for kept in combinations(useful, count)
        ]
        possible = [assigned for assigned in found if assigned is not None]
        if possible:
            fastest = min(possible, key=partial(_total, cells))
            if _total(cells, fastest) <= enough or count == max_plans:
                return _choice(cells, fastest, keeps_quality)
    assert max_plans is not None, "with a plan for every cell the time is the best"
    return _choice(cells, _compromise(cells, plans, max_plans), keeps_quality)


def _compromise(cells: Sequence[Cell], plans: Sequence[str], max_plans: int) -> tuple[str, ...]:
    """With too few plans to be the best everywhere: the fastest for all the work, and dense if that is not sure."""

    def fastest(among: Sequence[str], ms: Callable[[Cell, str], float]) -> tuple[str, ...]:
        sets = combinations(among, min(max_plans, len(among)))
        assigned = [tuple(min(kept, key=partial(ms, cell)) for cell in cells) for kept in sets]
        return min(assigned, key=lambda one: sum(c.weight * ms(c, p) for c, p in zip(cells, one, strict=True)))

    def surely(cell: Cell, plan: str) -> float:
        return cell.ms(plan) if is_dense(plan) else cell.ms_at_worst(plan)

    dense = fastest([plan for plan in plans if is_dense(plan)], Cell.ms)
    best = fastest(plans, surely)
    return (
        best if sum(c.weight * surely(c, p) for c, p in zip(cells, best, strict=True)) < _total(cells, dense) else dense
    )


def _assigned(cells: Sequence[Cell], options: Sequence[Sequence[str]]) -> tuple[str, ...] | None:
    """The fastest of the options of each cell; None where a cell has none."""
    if not all(options):
        return None
    return tuple(min(some, key=cell.ms) for cell, some in zip(cells, options, strict=True))


def _total(cells: Sequence[Cell], assigned: Sequence[str]) -> float:
    return sum(cell.weight * cell.ms(plan) for cell, plan in zip(cells, assigned, strict=True))


def _choice(cells: Sequence[Cell], assigned: Sequence[str], keeps_quality: Mapping[str, bool]) -> Choice:
    dense = sum(cell.weight * cell.best_dense.median_ms for cell in cells)
    pairs = list(zip(cells, assigned, strict=True))
    worst = sum(cell.weight * cell.ms_at_worst(plan) for cell, plan in pairs)
    best = sum(cell.weight * cell.ms_at_best(plan) for cell, plan in pairs)
    speedup = dense / _total(cells, assigned)
    low, high = dense / worst, dense / best if best else math.inf
    reason = _reason(cells, assigned, keeps_quality, speedup, low, high)
    return Choice(tuple(cells), tuple(assigned), speedup, low, high, reason)


def _reason(
    cells: Sequence[Cell],
    assigned: Sequence[str],
    keeps_quality: Mapping[str, bool],
    speedup: float,
    low: float,
    high: float,
) -> str:
    used = list(dict.fromkeys(assigned))
    mixtures = [plan for plan in cells[0].rows if not is_dense(plan)]
    shipped = " and ".join(used)
    if all(is_dense(plan) for plan in used):
        able = [plan for plan in mixtures if keeps_quality.get(plan, False)]
        default = f"{shipped} {'is' if len(used) == 1 else 'are'} the default"
        if not able:
            return f"no mixture plan {'keeps the quality' if mixtures else 'was timed'}: {default}"
        cell, plan = max(
            ((cell, plan) for cell in cells for plan in able), key=lambda one: one[0].rows[one[1]].speedup_vs_best_dense
        )
        row = cell.rows[plan]
        noise = (
            f"{row.low:.2f} to {row.high:.2f}" if row.high < math.inf else f"{row.rounds} rounds are too few to tell"
        )
        rival = " or ".join(dict.fromkeys(cell.best_dense.plan for cell in cells))
        return (
            f"no mixture plan beats {rival} here beyond the noise ({plan} comes nearest, at {cell} with "
            f"{row.speedup_vs_best_dense:.2f}x its speed, {noise}): {default}"
        )
    rivals = list(dict.fromkeys(cell.best_dense.plan for cell in cells))
    over = rivals[0] if len(rivals) == 1 else f"the best dense plan of each shape ({', '.join(rivals)})"
    whole = f"{speedup:.2f}x as fast as {over} ({low:.2f} to {high:.2f})"
    if len(used) == 1:
        return f"{used[0]} is {whole}"
    where = {plan: [str(cell) for cell, one in zip(cells, assigned, strict=True) if one == plan] for plan in used}
    told = "; ".join(f"{plan} for {', '.join(shapes)}" for plan, shapes in where.items())
    return f"{told}: {whole}"


# --- plan.json ------------------------------------------------------------------------------------------------------


def planned(
    path: str | Path,
    measured: Measured,
    workload: Workload,
    *,
    threads: Sequence[int],
    keeps_quality: Mapping[str, bool],
    min_retention: float,
    decode_tokens: int = 16,
    max_plans: int | None = None,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """What plan.json says: the plan chosen for each shape and number of threads, and everything it was chosen by.

    `default_plan`, `best_dense_plan`, `speedup_vs_best_dense` and `reason` are those of the first number of threads,
    the speed-up that of the whole workload. `choices` has a row for each shape (and phase), which
    `ffn2moe.runtime.export` goes by. `memory_mib` is the most memory of a process that opens the plans one after the
    other, measured; with several plans `agreement` is the least mean cosine of the embeddings that two of them give the
    same texts.
    """
    path = Path(path)
    head = read_manifest(path)["spec"]["head"]
    if head == "seq2seq":
        max_plans = 1
    choices = {
        count: choose(
            cells_of(measured.timings, workload, threads=count, head=head, decode_tokens=decode_tokens),
            keeps_quality,
            max_plans,
        )
        for count in threads
    }
    first = choices[threads[0]]
    kept = list(dict.fromkeys(plan for choice in choices.values() for plan in choice.plans))
    plans = list(dict.fromkeys(row.plan for row in measured.timings))
    apart = {
        plan: [
            (cell.batch, cell.sequence)
            for cell, one in zip(first.cells, first.plan_of, strict=True)
            if one == plan and (cell.batch, cell.sequence) in workload.fixed
        ]
        for plan in kept
    }
    content: dict[str, Any] = {
        "default_plan": first.plans[0],
        "best_dense_plan": first.best_dense,
        "speedup_vs_best_dense": _digits(first.speedup),
        "reason": first.reason,
        "plans": kept,
        "choices": [
            _chosen(cell, plan, count)
            for count, choice in choices.items()
            for cell, plan in zip(choice.cells, choice.plan_of, strict=True)
        ],
        "by_threads": [
            {
                "threads": count,
                "plans": list(choice.plans),
                "speedup_vs_best_dense": _digits(choice.speedup),
                "low": _digits(choice.low),
                "high": _digits(choice.high),
                "reason": choice.reason,
            }
            for count, choice in choices.items()
        ],
        "workload": {
            "source": workload.source,
            "shapes": [
                {"batch": one.batch, "sequence": one.sequence, "weight": _digits(one.weight)} for one in workload.shapes
            ],
            "decode_tokens": decode_tokens if head in ("causal", "seq2seq") else None,
        },
        "confidence": timing.CONFIDENCE,
        "left_out": measured.left_out,
        "min_retention": min_retention,
        "keeps_quality": dict(keeps_quality),
        "memory_mib": memory_of(path, apart, workload.largest, threads[0]),
        "machine": timing.machine(),
        "timings": {plan: [row_of(row) for row in measured.timings if row.plan == plan] for plan in plans},
    }
    if head == "embedding" and len(kept) > 1 and texts:
        content["agreement"] = _digits(agreement_of(path, kept, texts, threads[0]))
    return content


def _chosen(cell: Cell, plan: str, threads: int) -> dict[str, Any]:
    row = cell.rows[plan]
    return {
        "batch": cell.batch,
        "sequence": cell.sequence,
        "phase": cell.phase,
        "threads": threads,
        "weight": _digits(cell.weight),
        "plan": plan,
        "best_dense_plan": cell.best_dense.plan,
        "median_ms": _digits(row.median_ms),
        "best_dense_ms": _digits(cell.best_dense.median_ms),
        "speedup_vs_best_dense": _digits(row.speedup_vs_best_dense),
        "low": _digits(row.low),
        "high": _digits(row.high),
        "rounds": row.rounds,
    }


def row_of(row: Timing) -> dict[str, Any]:
    """One timing for a file, without its plan's name and without digits that mean nothing; null: not known."""
    values = {key: value for key, value in asdict(row).items() if key != "plan"}
    values["tokens_per_second"] = row.tokens_per_second
    return {key: _digits(value) if isinstance(value, float) else value for key, value in values.items()}


def _digits(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def agreement_of(path: Path, plans: Sequence[str], texts: Sequence[str], threads: int) -> float:
    """The least mean cosine of the embeddings that two plans give the same texts: who compares them may meet both."""
    found = [open_export(path, plan, threads).encode([text for text in texts if text.strip()][:64]) for plan in plans]
    return min(float(np.mean((one * other).sum(1))) for one, other in combinations(found, 2))


def memory_of(
    path: Path, shapes_of: Mapping[str, Sequence[tuple[int, int]]], largest: Shape, threads: int
) -> dict[str, float]:
    """The most memory, in MiB, that a fresh process has held after opening each plan beside those before it, and
    running it at the largest shape and at those that it is compiled for apart."""
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


def write(path: str | Path, content: Mapping[str, Any]) -> Path:
    """plan.json of an export, beside its place first and then moved there: it is never half written."""
    file = Path(path) / PLAN_FILE
    partial_file = file.with_name(f".{file.name}.partial")
    partial_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial_file, file)
    return file


def bounds_of(folder: Path, length: int, plan: str) -> dict[str, float]:
    """How much faster a plan of a mixture could be end to end: by its FLOPs, and by Amdahl's law (routing for free).

    For texts of `length` tokens, on the engine and in the precision of the dense model it is compared with. A dense
    plan stands for the mixture as its spec has it.
    """
    from transformers import AutoConfig

    from ffn2moe import metrics
    from ffn2moe.moe import checkpoint
    from ffn2moe.moe.variants import Variant

    entry = read_manifest(folder)["plans"][plan]
    spec = Variant.of(entry).spec(checkpoint.load_spec(folder / "checkpoint"))
    config = AutoConfig.from_pretrained(folder / "checkpoint")
    teacher, student = metrics.flops_per_token(spec, config, length)
    return {
        "flops": round(teacher.total / student.total, 4),
        "amdahl": round(metrics.amdahl_bound(teacher, spec.active_share), 4),
        "ffn_share": round(teacher.ffn / teacher.total, 4),
    }
