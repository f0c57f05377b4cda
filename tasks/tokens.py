"""Read the texts of a split as token ids, in the form that a model's head learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.corpus import read_jsonl

if TYPE_CHECKING:
    from ffn2moe.data.batches import Batch, Batches
    from ffn2moe.spec import Head


@dataclass(frozen=True)
class Tokens:
    """The token ids of each sequence and, for a seq2seq model, those that its decoder reads."""

    head: Head
    ids: list[list[int]]
    decoder_ids: list[list[int]] | None
    pad_id: int

    def in_order(self, batch_texts: int = 64) -> Iterator[Batch]:
        """Yield batches of `batch_texts` sequences, in order, once."""
        from ffn2moe.data.batches import in_order

        return in_order(self.head, self.ids, self.decoder_ids, batch_texts=batch_texts, pad_id=self.pad_id)

    def shuffled(self, *, batch_tokens: int, seed: int) -> Batches:
        """Return endless batches to train on, in a seeded order."""
        from ffn2moe.data.batches import Batches

        return Batches(
            self.ids,
            batch_tokens=batch_tokens,
            seed=seed,
            pad_id=self.pad_id,
            head=self.head,
            decoder_ids=self.decoder_ids,
        )


def read_tokens(
    path: Path, head: Head, tokenizer: Any, max_length: int, *, packed: bool = True, prompt: str = ""
) -> Tokens:
    """Read a split that `prepare` wrote, as sequences of at most `max_length` tokens.

    The texts of an embedding model are tokenised here, each behind `prompt`. The texts of a causal model are packed
    into blocks of `max_length`; with `packed` false each is truncated to it.
    """
    from ffn2moe.data.batches import pack

    rows = read_jsonl(path)
    pad_id = tokenizer.pad_token_id or 0
    if head == "embedding":
        texts = [prompt + row["text"] for row in rows]
        return Tokens(head, tokenizer(texts, truncation=True, max_length=max_length)["input_ids"], None, pad_id)
    ids = [row["ids"] for row in rows]
    if head == "causal" and packed:
        # Documents that all begin with the same special token need no token between them.
        first = ids[0][:1]
        begun = first[0] in tokenizer.all_special_ids and all(text[:1] == first for text in ids)
        return Tokens(head, pack(ids, max_length, None if begun else tokenizer.eos_token_id), None, pad_id)
    decoder_ids = [row["decoder_ids"][:max_length] for row in rows] if head == "seq2seq" else None
    return Tokens(head, [text[:max_length] for text in ids], decoder_ids, pad_id)
