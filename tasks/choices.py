"""Collect the tables of names that params.yaml can hold, and check a value against one.

DVC lists neither this file nor the tables behind it as dependencies of a stage for the sake of this check
(tests/imports.py): a new name changes which params.yaml is accepted, never what a stage writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ffn2moe.choices import GATES as GATES
from ffn2moe.containers.gguf.types import GGUF_TYPES as GGUF_TYPES
from ffn2moe.containers.table import CONTAINERS as CONTAINERS
from ffn2moe.decompose.objectives import OBJECTIVES as OBJECTIVES
from ffn2moe.decompose.partition import PARTITIONS as PARTITIONS
from ffn2moe.decompose.starts import STARTS as STARTS
from ffn2moe.distill.divergences import DIVERGENCES as DIVERGENCES
from ffn2moe.runtime.engines import ENGINES as ENGINES
from ffn2moe.runtime.plans import PLANS as PLANS
from ffn2moe.table import Table, unknown
from ffn2moe.table import UnknownName as UnknownName


@dataclass(frozen=True)
class OneOf:
    """Annotate a text that must be a name of `table`, or one of `more`: `Annotated[str, OneOf(TABLE)]`.

    The table is read when a value is checked, so that a row that is registered later counts too.
    """

    table: Table[Any]
    more: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Return every legal name."""
        return (*self.more, *self.table.names())

    def require(self, name: str) -> str:
        """Return a legal name; UnknownName, with the nearest legal one, for another."""
        if name not in self.names():
            raise UnknownName(unknown(self.table.choice, name, self.names()))
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.require, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.names())}


# Keys of version 0.1.0 whose methods lost in docs/results.md: the ablation alone still runs them.
REMOVED_KEYS = frozenset(
    {
        "decompose.guard",
        "decompose.max_active",
        "decompose.routing",
        "decompose.selection",
        "distill.layerwise",
        "distill.token_share",
        "train_router.temperature",
    }
)
