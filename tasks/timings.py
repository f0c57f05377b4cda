"""Arrange the timings of plan.json for the report: tables, drawings, and the plan that is shown first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ffn2moe.runtime.plans import is_dense

PHASES = {"whole": "", "prefill": "prefill", "decode": "decode, a token", "request": "whole request"}


class Case(NamedTuple):
    """What a timing is of. `phase` is a key of PHASES; a request is its prefill and its decoding together."""

    batch: int
    sequence: int
    threads: int
    phase: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Case:
        """Return the case of a row of plan.json."""
        return cls(row["batch"], row["sequence"], row["threads"], row.get("phase", "whole"))

    @property
    def is_whole(self) -> bool:
        """Whether it covers all the work of a batch."""
        return self.phase in ("whole", "request")

    def label(self, *, with_threads: bool) -> str:
        """Return the case as a heading."""
        name = f"{self.batch} × {self.sequence}" + (f", {self.threads} thr." if with_threads else "")
        return f"{name}, {PHASES[self.phase]}" if PHASES[self.phase] else name


@dataclass(frozen=True)
class Timed:
    """One plan in every case, each list in the order of the cases."""

    name: str
    dense: bool
    chosen: bool  # in some case
    chosen_at: list[bool]
    milliseconds: list[float]
    speedups: list[float]  # over dense float32
    vs_best_dense: list[float]

    def drawn(self, places: Sequence[int]) -> dict[str, Any]:
        """Return what the figure of speeds shows of the plan."""
        return {
            "name": self.name,
            "dense": self.dense,
            "speedups": [self.speedups[place] for place in places],
            "chosen_at": [self.chosen_at[place] for place in places],
        }


def timings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report shows of the payload of plan.json: every plan in every case, dense plans first."""
    default = plan["default_plan"]
    cases = [Case.of(row) for row in plan["timings"][default]]
    # One plan for all cases, or a plan for each case.
    choices = plan.get("choices") or [{**row, "plan": default} for row in plan["timings"][default]]
    chosen_at = {Case.of(row): row["plan"] for row in choices}
    plans = _plans(plan["timings"], cases, chosen_at, default)
    several_threads = len({case.threads for case in cases}) > 1
    labels = [case.label(with_threads=several_threads) for case in cases]
    # A request is the sum of prefill and decoding: the table has it, the drawing leaves it out.
    drawn = [place for place, case in enumerate(cases) if case.phase != "request"]
    decoded = [place for place, case in enumerate(cases) if case.phase == "decode"]
    return {
        "plans": plans,
        "shapes": labels,
        "drawn": {"shapes": [labels[place] for place in drawn], "plans": [one.drawn(drawn) for one in plans]},
        "decode": {
            "shapes": [f"{cases[place].batch} after {cases[place].sequence} tokens" for place in decoded],
            "rates": {
                one.name: [1000 * cases[place].batch / one.milliseconds[place] for place in decoded] for one in plans
            },
        },
        "shown": _shown(plans, cases),
        "one_for_all": len(set(chosen_at.values())) == 1,
        "lists": plan.get("lists", []),
        "best_dense": plan["best_dense_plan"],
        "machine": plan["machine"],
    }


def _plans(
    timed: Mapping[str, Sequence[Mapping[str, Any]]], cases: Sequence[Case], chosen_at: Mapping[Case, str], default: str
) -> list[Timed]:
    """Return the plans that were timed in every case: dense ones first, then chosen ones."""
    chosen = set(chosen_at.values())
    plans = []
    for name in sorted(timed, key=lambda name: (not is_dense(name), name not in chosen, name)):
        by_case = {Case.of(row): row for row in timed[name]}
        if not by_case.keys() >= set(cases):  # it was dropped in some case
            continue
        rows = [by_case[case] for case in cases]
        plans.append(
            Timed(
                name,
                is_dense(name),
                name in chosen,
                [chosen_at.get(case, default) == name for case in cases],
                [row["median_ms"] for row in rows],
                [row["speedup_vs_dense"] for row in rows],
                [row["speedup_vs_best_dense"] for row in rows],
            )
        )
    return plans


def _shown(plans: Sequence[Timed], cases: Sequence[Case]) -> dict[str, Any]:
    """Return the plan that is shown first, and its speed as the gate judges it.

    The gate judges all the work of the largest shape, with the least favourable number of threads. The plan is the
    mixture that was chosen there or, where a dense plan won, the mixture that came nearest.
    """
    whole = [place for place, case in enumerate(cases) if case.is_whole]
    largest = max(cases[place].batch * cases[place].sequence for place in whole)
    places = [place for place in whole if cases[place].batch * cases[place].sequence == largest]
    mixtures = [one for one in plans if not one.dense]
    best = next(
        (one for one in mixtures if any(one.chosen_at[place] for place in places)),
        min(mixtures, key=lambda one: (not one.chosen, min(one.milliseconds[place] for place in places))),
    )
    place = min(places, key=lambda index: best.vs_best_dense[index])
    case = cases[place]
    return {
        "name": best.name,
        "chosen": best.chosen,
        "vs_dense": best.speedups[place],
        "vs_best_dense": best.vs_best_dense[place],
        "shape": f"{case.batch} × {case.sequence} tokens"
        + (" and what is written after them" if case.phase == "request" else ""),
        "threads": case.threads,
    }
