"""BLiMP: which of two sentences that differ in one place is good English (Warstadt et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffn2moe.judges.items import Item, Task, text_of


def item(row: Mapping[str, Any]) -> Item:
    """Return the question of a row."""
    good, bad = text_of(row, "good"), text_of(row, "bad")
    if good == bad:
        raise ValueError(f"its two sentences are one and the same: {good!r}")
    return Item(None, (good, bad), 0, text_of(row, "phenomenon"))


ROW = Task("BLiMP", ("good", "bad", "phenomenon"), item, ("accuracy",))
