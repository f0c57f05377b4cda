"""Every method of the grid: each module of this folder registers its own. Importing the package imports all modules.

A method that left the core registers its row in the core's table (`ffn2moe.table.Table.register`) from here, too, so
that its name works in the core as long as this package is imported. A row of a core table that no module here names is
a method by itself.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from benchmarks.ablation.method import BOTH, GROUPS, METHODS, STAGES, Group, Method, Stage
from ffn2moe.choices import GATES, SELECTIONS
from ffn2moe.decompose.objectives import OBJECTIVES
from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.decompose.starts import STARTS
from ffn2moe.distill.divergences import DIVERGENCES
from ffn2moe.table import Table

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


@dataclass(frozen=True)
class Choice:
    """A table of the core whose rows the grid compares, and the field of `Method` that names a row."""

    field: str
    table: Table[Any]
    group: Group
    stages: tuple[Stage, ...] = STAGES
    heads: tuple[str, ...] = ("embedding",)

    def methods(self) -> Iterator[Method]:
        """Return a method for each row that no registered method names."""
        named = {getattr(method, self.field) for method in METHODS.rows()}
        for name, row in self.table.items():
            refilled = getattr(row, "refilled", False)  # benchmarks.language_model compares those
            if name not in named and not refilled:
                heads = tuple(head for head in self.heads if head in getattr(row, "heads", self.heads))
                title = getattr(row, "title", name.replace("_", " "))
                yield Method(name, title, self.group, row.reference, self.stages, heads, **{self.field: name})


CHOICES = (
    Choice("partition", PARTITIONS, "partition"),
    Choice("start", STARTS, "router start", ("free",)),
    Choice("objective", OBJECTIVES, "router objective", ("router", "distilled")),
    Choice("gate", GATES, "gates", heads=BOTH),
    Choice("selection", SELECTIONS, "selection"),
    Choice("divergence", DIVERGENCES, "distillation", ("distilled",), ("causal",)),
)


def methods_of(head: str) -> dict[str, Method]:
    """Return the methods for models with this head, by name: the default first, then group by group."""
    every = (*METHODS.rows(), *(method for choice in CHOICES for method in choice.methods()))
    found = (method for method in every if head in method.heads)
    return {method.name: method for method in sorted(found, key=lambda method: GROUPS.index(method.group))}
