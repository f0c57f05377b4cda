"""Batch token sequences in a seeded order that a resumed run repeats."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Protocol

import torch
from torch import Tensor

from ffn2moe.data.ranks import ALONE, Ranks
from ffn2moe.spec import Head


def pack(token_ids: Iterable[Sequence[int]], length: int, eos: int | None) -> list[list[int]]:
    """Return documents joined, in order, as full blocks of `length` tokens; the rest is dropped.

    Each document ends in `eos`, which is added where it is missing; None adds nothing. ValueError where the tokens are
    too few for one block.
    """
    joined: list[int] = []
    for ids in token_ids:
        joined += ids
        if eos is not None and (not ids or ids[-1] != eos):
            joined.append(eos)
    if len(joined) < length:
        raise ValueError(f"{len(joined)} tokens do not fill one block of {length}: give more text, or shorter blocks")
    return [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]


# Texts are padded to one of these lengths, in tokens. They are few because oneDNN compiles a kernel for each shape.
BATCH_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Batch:
    """The arguments of a model's forward, and the positions [B, L] of its output that count (None: all).

    `ranks` are the processes that have the rest of the batch. With `stands_in` this process has none of its texts: it
    runs the model on a text of another process, and no row of it counts.
    """

    inputs: dict[str, Tensor]
    mask: Tensor | None
    ranks: Ranks = ALONE
    stands_in: bool = False

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def rows(self, rows: slice) -> Batch:
        """Return some of the texts, with the same padding."""
        return self._each(lambda tensor: tensor[rows])

    def part(self, ranks: Ranks) -> Batch:
        """Return the texts of this process, with the same padding."""
        rows = ranks.part(len(next(iter(self.inputs.values()))))
        stands_in = rows.start == rows.stop
        taken = slice(0, 1) if stands_in else rows
        return replace(self._each(lambda tensor: tensor[taken]), ranks=ranks, stands_in=stands_in)

    def counted(self) -> Batch:
        """Return the batch without the text that stands in."""
        return self._each(lambda tensor: tensor[:0]) if self.stands_in else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, mask=None if self.mask is None else change(self.mask))


class BatchSource(Protocol):
    """Endless batches, whose order depends only on a seed and the step."""

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield the batches from a step on."""
        ...


def collate(
    head: Head,
    token_ids: Sequence[Sequence[int]],
    decoder_ids: Sequence[Sequence[int]] | None = None,
    *,
    type_ids: Sequence[Sequence[int]] | None = None,
    pad_id: int = 0,
    length: int | None = None,
) -> Batch:
    """Return texts as one batch, padded on the right to `length` tokens, or to the longest text.

    `decoder_ids` is the input of a `seq2seq` model's decoder for each text, and `type_ids` says of each token which
    text of a pair it belongs to. The positions that count are the tokens that are not padding, of the decoder where
    there is one; a classifier's only row of each text counts.
    """
    ids_BL, mask_BL = padded(token_ids, pad_id, length)
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
    if type_ids is not None:
        inputs["token_type_ids"] = padded(type_ids, 0, ids_BL.shape[1])[0]
    if head == "seq2seq":
        assert decoder_ids is not None
        inputs["decoder_input_ids"], mask_BL = padded(decoder_ids, pad_id, None)
    return Batch(inputs, None if head == "classification" else mask_BL)


def padded(token_ids: Sequence[Sequence[int]], pad_id: int, length: int | None) -> tuple[Tensor, Tensor]:
    """Return token ids [B, L], padded on the right, and the mask [B, L] that is 1 where a token is real."""
    length = length or max(map(len, token_ids))
    ids_BL = torch.full((len(token_ids), length), pad_id)
    mask_BL = torch.zeros(len(token_ids), length, dtype=torch.int64)
    for row, ids in enumerate(token_ids):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        mask_BL[row, : len(ids)] = 1
    return ids_BL, mask_BL


def in_order(
    head: Head,
    token_ids: Sequence[Sequence[int]],
    decoder_ids: Sequence[Sequence[int]] | None = None,
    *,
    type_ids: Sequence[Sequence[int]] | None = None,
    batch_texts: int = 64,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """Yield the texts once, in their order, `batch_texts` at a time, for calibration and evaluation."""
    for start in range(0, len(token_ids), batch_texts):
        part = slice(start, start + batch_texts)
        yield collate(
            head,
            token_ids[part],
            decoder_ids[part] if decoder_ids else None,
            type_ids=type_ids[part] if type_ids else None,
            pad_id=pad_id,
        )


def first_by_length(token_ids: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
    """Return the indices of the first texts that hold `max_tokens` tokens together, the shortest text first.

    Batches of texts of like length have little padding: in the order of the corpus three quarters can be padding.
    """
    ends = accumulate(map(len, token_ids))
    count = 1 + sum(1 for _ in takewhile(lambda end: end < max_tokens, ends))
    return sorted(range(min(count, len(token_ids))), key=lambda index: len(token_ids[index]))


class Batches:
    """Endless batches of about `batch_tokens` tokens in a seeded order; all texts of a batch have one padded length.

    The batch of a step depends only on the seed and the step, so that a resumed run sees the same batches. Blocks of
    equal length (`pack`) get no padding. ValueError where the texts are too few for one batch.
    """

    def __init__(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        batch_tokens: int,
        seed: int,
        pad_id: int = 0,
        head: Head = "embedding",
        decoder_ids: Sequence[Sequence[int]] | None = None,
        type_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._token_ids = token_ids
        self._decoder_ids = decoder_ids
        self._type_ids = type_ids
        self._head: Head = head
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._pad_id = pad_id
        self._buckets: dict[int, list[int]] = {}
        widths = BATCH_LENGTHS if len({len(ids) for ids in token_ids}) > 1 else ()
        for index, ids in enumerate(token_ids):
            length = next((width for width in widths if len(ids) <= width), len(ids))
            self._buckets.setdefault(length, []).append(index)
        self.per_epoch = sum(len(group) // self._texts(length) for length, group in self._buckets.items())
        if self.per_epoch == 0:
            raise ValueError(
                f"{len(token_ids)} texts do not fill one batch of {batch_tokens} tokens: "
                "give more text, or lower batch_tokens"
            )

    def _texts(self, length: int) -> int:
        return max(1, self._batch_tokens // length)

    def _epoch(self, epoch: int) -> list[tuple[int, list[int]]]:
        generator = random.Random(f"{self._seed}/{epoch}")
        order = []
        for length, group in sorted(self._buckets.items()):
            shuffled = generator.sample(group, len(group))
            size = self._texts(length)
            order += [(length, shuffled[i : i + size]) for i in range(0, len(shuffled) - size + 1, size)]
        generator.shuffle(order)
        return order

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield the batches from a step on."""
        epoch, skip = divmod(step, self.per_epoch)
        while True:
            for length, indices in self._epoch(epoch)[skip:]:
                yield collate(
                    self._head,
                    [self._token_ids[index] for index in indices],
                    [self._decoder_ids[index] for index in indices] if self._decoder_ids else None,
                    type_ids=[self._type_ids[index] for index in indices] if self._type_ids else None,
                    pad_id=self._pad_id,
                    length=length,
                )
            epoch, skip = epoch + 1, 0
