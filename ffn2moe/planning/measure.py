"""Time all plans of an export side by side at the shapes of a workload, and drop those that cannot win.

After 3, 6, 12 rounds the plans that came near the best dense plan in no round are dropped, the noise of the measure
allowed for. From the round on that gives confidence intervals, those are dropped whose whole interval lies behind the
fastest plan; a dense plan has to lie behind the best dense one, so that nothing is compared with a slower one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ffn2moe.planning import timing
from ffn2moe.planning.timing import CLOSE, AnyExport, Phase, Race, Timing
from ffn2moe.runtime.engines import CPU, ENGINES
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import no_such_plan, read_manifest
from ffn2moe.runtime.plans import PLANS, UNMEASURED_PLANS, form_of, is_dense, plan_of
from ffn2moe.runtime.workload import Shape, Workload

ROUNDS = 60  # the most for one shape
ENOUGH_ROUNDS = 8  # the fewest that give a confidence interval
RUNGS = (3, 6, 12, 24, 48)  # rounds after which hopeless plans are dropped
# By this over the rounds a plan may miss the best dense plan's speed before it is hopeless: 20 % after 3.
SLACK = 0.6
PRECISION = 0.02  # of a ratio: rounds end when its interval reaches at most this far to either side
MIN_RETENTION = 0.97  # the default share of the teacher's quality that a plan must keep

# Wraps the rounds of one shape while they run: (what is timed, rounds) -> rounds.
Track = Callable[[str, range], Iterator[int]]


@dataclass(frozen=True)
class Setting:
    """What the plans of an export are compared for."""

    path: Path
    workload: Workload
    threads: Sequence[int]  # the numbers of threads, each by itself
    keeps_quality: Mapping[str, bool]  # of each plan (`quality_of`)
    decode_tokens: int = 16  # that a model writes after a prompt
    retention: Mapping[str, float] = field(default_factory=dict)  # the share of the quality that each plan keeps


@dataclass(frozen=True)
class Measured:
    """The timings of a machine, in the order of threads, shapes, phases and plans."""

    setting: Setting
    timings: list[Timing]
    left_out: dict[str, str]  # plan -> why it does not run here
    lists: list[Timing] = field(default_factory=list)  # on lists of texts (`planning.lists`)


def measure(
    setting: Setting,
    texts: Sequence[str],
    *,
    plans: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    providers: Sequence[str] = CPU,
    track: Track = lambda _, rounds: iter(rounds),
    report: Callable[[list[Timing]], None] = lambda _: None,
) -> Measured:
    """Time the plans of an export on real texts, at every shape of a workload and number of threads.

    `plans` None times all but those that cannot win on a CPU (`Plan.raced`). Plans of OpenVINO, dense ones and
    mixtures, are compiled for the shapes, as `runtime.export.open_export` does for chosen plans. At most `rounds` each,
    and `seconds` in all, shared out by the tokens of the shapes, but never too few rounds for an interval. A plan that
    does not run here is left out, with the reason. `report` gets the timings of each shape when it is done.

    ValueError for an unknown plan, a workload that the model cannot read, or an export of which no dense plan and no
    portable one runs: nothing could be compared.
    """
    path, workload, keeps_quality = setting.path, setting.workload, setting.keeps_quality
    manifest = read_manifest(path)
    require_plans(path, manifest, plans)
    require_readable(workload, manifest, setting.decode_tokens)
    if not any(text.strip() for text in texts):
        raise ValueError(
            "there is no text to time the plans on: give real ones, as routing decides the cost of a mixture"
        )
    left_out: dict[str, str] = {}
    timings: list[Timing] = []
    end = time.monotonic() + seconds
    tokens_left = len(setting.threads) * sum(shape.tokens for shape in workload.shapes)
    for count in setting.threads:
        exports = open_plans(path, plans_to_time(manifest["plans"], plans, providers), count, providers, left_out)
        for shape in workload.shapes:
            batches = _prepared(exports, texts, shape, setting, left_out)
            baselines = [plan for plan in baselines_of(manifest) if plan in exports and keeps_quality.get(plan, False)]
            if not baselines:
                raise ValueError(_no_baseline(path, manifest, left_out))
            race = Race(exports, batches, threads=count, decode_tokens=setting.decode_tokens, comparable=baselines)
            share = (end - time.monotonic()) * shape.tokens / tokens_left
            label = f"{shape}, {count} {'thread' if count == 1 else 'threads'}"
            run_race(race, keeps_quality, rounds=rounds, seconds=share, track=partial(track, label))
            tokens_left -= shape.tokens
            found = race.timings()
            report(found)
            timings += found
    return Measured(setting, [row for row in timings if row.plan not in left_out], left_out)


def plans_to_time(known: Iterable[str], plans: Sequence[str] | None, providers: Sequence[str]) -> list[str]:
    """Return the plans to time: the named ones, else all but those that cannot win on a CPU."""
    if plans is not None:
        return [plan for plan in known if plan in plans]
    on_cpu = tuple(providers) == CPU
    return [plan for plan in known if form_of(plan) not in PLANS or plan_of(plan).raced or not on_cpu]


def open_plans(
    path: Path, plans: Sequence[str], threads: int, providers: Sequence[str], left_out: dict[str, str]
) -> dict[str, AnyExport]:
    """Open the plans that run here, and note the others in `left_out`. Only some engines take providers."""
    exports: dict[str, AnyExport] = {}
    for plan in plans:
        if plan not in left_out:
            with _noting(plan, left_out):
                takes_providers = ENGINES[plan_of(plan).engine].takes_providers
                exports[plan] = open_export(path, plan, threads, providers if takes_providers else CPU)
    return exports


def _prepared(
    exports: dict[str, AnyExport],
    texts: Sequence[str],
    shape: Shape,
    setting: Setting,
    left_out: dict[str, str],
) -> list[timing.Batch]:
    """Return the batches of a shape; compile and run every plan once for it, and close those that fail."""
    timing.fix(exports, setting.workload.fixed & {(shape.batch, shape.sequence)})
    batches: list[timing.Batch] = []
    for plan in list(exports):
        with _noting(plan, left_out):
            batches = batches or timing.full_batches(exports[plan], texts, shape.batch, shape.sequence)
            timing.sample(exports[plan], batches[0], setting.decode_tokens)
        if plan in left_out:
            del exports[plan]
    return batches


@contextmanager
def _noting(plan: str, reasons: dict[str, str]) -> Iterator[None]:
    """Note why a plan does not run here where the block fails."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as reason:
        reasons[plan] = str(reason)


