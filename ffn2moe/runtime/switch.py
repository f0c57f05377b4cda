"""Run one export on several plans: a batch on the plan that was chosen for its shape, a list on that for lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffn2moe.runtime.engines import Graph, Precision
from ffn2moe.runtime.workload import distance, fixed


@dataclass(frozen=True)
class Place:
    """The batches of a shape, or one phase of them, for which a plan was chosen.

    Plans of OpenVINO are compiled for exactly the `fixed` shapes (`ffn2moe.runtime.workload.fixed`).
    """

    batch: int
    sequence: int
    phase: str
    plan: str
    fixed: bool = False


def places(plan_json: Mapping[str, Any], threads: int) -> list[Place]:
    """Return the choices of plan.json for the measured number of threads nearest to this one; [] if there are none."""
    rows = _nearest(plan_json.get("choices", []), threads)
    apart = fixed((row["batch"], row["sequence"], row.get("weight", 1.0)) for row in rows)
    return [
        Place(row["batch"], row["sequence"], row["phase"], row["plan"], fixed=(row["batch"], row["sequence"]) in apart)
        for row in rows
    ]


def plan_for_lists(plan_json: Mapping[str, Any], threads: int) -> str | None:
    """Return the plan that plan.json has for lists of texts, for the measured number of threads nearest to this one.

    None where lists were not measured: a plan.json from earlier code, or a model that reads none.
    """
    rows = _nearest(plan_json.get("lists", []), threads)
    return str(rows[0]["plan"]) if rows else None


def _nearest(rows: Sequence[Mapping[str, Any]], threads: int) -> list[Mapping[str, Any]]:
    """Return the rows of the number of threads that is nearest to this one."""
    nearest = min({row["threads"] for row in rows}, key=lambda count: (abs(count - threads), count), default=None)
    return [row for row in rows if row["threads"] == nearest]


class Switch:
    """Run each batch on the graph of the plan that was chosen for its shape, behind the interface of one graph.

    A shape that was not measured takes the plan of the one nearest in tokens. `for_lists` gives the graph of the plan
    `lists`, for calls of several batches. A graph is opened when its plan is first needed, and then stays open. Values
    that one engine keeps are handed to another as arrays.
    """

    def __init__(
        self, chosen: Sequence[Place], open_plan: Callable[[str], Graph], first: str, lists: str | None = None
    ) -> None:
        self._places = chosen
        self.lists = lists
        self._open_plan = open_plan
        self.opened: dict[str, Graph] = {first: open_plan(first)}
        self.inputs = self.opened[first].inputs
        self.outputs = self.opened[first].outputs
        self._shapes: dict[tuple[int, int], str] = {}  # those seen -> plan

    @property
    def precision(self) -> Precision:
        return next(iter(self.opened.values())).precision

    @property
    def plans(self) -> tuple[str, ...]:
        """The plans that may be needed."""
        lists = () if self.lists is None else (self.lists,)
        return tuple(dict.fromkeys((*(place.plan for place in self._places), *lists)))

    def for_lists(self) -> Graph:
        """Return the graph for the batches of a list; this switch, which goes by shape, where no plan was chosen."""
        return self if self.lists is None else self._opened(self.lists)

    def plan_for(self, batch: int, sequence: int) -> str:
        """Return the plan for token ids [batch, sequence]; where a model writes, a sequence of 1 is a decoding step."""
        shape = (batch, sequence)
        if shape not in self._shapes:
            decoding = [place for place in self._places if place.phase == "decode"]
            if decoding and sequence == 1:
                best = min(decoding, key=lambda place: distance((batch, place.sequence), (place.batch, place.sequence)))
            else:
                reading = [place for place in self._places if place.phase != "decode"]
                best = min(reading, key=lambda place: distance(shape, (place.batch, place.sequence)))
            self._shapes[shape] = best.plan
        return self._shapes[shape]

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        graph = self._graph(inputs)
        return graph.run(outputs, {name: _given(value, graph) for name, value in inputs.items()})

    def run_values(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        graph = self._graph(inputs)
        found = graph.run_values(outputs, {name: _given(value, graph) for name, value in inputs.items()})
        return [_Held(value, graph) for value in found]

    def array(self, value: Any) -> np.ndarray:
        return value.graph.array(value.value)

    def fix(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Do nothing: each plan keeps the shapes that it was chosen for."""

    def _graph(self, inputs: Mapping[str, Any]) -> Graph:
        return self._opened(self.plan_for(*inputs["input_ids"].shape))

    def _opened(self, plan: str) -> Graph:
        if plan not in self.opened:
            self.opened[plan] = self._open_plan(plan)
        return self.opened[plan]


@dataclass(frozen=True)
class _Held:
    """A value and the graph whose engine keeps it."""

    value: Any
    graph: Graph


def _given(value: Any, graph: Graph) -> Any:
    """Return a value as a graph takes it: as it is if its own engine keeps it, else as an array."""
    if not isinstance(value, _Held):
        return value
    return value.value if type(value.graph) is type(graph) else value.graph.array(value.value)
