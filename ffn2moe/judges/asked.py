"""Tokenise questions as lm-evaluation-harness does, so that its figures and these are the same.

The tokens of an answer are those of context and answer together, without as many as the context alone has: where the
last word of a context and the answer would merge into one token, the context keeps its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ffn2moe.judges.items import Item


@dataclass(frozen=True)
class Asked:
    """An answer whose probability is asked for, and the tokens before it."""

    context: tuple[int, ...]
    answer: tuple[int, ...]

    def cut(self, positions: int | None) -> Asked:
        """Return the same without the first tokens of a context that is longer than a model's positions allow.

        The last token of the answer takes no position, because nothing follows it.
        """
        over = 0 if positions is None else len(self.context) + len(self.answer) - 1 - positions
        return Asked(self.context[over:], self.answer) if over > 0 else self


@dataclass(frozen=True)
class Sheet:
    """The answers of all questions in one row, and what was done to ask for them."""

    asked: list[Asked]
    counts: list[int]  # answers of each question
    cut: int  # questions whose context lost its beginning


def first_token(tokenizer: Any) -> int:
    """Return the token that a text begins with: that of the beginning, or else of the end of texts. ValueError."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "the tokenizer has neither a bos_token nor an eos_token, and the first word of a sentence is judged after one: "
        "set bos_token in tokenizer_config.json"
    )


def beginning(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before every text; nothing where it puts none."""
    begin: list[int] = tokenizer("")["input_ids"][:1]
    return begin if begin == [tokenizer.bos_token_id] else []


def ask(items: Sequence[Item], tokenizer: Any, positions: int | None) -> Sheet:
    """Return the answers of all questions as tokens; a context that is too long loses its beginning.

    A space stands between context and answer, and before the answer of a question without context, which follows
    `first_token`. ValueError for an answer that has no token of its own, or more tokens than the model has positions.
    """
    given = [item.context.rstrip() for item in items if item.context is not None]
    wholes = [f"{item.context or ''} {choice}" for item in items for choice in item.choices]
    contexts, answers = iter(_ids(tokenizer, given)), iter(_ids(tokenizer, wholes))
    begin, first = beginning(tokenizer), (first_token(tokenizer),)
    asked: list[Asked] = []
    cut = 0
    for item in items:
        context = None if item.context is None else next(contexts)
        wholes_C = [next(answers) for _ in item.choices]
        if context is None:
            whole = [Asked(first, tuple(ids)) for ids in wholes_C]
        else:
            whole = [Asked((*begin, *context), tuple(ids[len(context) :])) for ids in wholes_C]
        for one, choice in zip(whole, item.choices, strict=True):
            _require_tokens(one, choice, positions)
        fitting = [one.cut(positions) for one in whole]
        cut += fitting != whole
        asked += fitting
    return Sheet(asked, [len(item.choices) for item in items], cut)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return found


def _require_tokens(one: Asked, choice: str, positions: int | None) -> None:
    if not one.answer:
        raise ValueError(f"the answer {choice!r} has no token of its own behind its context: leave the question out")
    if positions is not None and len(one.answer) > positions:
        raise ValueError(
            f"the answer {choice[:40]!r}... has {len(one.answer)} tokens, and the model {positions} positions: leave "
            "the question out"
        )