def run_race(
    race: Race,
    keeps_quality: Mapping[str, bool],
    *,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    track: Callable[[range], Iterator[int]] = iter,
) -> None:
    """Run rounds until the deciding ratios are known well, there were enough rounds, or the time is spent."""
    end = time.monotonic() + seconds
    for _ in track(range(rounds)):
        race.round()
        if race.rounds in RUNGS:
            for plan in hopeless(race, keeps_quality):
                race.drop(plan)
        if race.rounds >= ENOUGH_ROUNDS:
            for plan in behind(race, keeps_quality):
                race.drop(plan)
        if race.rounds >= ENOUGH_ROUNDS and (time.monotonic() > end or settled(race, keeps_quality)):
            return


def hopeless(race: Race, keeps_quality: Mapping[str, bool]) -> list[str]:
    """Return the running plans that came near the best dense plan's speed in no round and phase.

    A mixture that does not keep the quality can never be chosen, and is among them once its speed is roughly known. The
    best dense plan never is.
    """
    best = {phase: race.best_dense(phase) for phase in race.phases}
    found = []
    for plan in race.running:
        if plan in best.values():
            continue
        fastest = max(max(race.ratios(plan, best[phase], phase)) for phase in race.phases)
        if fastest < 1 - SLACK / race.rounds or not keeps_quality.get(plan, False):
            found.append(plan)
    return found


