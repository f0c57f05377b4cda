"""Read the files of questions with several answers that judge language models, and refuse what is not one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ffn2moe.table import Table

One = TypeVar("One")


@dataclass(frozen=True)
class Item:
    """A question: what comes before, the answers to choose from, and which of them is right."""

    context: str | None  # None: nothing comes before the answers
    choices: tuple[str, ...]
    label: int  # the index of the right one
    group: str | None = None  # the kind of question, where the file tells kinds apart

    @property
    def chance(self) -> float:
        """The probability to guess the right answer."""
        return 1 / len(self.choices)


@dataclass(frozen=True)
class Task:
    """A kind of file of questions: how a row is read, and which figures it gives."""

    title: str
    columns: tuple[str, ...]  # that a row must have
    item: Callable[[Mapping[str, Any]], Item]  # ValueError, with the reason, for a row that cannot be used
    figures: tuple[str, ...]  # rows of `ffn2moe.judges.answers.FIGURES`; the first says what a student keeps

    def read(self, path: Path) -> list[Item]:
        """Return the questions of a .jsonl file. FileNotFoundError or ValueError, with the line, for a bad one."""
        from ffn2moe.data.corpus import read_rows  # here, so that the command line finds its options quickly

        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {path}: name a .jsonl file of {self.title}, with {self._named()}"
            )
        items = []
        for where, row in read_rows(path):
            missing = [repr(column) for column in self.columns if column not in row]
            if missing:
                raise ValueError(
                    f"{where} has no {' and no '.join(missing)}; its columns are {', '.join(map(repr, row))}: a file "
                    f"of {self.title} has {self._named()}"
                )
            try:
                items.append(self.item(row))
            except ValueError as error:
                raise ValueError(f"{where} is no question of {self.title}: {error}") from None
        if not items:
            raise ValueError(f"{path} holds no question: give a .jsonl file of {self.title}, with {self._named()}")
        return items

    def _named(self) -> str:
        return f"the columns {', '.join(self.columns)}"


TASKS: Table[Task] = Table("task", package="ffn2moe.judges.tasks")


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Return a text of a row. ValueError where it is none, or empty."""
    return require_text(row[column], f"its {column}")


def require_text(value: Any, what: str) -> str:
    """Return a text as it is. ValueError where it is none, or empty."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text but {value!r}")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value


def spread(items: Sequence[One], most: int | None) -> list[One]:
    """Return at most so many items, evenly spread over all of them; None: every item."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]
