"""Choose a plan for every shape of a workload from what was measured.

For every shape (and phase) the choice is

- a mixture, only if the whole confidence interval of its ratio to the best dense plan lies above 1;
- else the best dense plan of all engines, or one whose speed cannot be told apart from it.

So no batch is slower than with the best dense plan, within the noise of the measure. An open plan costs memory: among
the sets of plans whose time for the whole workload cannot be told apart from the best, one with the fewest plans is
kept, and of these the one that keeps most quality. A model that writes is judged by its two phases, prefill and decode,
each as often as it comes; a model with an encoder and a decoder by whole requests, on one plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from ffn2moe.planning.timing import CLOSE, Phase, Timing
from ffn2moe.runtime.plans import is_dense
from ffn2moe.runtime.workload import Workload

Fits = Callable[[Sequence[str]], bool]  # whether some plans may be used together

WORTH = 0.02  # of the time of the workload: another open plan has to save at least this
WORTH_BOTH = 0.1  # of the product of the times of shapes and of lists: one plan for both has to save at least this
TOLD_APART = 0.002  # of the teacher's quality: between plans that differ by less the time decides


@dataclass(frozen=True)
class Cell:
    """Batches of a shape, or one phase of them, for which a plan is chosen on a number of threads.

    The weight is how often it runs for one batch of the workload; `decode` runs once a token.
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
        """Return milliseconds of a plan, by its ratio to the best dense one within the same rounds."""
        return self.best_dense.median_ms / self.rows[plan].speedup_vs_best_dense

    def ms_at_worst(self, plan: str) -> float:
        row = self.rows[plan]
        return self.best_dense.median_ms / row.low if row.low > 0 else math.inf

    def ms_at_best(self, plan: str) -> float:
        return self.best_dense.median_ms / self.rows[plan].high

    def spread_ms(self, plan: str) -> float:
        """Return half of what the noise leaves open, at most about the plan's own time."""
        return (min(self.ms_at_worst(plan), 2 * self.ms(plan)) - self.ms_at_best(plan)) / 2

    def allows(self, plan: str) -> bool:
        """Return whether a plan is faster here than the best dense one beyond the noise, or is dense and not slower."""
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
    """The plans to use on one number of threads, and why."""

    cells: tuple[Cell, ...]
    plan_of: tuple[str, ...]  # of each cell
    speedup: float  # of the whole workload, over the best dense plan of each cell
    low: float  # if every ratio were at the lower end of its interval, or at the upper
    high: float
    reason: str

    @property
    def plans(self) -> tuple[str, ...]:
        """The plans in use, by the time spent in them."""
        spent = {plan: 0.0 for plan in self.plan_of}
        for cell, plan in zip(self.cells, self.plan_of, strict=True):
            spent[plan] += cell.weight * cell.ms(plan)
        return tuple(sorted(spent, key=lambda plan: -spent[plan]))

    @property
    def best_dense(self) -> str:
        """The best dense plan of the cell that takes most time."""
        return max(self.cells, key=lambda cell: cell.weight * cell.best_dense.median_ms).best_dense.plan


def cells_of(
    timings: Sequence[Timing], workload: Workload, *, threads: int, head: str, decode_tokens: int
) -> list[Cell]:
    """Return what to choose for on a number of threads: each shape, and each phase where a model writes."""
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


def _any_fit(plans: Sequence[str]) -> bool:
    return True