def behind(race: Race, keeps_quality: Mapping[str, bool]) -> list[str]:
    """Return the running plans that are slower in every phase than the one they have to beat, beyond the noise.

    For a dense plan that is the best dense plan, else the fastest plan that keeps the quality. They are slower by more
    than `CLOSE` allows: such a plan may stand for the fastest.
    """
    ahead: dict[Phase, tuple[str, str]] = {}
    for phase in race.phases:
        best = race.best_dense(phase)
        able = [plan for plan in race.running if plan == best or keeps_quality.get(plan, False)]
        ahead[phase] = best, max(able, key=lambda plan: median(race.ratios(plan, best, phase)))
    kept = {plan for both in ahead.values() for plan in both}

    def is_behind(plan: str, phase: Phase) -> bool:
        best, fastest = ahead[phase]
        rival = best if plan in race.comparable else fastest
        return timing.median_interval(race.ratios(plan, rival, phase))[1] < CLOSE

    return [plan for plan in race.running if plan not in kept and all(is_behind(plan, phase) for phase in race.phases)]


def settled(race: Race, keeps_quality: Mapping[str, bool]) -> bool:
    """Return whether the ratios of the fastest mixture, and of plans close to it, are known to `PRECISION`."""
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
            if high < 1:  # surely slower: how much decides nothing
                continue
            if middle >= CLOSE * leading and max(high - middle, middle - low) > PRECISION * middle:
                return False
    return True


def baselines_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the plans that others are compared with: dense ones, or in an export without any its portable plan."""
    known = [plan for plan in manifest["plans"] if form_of(plan) in PLANS]
    portable = (manifest["portable"],) if "portable" in manifest else UNMEASURED_PLANS
    return [plan for plan in known if is_dense(plan)] or [plan for plan in known if plan in portable]


def _no_baseline(path: Path, manifest: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
    failed = "; ".join(f"{plan}: {why}" for plan, why in left_out.items() if plan in baselines_of(manifest))
    remedy = f"those it has do not run ({failed})" if failed else "make it from its teacher again, with dense plans"
    return f"no dense plan of {path} can be timed here, so there is nothing to compare with: {remedy}"


def require_plans(path: Path, manifest: Mapping[str, Any], plans: Sequence[str] | None) -> None:
    """Raise ValueError where an export does not have these plans, or none to compare with."""
    known = manifest["plans"]
    for plan in plans or ():
        if plan not in known:
            raise ValueError(no_such_plan(path, manifest, plan))
    baselines = baselines_of(manifest)
    if not baselines:
        raise ValueError(_no_baseline(path, manifest, {}))
    if plans is not None and not set(baselines) & set(plans):
        kind = "dense" if is_dense(baselines[0]) else "the portable one"
        raise ValueError(
            f"none of the plans {', '.join(plans)} is {kind}: name one to compare with, of {', '.join(baselines)}"
        )


def require_readable(workload: Workload, manifest: Mapping[str, Any], decode_tokens: int) -> None:
    """Raise ValueError where the workload has texts that the model cannot read, or would truncate."""
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


def retention_of(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of the teacher's quality that each plan keeps; `dense` is the teacher.

    It is the measured one (`retention`). Where nobody has measured it, the agreement of a quantised plan's output with
    PyTorch's stands for it, and a plan that computes what PyTorch does keeps all of it.
    """
    return {
        plan: 1.0 if plan == "dense" else float(entry.get("retention", entry.get("agreement", 1.0)))
        for plan, entry in manifest["plans"].items()
    }


def quality_of(manifest: Mapping[str, Any], min_retention: float) -> dict[str, bool]:
    """Return which plans keep at least this share of the teacher's quality (`retention_of`); `dense` always does."""
    kept = retention_of(manifest)
    return {plan: plan == "dense" or share >= min_retention for plan, share in kept.items()}
