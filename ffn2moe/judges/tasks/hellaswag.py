"""HellaSwag: which of four endings continues a text (Zellers et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffn2moe.judges.items import Item, Task, require_text, text_of


def item(row: Mapping[str, Any]) -> Item:
    """Return the question of a row."""
    endings, label = row["endings"], row["label"]
    if not isinstance(endings, list) or len(endings) < 2:
        raise ValueError(f"its endings are no list of two or more, but {endings!r}")
    choices = tuple(require_text(ending, f"ending {place}") for place, ending in enumerate(endings))
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(f"its label is {label!r}, and must be a number from 0 to {len(choices) - 1}")
    return Item(text_of(row, "context"), choices, label)


ROW = Task("HellaSwag", ("context", "endings", "label"), item, ("accuracy_normalised", "accuracy"))
