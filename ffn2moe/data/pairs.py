"""Read pairs of texts for models that read two: a query and a document, a premise and a hypothesis."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from ffn2moe.data.corpus import INSTALLED, clean, read_column

Pair = tuple[str, str]
LONGEST_FIRST = 32  # words of a first text that is made of one without a first line or sentence


def read_pairs(source: str, columns: str, most: int | None = None) -> list[Pair]:
    """Return the pairs of two columns, "first,second", of a corpus (`read_corpus`), without rows that lack a text.

    `most` reads only so many bytes of a file.

    FileNotFoundError or ValueError with the remedy.
    """
    names = [name.strip() for name in columns.split(",")]
    if len(names) != 2:
        raise ValueError(f"{columns!r} names {len(names)} columns, and a pair has two: name them as first,second")
    if source in INSTALLED or source.lower().endswith(".txt"):
        raise ValueError(f"the corpus {source} has no columns: leave --text-column out, or give a .jsonl, .csv or .tsv")
    first_N, second_N = (map(clean, read_column(source, name, most)) for name in names)
    pairs = list(zip(first_N, second_N, strict=True))
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        raise ValueError(f"the corpus {source} holds no pair: in every row {names[0]!r} or {names[1]!r} is empty")
    return pairs


def pairs_of(texts: Sequence[str], seed: int) -> list[Pair]:
    """Return one pair for each text: a third each of texts that belong together, are neighbours, and are any two.

    The first text of a pair is the first line or sentence of a text, the second is the rest of it, or another text. A
    model that ranks pairs must see near ones and far ones: on far ones alone its scores are nearly constant. ValueError
    for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} texts make no pairs: give at least two")
    generator = random.Random(f"pairs/{seed}")
    pairs = []
    for index, text in enumerate(texts):
        first, rest = _split(text)
        kind = generator.randrange(3)
        step = 1 if kind == 1 else generator.randrange(1, len(texts))
        pairs.append((first, rest if kind == 0 else texts[(index + step) % len(texts)]))
    return pairs


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], max_length: int, *, told_apart: bool
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Return the token ids of pairs, and which text of its pair each token belongs to where a model tells them apart.

    A pair that is too long loses tokens of its longer text first, as where it is served.
    """
    first_N, second_N = map(list, zip(*pairs, strict=True))
    found = tokenizer(first_N, second_N, truncation=True, max_length=max_length)
    return found["input_ids"], found.get("token_type_ids") if told_apart else None


def _split(text: str) -> Pair:
    """Return the first line, sentence or half of a text, and the rest; a text of one word twice."""
    parts = re.split(r"\n+|(?<=[.!?])\s+", text, maxsplit=1)
    if len(parts) == 2 and all(map(str.strip, parts)):
        return parts[0].strip(), parts[1].strip()
    words = text.split()
    half = min(len(words) // 2, LONGEST_FIRST)
    return (" ".join(words[:half]), " ".join(words[half:])) if half else (text, text)
