"""Make a corpus of general text without any data set: docstrings, their sentences, and sentences of other words.

Docstrings are text of one kind, and a student that learns from them alone loses on captions, news and reviews. What
differs there is the words. So most texts are composed: sentences of docstrings in which words of the model's own
vocabulary stand in the place of rarer ones, and strings of such words, as short as queries. They need no meaning,
because a student learns what its teacher answers, not what is true (docs/decisions/0005).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

# Of the texts; the rest are the docstrings' first lines.
SHARES = {"docstrings": 0.125, "sentences": 0.25, "composed": 0.5}
COMMON = 0.01  # share of a vocabulary's words, its first, that stay where they stand, such as "the" and "after"
REPLACED = 0.8  # share of the other words of a sentence that are replaced
EVEN = 0.5  # share of words that are drawn evenly, each once in a round, so that rare ones occur; others as in text
RANK_OFFSET = 2000  # a word at this place of the vocabulary is drawn half as often as the first (Zipf-Mandelbrot)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
WORD = re.compile(r"[^\W\d_]{2,}")
MARKS = ("Ġ", "▁")  # begin a token at the beginning of a word, in byte-level BPE and in SentencePiece
SHORTEST_SENTENCE, LONGEST_SENTENCE = 4, 22  # words
LONGEST_QUERY = 8  # words
MARKUP = re.compile(r"[^\w\s.,;:!?'\"()%&-]|\w[_.:]\w|--|::")  # signs of code, formulas and markup in a sentence


def mixed(docstrings: Sequence[str], words: Sequence[str], count: int) -> dict[str, str]:
    """Return about `count` texts, each with its kind: docstrings, their sentences, and composed ones.

    The shares are `SHARES`. Without words (a model that writes must not learn to write nonsense) all are docstrings.
    The same docstrings and words give the same texts.
    """
    if not words:
        return dict.fromkeys(docstrings, "docstrings")
    generator = random.Random("general")
    sentences = sentences_of(docstrings)
    parts = {
        "docstrings": generator.sample(docstrings, min(len(docstrings), round(SHARES["docstrings"] * count))),
        "sentences": generator.sample(sentences, min(len(sentences), round(SHARES["sentences"] * count))),
        "composed": islice(composed(sentences, words), round(SHARES["composed"] * count)),
    }
    found: dict[str, str] = {}
    for kind, texts in parts.items():
        for text in texts:
            found.setdefault(text, kind)
    return found


def words_of(tokenizer: Any) -> list[str]:
    """Return the whole words of a tokenizer's vocabulary in its order, which is about that of their frequency."""
    numbers: dict[str, int] = tokenizer.get_vocab()
    tokens = sorted(numbers, key=lambda token: numbers[token])
    mark = next((mark for mark in MARKS if sum(token.startswith(mark) for token in tokens) > len(tokens) // 10), "")
    words = (token.removeprefix(mark) for token in tokens if token.startswith(mark))
    # The letters beyond ASCII in a byte-level vocabulary stand for bytes.
    return [word for word in dict.fromkeys(words) if WORD.fullmatch(word) and (word.isascii() or mark != MARKS[0])]


def sentences_of(texts: Iterable[str]) -> list[str]:
    """Return the distinct sentences of texts that are prose, each on one line, in order."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            if ">>>" not in paragraph:
                found.update(dict.fromkeys(filter(_is_prose, SENTENCE.split(" ".join(paragraph.split())))))
    return list(found)


def composed(sentences: Sequence[str], words: Sequence[str], seed: int = 0) -> Iterator[str]:
    """Yield texts over all `words`, without end: sentences of other words, queries, and paragraphs."""
    generator = random.Random(f"composed/{seed}")
    border = int(COMMON * len(words))
    common, other = set(words[:border]), _other_words(words[border:], generator)

    def word(found: re.Match[str]) -> str:
        given = found.group()
        if given.lower() in common or generator.random() > REPLACED:
            return given
        drawn = next(other)
        return drawn.capitalize() if given[0].isupper() else drawn

    def sentence() -> str:
        return WORD.sub(word, generator.choice(sentences))

    while True:
        kind = generator.random()
        if kind < 0.6:
            yield sentence()
        elif kind < 0.75:
            yield " ".join(islice(other, generator.randint(1, LONGEST_QUERY)))
        else:
            yield " ".join(sentence() for _ in range(generator.randint(2, 4)))


def _other_words(words: Sequence[str], generator: random.Random) -> Iterator[str]:
    weights = list(accumulate(1 / (rank + RANK_OFFSET) for rank in range(len(words))))
    round_: list[str] = []
    while True:
        if generator.random() > EVEN:
            yield generator.choices(words, cum_weights=weights)[0]
            continue
        round_ = round_ or generator.sample(words, len(words))
        yield round_.pop()


def _is_prose(sentence: str) -> bool:
    return SHORTEST_SENTENCE <= len(sentence.split()) <= LONGEST_SENTENCE and not MARKUP.search(sentence)