def choose(
    cells: Sequence[Cell],
    keeps_quality: Mapping[str, bool],
    max_plans: int | None = None,
    fits: Fits = _any_fit,
    retention: Mapping[str, float] | None = None,
) -> Choice:
    """Choose a plan for each cell: never one that is measurably slower than the best dense plan there.

    The fewest plans are kept whose time for all the work is the best or cannot be told apart from it, `max_plans` at
    most; several only where `fits` allows them together. Of as few mixtures the ones are taken that keep most of the
    teacher's quality, where `retention` says how much. Where so few cannot be as fast as the best dense plan in every
    cell, the work as a whole decides: a mixture is taken only if all of it is faster, beyond the noise, than by as few
    dense plans.
    """
    plans = [plan for plan in cells[0].rows if keeps_quality.get(plan, False)]
    allowed = [[plan for plan in plans if cell.allows(plan)] for cell in cells]
    free = [min(some, key=cell.ms) for cell, some in zip(cells, allowed, strict=True)]
    spread = sum(cell.weight * cell.spread_ms(plan) for cell, plan in zip(cells, free, strict=True))
    best = _total(cells, free)
    enough = best + max(spread, WORTH * best)
    useful = [plan for plan in plans if any(plan in some for some in allowed)]
    fastest: tuple[str, ...] | None = None
    for count in range(1, min(max_plans or len(cells), len(cells), len(useful)) + 1):
        found = [
            _assigned(cells, [[plan for plan in some if plan in kept] for some in allowed])
            for kept in combinations(useful, count)
            if count == 1 or fits(kept)
        ]
        possible = [assigned for assigned in (*found, fastest) if assigned is not None]
        fastest = min(possible, key=partial(_total, cells), default=None)
        if fastest is not None and _total(cells, fastest) <= enough:
            fastest = _best_kept(cells, [one for one in possible if _total(cells, one) <= enough], retention or {})
            break
    if fastest is None:
        fastest = _compromise(cells, plans, max_plans or len(cells), fits)
    return _choice(cells, fastest, keeps_quality)


def _best_kept(
    cells: Sequence[Cell], alike: Sequence[tuple[str, ...]], retention: Mapping[str, float]
) -> tuple[str, ...]:
    """Return the fastest choice that keeps about most quality, of those with a mixture wherever the fastest has one."""
    fastest = min(alike, key=partial(_total, cells))
    roles = [is_dense(plan) for plan in fastest]

    def kept(plans: Sequence[str]) -> float:
        return min(retention.get(plan, 1.0) for plan in plans)

    same = [one for one in alike if [is_dense(plan) for plan in one] == roles]
    most = max(map(kept, same))
    return min((one for one in same if kept(one) >= most - TOLD_APART), key=partial(_total, cells))


def _compromise(cells: Sequence[Cell], plans: Sequence[str], max_plans: int, fits: Fits) -> tuple[str, ...]:
    """Choose with too few plans to be the best everywhere: the fastest for all the work, or dense if that is unsure."""

    def fastest(among: Sequence[str], ms: Callable[[Cell, str], float]) -> tuple[str, ...]:
        counts = range(1, min(max_plans, len(among)) + 1)
        sets = [kept for count in counts for kept in combinations(among, count) if count == 1 or fits(kept)]
        assigned = [tuple(min(kept, key=partial(ms, cell)) for cell in cells) for kept in sets]
        return min(assigned, key=lambda one: sum(c.weight * ms(c, p) for c, p in zip(cells, one, strict=True)))

    def surely(cell: Cell, plan: str) -> float:
        return cell.ms(plan) if is_dense(plan) else cell.ms_at_worst(plan)

    baselines = {cell.best_dense.plan for cell in cells}
    dense = fastest([plan for plan in plans if is_dense(plan) or plan in baselines], Cell.ms)
    best = fastest(plans, surely)
    return (
        best if sum(c.weight * surely(c, p) for c, p in zip(cells, best, strict=True)) < _total(cells, dense) else dense
    )


