"""Time plans on lists of texts, as `encode` and `classify` get them.

A list is sorted by length and cut into batches, each of another shape. A plan that is compiled for the shapes of a
workload may lose there what it wins in the race of shapes (docs/decisions/0034).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ffn2moe.planning import timing
from ffn2moe.planning.measure import ENOUGH_ROUNDS, Measured, Setting, Track, baselines_of, open_plans, run_race
from ffn2moe.planning.shipping import is_portable
from ffn2moe.planning.timing import AnyExport, Race, Timing
from ffn2moe.runtime.batching import BATCH_TOKENS
from ffn2moe.runtime.engines import CPU
from ffn2moe.runtime.export import OPENED
from ffn2moe.runtime.files import read_manifest

TEXTS, FEWEST = 96, 16  # of a list: so many, and fewer of a slow model, but enough for several batches
ROUNDS = 24  # the most
SECONDS = 20.0  # for one number of threads, about
NEAR = 0.7  # of the fastest plan's speed in the race of shapes: a plan further behind does not win on lists


def reads_lists(head: str) -> bool:
    """Return whether a model with this head reads lists of texts in batches of like length."""
    kind = OPENED[head]
    return not hasattr(kind, "generate") and (hasattr(kind, "encode") or hasattr(kind, "classify"))


def with_lists(
    measured: Measured,
    texts: Sequence[str],
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    providers: Sequence[str] = CPU,
    track: Track = lambda _, rounds: iter(rounds),
    report: Callable[[list[Timing]], None] = lambda _: None,
) -> Measured:
    """Return what was measured, with timings of lists of `texts` for each number of threads (phase `list`).

    Plans take turns on up to `rounds` lists, and no more than `ROUNDS`, in about `seconds` for each number of threads.
    They are opened for any shape. Nothing is timed where the model reads no lists, where one plan alone can win, or
    where the rounds are too few for an interval.
    """
    setting = measured.setting
    manifest = read_manifest(setting.path)
    if not reads_lists(manifest["spec"]["head"]) or rounds < ENOUGH_ROUNDS:
        return measured
    comparable = [plan for plan in baselines_of(manifest) if setting.keeps_quality.get(plan, False)]
    found: list[Timing] = []
    for threads in setting.threads:
        plans = contenders([row for row in measured.timings if row.threads == threads], setting, comparable)
        exports = open_plans(setting.path, plans if len(plans) > 1 else [], threads, providers, {})
        if not any(plan in exports for plan in comparable):
            continue
        lists = lists_of(texts, exports, seconds)
        race = Race(exports, lists, threads=threads, comparable=comparable)
        label = f"lists of {len(lists[0])} texts, {threads} {'thread' if threads == 1 else 'threads'}"
        run_race(race, setting.keeps_quality, rounds=min(rounds, ROUNDS), seconds=seconds, track=partial(track, label))
        report(race.timings())
        found += race.timings()
    return replace(measured, lists=found)


def contenders(rows: Sequence[Timing], setting: Setting, comparable: Sequence[str]) -> list[str]:
    """Return the plans that can win on lists, by the race of shapes.

    They keep the quality, and are the fastest at a shape, or near the fastest at the shape whose tokens are most like
    those of a list's batches. The dense plans near the best dense one, and the fastest portable mixture, which ships in
    any case, are always among them.
    """
    able = [row for row in rows if setting.keeps_quality.get(row.plan, False)]
    shapes = setting.workload.shapes
    alike = min(shapes, key=lambda shape: abs(math.log(shape.tokens / BATCH_TOKENS)))
    speeds = {
        (shape.batch, shape.sequence): {
            row.plan: row.speedup_vs_best_dense
            for row in able
            if (row.batch, row.sequence) == (shape.batch, shape.sequence)
        }
        for shape in shapes
    }
    speed = speeds[alike.batch, alike.sequence]
    portable = [plan for plan in speed if is_portable(plan) and plan not in comparable]
    found = {max(some, key=lambda plan: some[plan]) for some in speeds.values()}
    found |= {max(portable, key=lambda plan: speed[plan])} if portable else set()
    for rivals in (list(speed), [plan for plan in speed if plan in comparable]):
        fastest = max(speed[plan] for plan in rivals)
        found |= {plan for plan in rivals if speed[plan] >= NEAR * fastest}
    return [plan for plan in speed if plan in found]


def lists_of(texts: Sequence[str], exports: Mapping[str, AnyExport], seconds: float) -> list[list[str]]:
    """Return a list of texts for each round, and one more; they are short enough for `seconds`, if they can be.

    Each is drawn anew, so its batches have other shapes. A text comes twice in a list only where there are too few.
    """
    draw = random.Random(0)
    usable = [text for text in texts if text.strip()]

    def drawn(count: int) -> list[str]:
        return draw.sample(usable * math.ceil(count / len(usable)), count)

    spent = 0.0
    for export in exports.values():
        timing.sample(export, drawn(2))  # compiles
        spent += timing.sample(export, drawn(FEWEST))["list"]
    affordable = int(FEWEST * seconds / ((ROUNDS + 1) * max(spent, 1e-9)))
    count = max(FEWEST, min(TEXTS, affordable))
    return [drawn(count) for _ in range(ROUNDS + 1)]
