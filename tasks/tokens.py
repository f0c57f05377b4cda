"""Read the texts of a split as token ids, in the form that a model's head learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import HEADS
from tasks.corpus import read_jsonl

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.data.batches import Batch, Batches
    from ffn2moe.spec import Head


@dataclass(frozen=True)
class Tokens:
    """The token ids of each text or pair of texts, and those that the decoder of a seq2seq model reads."""

    head: Head
    ids: list[list[int]]
    decoder_ids: list[list[int]] | None
    pad_id: int
    type_ids: list[list[int]] | None = None  # which text of a pair each token belongs to
    pairs: bool = False  # whether these are pairs of texts

    def part(self, start: int, stop: int) -> Tokens:
        """Return some of the texts."""
        decoder_ids, type_ids = (None if one is None else one[start:stop] for one in (self.decoder_ids, self.type_ids))
        return Tokens(self.head, self.ids[start:stop], decoder_ids, self.pad_id, type_ids, self.pairs)

    def beginning(self, max_tokens: int) -> Tokens:
        """Return the first texts that hold at most `max_tokens` tokens together; one at least."""
        total = 0
        for count, ids in enumerate(self.ids):
            total += len(ids)
            if total > max_tokens:
                return self.part(0, max(1, count))
        return self

    def first_by_length(self, max_tokens: int) -> Tokens:
        """Return the first texts that hold `max_tokens` tokens together, the shortest text first."""
        from ffn2moe.data.batches import first_by_length

        order = first_by_length(self.ids, max_tokens)
        ids, decoder_ids, type_ids = (
            None if one is None else [one[index] for index in order]
            for one in (self.ids, self.decoder_ids, self.type_ids)
        )
        assert ids is not None
        return Tokens(self.head, ids, decoder_ids, self.pad_id, type_ids, self.pairs)

    @property
    def at_once(self) -> int:
        """The number of texts to calibrate on together: blocks of a language model are long, and all equally so."""
        return 16 if HEADS[self.head].generates else 64

    def in_order(self, batch_texts: int = 64) -> Iterator[Batch]:
        """Yield batches of `batch_texts` sequences, in order, once."""
        from ffn2moe.data.batches import in_order

        return in_order(
            self.head,
            self.ids,
            self.decoder_ids,
            type_ids=self.type_ids,
            batch_texts=batch_texts,
            pad_id=self.pad_id,
        )

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
            type_ids=self.type_ids,
        )

    def rows(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits of a batch of a classifier that count, [N, C]: of texts [B, C], or tokens [B, L, C]."""
        return logits if mask is None else logits[mask.bool()]

    def text_of_rows(self) -> Tensor | None:
        """Return the text of each row of `rows` over all batches, [N]; None where each row is a text."""
        import torch

        if self.head == "classification":
            return None
        return torch.arange(len(self.ids)).repeat_interleave(torch.tensor([len(ids) for ids in self.ids]))


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
    type_ids = [row["type_ids"][:max_length] for row in rows] if "type_ids" in rows[0] else None
    return Tokens(head, [text[:max_length] for text in ids], decoder_ids, pad_id, type_ids, "pair" in rows[0])
