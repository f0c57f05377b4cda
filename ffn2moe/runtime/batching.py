"""Group token sequences into batches of like length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

BATCH_TOKENS = 1024  # more leave the processor's cache (int8 plans are a fifth slower at 4096)
CALL_TOKENS = 24  # the time of a call beyond its tokens, in tokens: 10 to 35 by plan and machine (docs/decisions/0034)
TEXTS_AT_ONCE = 4096  # that are tokenised and batched together: enough of like lengths
CHARACTERS_AT_ONCE = 2**22  # of them: a tokenizer takes 30 bytes a character before it truncates
Item = TypeVar("Item")


def parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in order, in lists of `size`; the last one may be shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def windows(texts: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the texts in order, in lists of `TEXTS_AT_ONCE` texts or about `CHARACTERS_AT_ONCE` characters."""
    window: list[Item] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text) if isinstance(text, str) else 0
        if len(window) >= TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield window
            window, characters = [], 0
    if window:
        yield window


def batches_by_length(
    ids: Sequence[Sequence[int]], batch_tokens: int, call_tokens: int = CALL_TOKENS
) -> list[list[int]]:
    """Return batches of indices of texts, longest first, that cost least in all.

    A batch costs its tokens with padding, and `call_tokens` for the call of the graph. So texts of unlike lengths stay
    apart if their padding costs more than another call. A batch has `batch_tokens` at most; a longer text is a batch
    by itself.
    """
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    least = np.full(len(order) + 1, np.inf)  # cost of the first texts of the order, by their number
    least[0] = 0
    start = np.zeros(len(order) + 1, dtype=np.int64)  # where the last batch of them begins
    for first, index in enumerate(order):
        longest = max(1, len(ids[index]))
        most = min(max(1, batch_tokens // longest), len(order) - first)
        costs = least[first] + call_tokens + longest * np.arange(1, most + 1)
        ends = slice(first + 1, first + 1 + most)
        better = costs < least[ends]
        least[ends][better] = costs[better]
        start[ends][better] = first
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[start[end] : end])
        end = int(start[end])
    return batches[::-1]


def pad(ids: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask, int64 [B, L], padded on the right, or on the left where a model continues texts."""
    longest = max(map(len, ids))
    ids_BL = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask_BL = np.zeros_like(ids_BL)
    for row, tokens in enumerate(ids):
        place = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
        ids_BL[row, place] = tokens
        mask_BL[row, place] = 1
    return ids_BL, mask_BL