def with_lists(
    choice: Choice,
    lists: Cell,
    keeps_quality: Mapping[str, bool],
    may_join: Callable[[str], bool],
    fits: Fits = _any_fit,
    retention: Mapping[str, float] | None = None,
) -> Choice:
    """Return `choice` with one mixture in place of its mixtures, where that is better for shapes and lists together.

    That is where the plan that is fast on lists may not join those of `choice`, as an export has room for few. The
    times of shapes and of lists count alike; the gain must be worth it (`WORTH_BOTH`) and beyond the noise of lists.
    Of mixtures as good for both (`WORTH`) the one is taken that keeps most quality, where `retention` says how much.
    """

    def on_lists(plan: str) -> float:
        return lists.ms(plan) if plan in lists.rows else math.inf

    reached = min((on_lists(plan) for plan in lists.rows if plan in choice.plans or may_join(plan)), default=math.inf)
    pairs = list(zip(choice.cells, choice.plan_of, strict=True))

    def assigned(plan: str) -> tuple[str, ...]:
        return tuple(before if is_dense(before) else plan for _, before in pairs)

    able = [
        plan
        for plan in lists.rows
        if keeps_quality.get(plan, False)
        and not is_dense(plan)
        and lists.allows(plan)
        and lists.ms_at_worst(plan) < reached
        and all(is_dense(before) or (plan in cell.rows and cell.allows(plan)) for cell, before in pairs)
        and plan in assigned(plan)
        and fits(list(dict.fromkeys(assigned(plan))))
    ]
    if not able or math.isinf(reached):
        return choice
    whole = _total(choice.cells, choice.plan_of)

    def both(plan: str) -> float:
        return _total(choice.cells, assigned(plan)) / whole * on_lists(plan) / reached

    least = min(map(both, able))
    if least > 1 - WORTH_BOTH:
        return choice
    kept = retention or {}
    alike = [plan for plan in able if both(plan) <= least * (1 + WORTH)]
    most = max(kept.get(plan, 1.0) for plan in alike)
    best = min((plan for plan in alike if kept.get(plan, 1.0) >= most - TOLD_APART), key=both)
    return _choice(choice.cells, assigned(best), keeps_quality)


def choose_for_lists(
    cell: Cell,
    keeps_quality: Mapping[str, bool],
    in_use: Collection[str],
    shipped: Collection[str],
    may_join: Callable[[str], bool],
) -> str | None:
    """Choose the plan for lists of texts: the best of those `in_use` by shape, unless another is worth its memory.

    A mixture joins them only if it is faster than the best dense plan beyond the noise (`Cell.allows`), and any plan
    only if it saves more than the noise and `WORTH`. A plan that is `shipped` in any case is preferred to one that is
    not by as much. None where no plan in use was timed on lists.
    """
    able = [plan for plan in cell.rows if keeps_quality.get(plan, False) and cell.allows(plan)]
    used = [plan for plan in cell.rows if plan in in_use]
    if not used:
        return None
    chosen = min(used, key=lambda plan: (plan not in able, cell.ms(plan)))
    for joining in ([plan for plan in able if plan in shipped], able):
        fastest = min((plan for plan in joining if may_join(plan)), key=cell.ms, default=chosen)
        noise = [cell.spread_ms(plan) for plan in (chosen, fastest) if cell.rows[plan].high < math.inf]
        if cell.ms(fastest) <= cell.ms(chosen) - max([WORTH * cell.ms(chosen), *noise]):
            chosen = fastest
    return chosen


def _assigned(cells: Sequence[Cell], options: Sequence[Sequence[str]]) -> tuple[str, ...] | None:
    """Return the fastest option of each cell; None where a cell has none."""
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
            return f"no plan of the student {'keeps the quality' if mixtures else 'was timed'}: {default}"
        cell, plan = max(
            ((cell, plan) for cell in cells for plan in able), key=lambda one: one[0].rows[one[1]].speedup_vs_best_dense
        )
        row = cell.rows[plan]
        noise = (
            f"{row.low:.2f} to {row.high:.2f}" if row.high < math.inf else f"{row.rounds} rounds are too few to tell"
        )
        best = " or ".join(dict.fromkeys(cell.best_dense.plan for cell in cells))
        return (
            f"no plan of the student beats {best} here beyond the noise ({plan} comes nearest, at {cell} with "
            f"{row.speedup_vs_best_dense:.2f}x its speed, {noise}): {default}"
        )
    baselines = list(dict.fromkeys(cell.best_dense.plan for cell in cells))
    if used == baselines:  # of an export without a dense plan
        return f"no other plan is faster here than {shipped} beyond the noise: {shipped} is the default"
    over = baselines[0] if len(baselines) == 1 else f"the best dense plan of each shape ({', '.join(baselines)})"
    whole = f"{speedup:.2f}x as fast as {over} ({low:.2f} to {high:.2f})"
    if len(used) == 1:
        return f"{used[0]} is {whole}"
    where = {plan: [str(cell) for cell, one in zip(cells, assigned, strict=True) if one == plan] for plan in used}
    places = "; ".join(f"{plan} for {', '.join(shapes)}" for plan, shapes in where.items())
    return f"{places}: {whole}"
