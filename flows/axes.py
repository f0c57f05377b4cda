"""Read the keys of a sweep and their values: a list for a grid, a range for a search."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.workspace import FlowError

EXAMPLE = "decompose.num_experts=4,8 decompose.num_active=1,2"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"^({_NUMBER})\.\.({_NUMBER})$")


@dataclass(frozen=True)
class Range:
    """Hold the range of a search; `whole` if both ends are whole numbers."""

    low: float
    high: float
    whole: bool

    @property
    def logarithmic(self) -> bool:
        """Return whether the range spans a factor of ten or more, so that factors matter."""
        return self.low > 0 and self.high / self.low >= 10


Axis = tuple[str, ...] | Range  # values as written in a setting


def parse(texts: Sequence[str]) -> dict[str, Axis]:
    """Read KEY=VALUE,VALUE,... (or, for a search, KEY=LOW..HIGH) into the values of each key.

    A comma inside brackets belongs to the value. FlowError if a text cannot be read.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise FlowError(f"cannot read {text!r}: write KEY=VALUE,VALUE,... for example {EXAMPLE}")
        if key in axes:
            raise FlowError(f"{key} is given twice; write all its values after one {key}=")
        if key == "name":
            raise FlowError(
                "the sweep sets name itself, because each cell needs another one; to name the sweep: --name NAME"
            )
        if found := _RANGE.match(values):
            low, high = (float(number) for number in found.groups())
            if low >= high:
                raise FlowError(f"{text}: the range is empty; write the lower number first")
            axes[key] = Range(low, high, all(re.fullmatch(r"[-+]?\d+", number) for number in found.groups()))
            continue
        parts = [part.strip() for part in _split(values)]
        if not all(parts):
            raise FlowError(f"{text!r} has an empty value; write null for none, or remove the comma")
        if twice := sorted({part for part in parts if parts.count(part) > 1}):
            raise FlowError(f"{text}: {', '.join(twice)} is there twice, and no cell runs twice; remove one")
        axes[key] = tuple(parts)
    return axes


def _split(text: str) -> Iterator[str]:
    """Yield the parts between the commas outside brackets."""
    depth, part = 0, ""
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            yield part
            part = ""
        else:
            part += sign
    yield part


def combinations(axes: Mapping[str, Axis]) -> list[dict[str, str]]:
    """Return every combination of a grid; FlowError if there is no choice, or a range."""
    ranges = [key for key, axis in axes.items() if isinstance(axis, Range)]
    if ranges:
        raise FlowError(
            f"a grid needs a list of values for {', '.join(ranges)}: list them, or search the range with --search 20"
        )
    values = [axis for axis in axes.values() if not isinstance(axis, Range)]
    if all(len(axis) < 2 for axis in values):
        raise FlowError(f"the grid is empty: give at least one key several values, for example {EXAMPLE}")
    return [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*values)]


def distributions(axes: Mapping[str, Axis]) -> dict[str, Any]:
    """Return the axes as distributions of Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, axis in axes.items():
        if isinstance(axis, tuple):
            found[key] = CategoricalDistribution(axis)
        elif axis.whole:
            found[key] = IntDistribution(round(axis.low), round(axis.high), log=axis.logarithmic)
        else:
            found[key] = FloatDistribution(axis.low, axis.high, log=axis.logarithmic)
    return found
