"""Collect the figures of models beside a teacher's: values, the shares that are kept, and the intervals of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffn2moe.metrics import Interval

KEPT_BY = (("student", ""), ("training_free", "_training_free"))  # model -> the ending of its keys in evaluate.json


@dataclass(frozen=True)
class Scores:
    """One model's figures, their shares of the teacher's, and the 95 % intervals of the shares; nested alike."""

    figures: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)

    def add(self, path: tuple[str, ...], figure: Any) -> None:
        """Add a figure at a path of keys."""
        put(self.figures, path, figure)

    def keep(self, path: tuple[str, ...], share: float, interval: Interval) -> None:
        """Add the share that is kept of the teacher's figure at a path, and its interval."""
        put(self.ratios, path, share)
        put(self.limits, path, asdict(interval))


def payload(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the figures of every model, and what the mixtures keep, as metrics/evaluate.json holds them."""
    found: dict[str, Any] = {name: one.figures for name, one in scores.items()}
    for name, suffix in KEPT_BY:
        found[f"retention{suffix}"], found[f"retention_interval{suffix}"] = scores[name].ratios, scores[name].limits
    return found


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Put a value into nested mappings at a path of keys."""
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
