"""The cells of the grid, the most informative first, and the files that hold them."""

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
    """The settings that all cells of a grid share."""

    experts: int
    steps: int  # distillation steps
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
    held_out_tokens: int  # tokens that the FFNs' error is measured on
    max_length: int


@dataclass(frozen=True)
class Cell:
    """One method at one active share, up to one stage, with one seed."""

    method: Method
    num_active: int  # K; the active share is K over `Budget.experts`
    stage: Stage
    seed: int

    def share(self, experts: int) -> float:
        """Return the share of the FFN that a token runs."""
        return self.num_active / experts

    def name(self, experts: int) -> str:
        """Return the name of the cell for people."""
        return f"{self.method.name} {100 * self.share(experts):g} % {self.stage} seed {self.seed}"


def cells(
    methods: Sequence[Method], shares: Sequence[float], stages: Sequence[Stage], seeds: Sequence[int], experts: int
) -> list[Cell]:
    """Return the grid: the first seed at the middle share, then its other shares, then further seeds.

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
    """Return K of a share. ValueError if it is not a whole number of experts."""
    active = share * experts
    if not (0 < share <= 1 and abs(active - round(active)) < 1e-9):
        raise ValueError(
            f"{100 * share:g} % of {experts} experts is not a whole number of experts: use shares in steps of "
            f"{100 / experts:g} %, or other --experts"
        )
    return round(active)


class Store:
    """The finished cells of one model, data and budget: one JSON file each, complete or absent."""

    def __init__(self, folder: Path, budget: Budget, data: str) -> None:
        self.folder = folder
        self.budget = budget
        self._common = {"budget": asdict(budget), "data": data}

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell. Its name holds a digest of the settings: other settings are another cell."""
        settings = {**self._common, **cell.method.settings(), "active": cell.num_active}
        settings |= {"stage": cell.stage, "seed": cell.seed}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        share = f"{100 * cell.share(self.budget.experts):g}"
        return self.folder / f"{cell.method.name}-{share}-{cell.stage}-{cell.seed}-{digest}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Return the results of a cell; None if it is not finished."""
        path = self.path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, cell: Cell, found: Mapping[str, Any]) -> None:
        """Write the results of a cell."""
        write_json(self.path(cell), found)


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write JSON to a file, completely or not at all."""
    write_text(path, json.dumps(payload, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
