"""The cells of the grid, in the order in which they are worth most, and the files that hold them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablation.method import STAGES, Method, Stage


@dataclass(frozen=True)
class Budget:
    """What every cell of a grid has in common, whatever its method."""

    experts: int
    steps: int  # of distillation
    batch_tokens: int
    learning_rate: float
    hidden_weight: float
    embedding_weight: float
    relational_weight: float
    logits_weight: float
    balance_step: float
    calibration_tokens: int
    router_tokens: int
    router_steps: int
    router_batch_tokens: int
    router_learning_rate: float
    ridge: float
    refit: float
    held_out_tokens: int  # on which the FFNs' error is measured
    max_length: int


@dataclass(frozen=True)
class Cell:
    """One method at one active share, up to one stage, with one seed."""

    method: Method
    num_active: int  # K of `Budget.experts`, which the active share is
    stage: Stage
    seed: int

    def share(self, experts: int) -> float:
        """The share of the FFN that a token runs."""
        return self.num_active / experts

    def name(self, experts: int) -> str:
        return f"{self.method.name} {100 * self.share(experts):g} % {self.stage} seed {self.seed}"


def cells(
    methods: Sequence[Method], shares: Sequence[float], stages: Sequence[Stage], seeds: Sequence[int], experts: int
) -> list[Cell]:
    """The grid, first what says most: all of the first seed at the middle share, its other shares, further seeds.

    ValueError for a share that is not a whole number of experts.
    """
    middle_first = sorted(shares, key=lambda share: (share != 0.25, -share))
    found = []
    for seed in seeds:
        for share in middle_first:
            active = active_of(share, experts)
            for stage in sorted(stages, key=STAGES.index):
                found += [
                    Cell(method, active, stage, seed)
                    for method in methods
                    if stage in method.stages and method.fits(active, experts)
                ]
    return found


def active_of(share: float, experts: int) -> int:
    """K of a share."""
    active = share * experts
    if not (0 < share <= 1 and abs(active - round(active)) < 1e-9):
        raise ValueError(
            f"{100 * share:g} % of {experts} experts is not a whole number of experts: use shares in steps of "
            f"{100 / experts:g} %, or other --experts"
        )
    return round(active)


class Store:
    """The finished cells of one model, data and budget: a JSON file each, there whole or not at all."""

    def __init__(self, folder: Path, budget: Budget, data: str) -> None:
        self.folder = folder
        self.budget = budget
        self._common = {"budget": asdict(budget), "data": data}

    def path(self, cell: Cell) -> Path:
        """Where a cell is kept; its settings are in the name, so that a change of them is another cell."""
        settings = {**self._common, **cell.method.settings(), "active": cell.num_active}
        settings |= {"stage": cell.stage, "seed": cell.seed}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        share = f"{100 * cell.share(self.budget.experts):g}"
        return self.folder / f"{cell.method.name}-{share}-{cell.stage}-{cell.seed}-{digest}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell found; None where it is not done."""
        path = self.path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, cell: Cell, found: Mapping[str, Any]) -> None:
        write_json(self.path(cell), found)


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write JSON to a file that is there whole or not at all."""
    write_text(path, json.dumps(payload, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
