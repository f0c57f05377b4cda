"""Give pairs of texts to a teacher that reads two: those of two columns, or pairs made of the texts of one.

The splits treat a pair of two columns as one text, so that no pair is in two of them. Pairs that are made of texts are
made within each split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffn2moe.data.pairs import Pair


def names_pair(column: str) -> bool:
    """Return whether data.text_column names two columns."""
    return "," in column


def read_joined(source: str, columns: str) -> dict[str, Pair]:
    """Return the pairs of two columns of a corpus, each under its two texts as one. ValueError for what is no pair."""
    from ffn2moe.data.pairs import read_pairs

    return {f"{first}\n{second}": (first, second) for first, second in read_pairs(source, columns)}


def pairs_of_split(texts: Sequence[str], joined: dict[str, Pair], seed: int) -> list[Pair]:
    """Return a pair for each text of a split: the one that was joined to it, or else one that is made of it."""
    from ffn2moe.data.pairs import pairs_of

    made = iter(pairs_of(single, seed)) if (single := [text for text in texts if text not in joined]) else iter(())
    return [joined[text] if text in joined else next(made) for text in texts]
