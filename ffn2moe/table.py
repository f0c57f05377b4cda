"""One table per choice: rows by name, and an unknown name suggests the nearest known one.

A table that names a package reads its rows from the modules in that package's folder: adding a row is adding a file.
Code outside the folder adds rows with `Table.register`.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Generic, TypeVar

Row = TypeVar("Row")


class UnknownName(ValueError):
    """A name that a table does not hold; the message lists the known names."""


class Table(Generic[Row]):
    """The rows of one choice, by name, in alphabetical order.

    With a `package` (a dotted name whose `__init__` imports nothing heavy), each public module NAME of its folder holds
    the row NAME as its attribute `ROW`. Listing the names imports no row, so that params.yaml and the command line can
    be checked without torch. A row is imported when it is first used.
    """

    def __init__(self, choice: str, package: str | None = None) -> None:
        self.choice = choice  # as messages call it, e.g. "partition"
        self._package = package
        self._rows: dict[str, Row] = {}

    def register(self, name: str, row: Row) -> Row:
        """Add a row, or replace the one of this name; return the row."""
        self._rows[name] = row
        return row

    def forget(self, name: str) -> None:
        """Remove a registered row; do nothing where there is none."""
        self._rows.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted, without importing a row."""
        return tuple(sorted({*self._rows, *self.shipped()}))

    def shipped(self) -> Iterator[str]:
        """Yield the names of the rows in the package's folder, without those that other code registered."""
        if self._package is not None:
            path = import_module(self._package).__path__
            yield from (module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))

    def require(self, name: str) -> str:
        """Return the name if the table holds it, without importing the row; else raise UnknownName."""
        if name not in self.names():
            raise UnknownName(unknown(self.choice, name, self.names()))
        return name

    def __getitem__(self, name: str) -> Row:
        """Return a row. UnknownName, a ValueError, where there is none."""
        if name not in self._rows:
            self.require(name)
            self._rows[name] = import_module(f"{self._package}.{name}").ROW
        return self._rows[name]

    def get(self, name: str) -> Row | None:
        """Return a row, or None where there is none of this name."""
        return self[name] if name in self else None  # noqa: SIM401

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def rows(self) -> tuple[Row, ...]:
        """Return every row, in the order of the names."""
        return tuple(self[name] for name in self.names())

    def items(self) -> tuple[tuple[str, Row], ...]:
        """Return every name with its row."""
        return tuple((name, self[name]) for name in self.names())


def unknown(choice: str, name: object, names: tuple[str, ...]) -> str:
    """Return the message for a name that a choice does not have: the nearest known one, then all of them."""
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {choice} {name!r}{hint} known: {', '.join(names)}"
