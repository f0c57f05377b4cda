"""List the containers: one file per architecture in `ffn2moe/containers/architectures/`."""

from __future__ import annotations

from ffn2moe.containers.container import Container
from ffn2moe.table import Table

CONTAINERS: Table[Container] = Table("container", package="ffn2moe.containers.architectures")


def dense_families() -> tuple[str, ...]:
    """Return the dense families that some container holds, sorted."""
    return tuple(sorted({family for container in CONTAINERS.rows() for family in container.families}))


def by_preference(family: str) -> list[Container]:
    """Return the containers that hold models of a dense family, the preferred one first."""
    holders = [container for container in CONTAINERS.rows() if family in container.families]
    return sorted(holders, key=lambda container: container.families[family])
