"""Prepare the data of a conversion: batches to calibrate on, to judge by, and to train on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ffn2moe.choices import HEADS
from ffn2moe.data.batches import Batch, Batches, BatchSource, in_order, pack
from ffn2moe.data.corpus import read_corpus
from ffn2moe.data.general import words_of
from ffn2moe.data.generate import greedy_answers, sample_tokens, texts_in
from ffn2moe.data.pairs import Pair, encode_pairs, pairs_of, read_pairs
from ffn2moe.dense.config import takes_token_types
from ffn2moe.numerics import bf16_supported

if TYPE_CHECKING:
    from ffn2moe.conversion.task import Task

EVALUATION_SHARE, MOST_EVALUATED = 0.05, 200  # of the texts are held out to judge by
MOST_JUDGED_TOKENS = 2**13  # of them, for a language model
MOST_JUDGED_NUMBERS = 2**26  # most logits that are compared together
AT_ONCE = 64  # texts that the model writes together, or answers, ...
CACHED_NUMBERS = 2**28  # ... unless their keys and values are more numbers than this

Ids = list[list[int]]
Row = TypeVar("Row", str, Pair)


@dataclass(frozen=True)
class Data:
    """The batches of a conversion, and a summary of them for the manifest."""

    calibration: list[Batch]
    evaluation: list[Batch]
    train: Callable[[], BatchSource]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts or pairs of texts, and for encoder-decoders those of each answer."""

    ids: Ids
    decoder_ids: Ids | None
    type_ids: Ids | None = None  # which text of a pair each token belongs to

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """Return the texts from `start` to `stop`."""
        others = (None if some is None else some[start:stop] for some in (self.decoder_ids, self.type_ids))
        return Tokens(self.ids[start:stop], *others)


def text_data(task: Task) -> Data:
    """Return the batches of a model that reads text. The tokens are kept in the unfinished folder."""
    head, pad_id = task.dense.head, task.dense.reader.pad_token_id or 0
    tokens = _kept_tokens(task)
    count = held_out(len(tokens.ids), MOST_JUDGED_TOKENS // task.max_length if head == "causal" else MOST_EVALUATED)
    train, judged = tokens.part(count), tokens.part(0, count)
    calibrated = train.part(0, _calibration_texts(train.ids, task.case.calibration_tokens))
    train_tokens = sum(map(len, train.ids))

    def batches(some: Tokens, texts: int) -> list[Batch]:
        return list(
            in_order(
                head,
                some.ids,
                some.decoder_ids,
                type_ids=some.type_ids,
                batch_texts=texts,
                pad_id=pad_id,
            )
        )

    at_once = task.case.request.calibration_batch

    return Data(
        calibration=batches(calibrated, at_once),
        evaluation=batches(judged, min(at_once, _judged_at_once(task))),
        train=lambda: Batches(
            train.ids,
            batch_tokens=max(task.max_length, min(task.case.batch_tokens, train_tokens // 4)),
            seed=task.settings.seed,
            pad_id=pad_id,
            head=head,
            decoder_ids=train.decoder_ids,
            type_ids=train.type_ids,
        ),
        summary={
            "corpus": task.corpus,
            "texts": len(tokens.ids),
            **({"pairs": True} if task.case.pairs else {}),
            "train_tokens": train_tokens,
            "evaluation_texts": count,
        },
    )


def held_out(count: int, most: int = MOST_EVALUATED) -> int:
    """Return how many of `count` texts are held out to judge by."""
    return max(1, min(most, int(EVALUATION_SHARE * count)))


def _judged_at_once(task: Task) -> int:
    """Return the number of texts whose outputs are compared together: those of a language model have many numbers."""
    if not HEADS[task.dense.head].generates:
        return AT_ONCE
    vocabulary: int = task.dense.config.get_text_config(decoder=True).vocab_size
    return max(1, MOST_JUDGED_NUMBERS // (vocabulary * task.max_length))


def _calibration_texts(ids: Sequence[Sequence[int]], wanted: int) -> int:
    """Return how many of the first texts have the wanted number of tokens together."""
    total = 0
    for count, text in enumerate(ids, 1):
        total += len(text)
        if total >= wanted:
            return count
    return len(ids)


def _kept_tokens(task: Task) -> Tokens:
    """Return the tokens that a stopped conversion left; else make and keep them."""
    kept = task.work / "tokens.json"
    if not kept.is_file():
        made = _generated(task) if task.corpus == "generated" else _of_corpus(task)
        fresh = kept.with_suffix(".fresh")
        fresh.write_text(json.dumps(asdict(made)))
        os.replace(fresh, kept)
    return Tokens(**json.loads(kept.read_text()))


def _generated(task: Task) -> Tokens:
    """Have a language model write texts, and return them as blocks of tokens."""
    teacher, bos = task.dense.model.to(task.device), task.dense.reader.bos_token_id
    config, case = task.dense.config.get_text_config(), task.case
    cached = 2 * config.num_hidden_layers * config.hidden_size * task.max_length  # numbers for one text, at most
    how: dict[str, Any] = {
        "length": task.max_length,
        "bos": teacher.generation_config.bos_token_id if bos is None else bos,
        "batch": max(1, min(AT_ONCE, CACHED_NUMBERS // cached)),
        "bf16": bf16_supported(task.device),
    }
    count = case.most_texts
    if case.writing_seconds is not None:
        count = max(case.fewest_texts, texts_in(teacher, case.writing_seconds, most=count, **how))
    task.say(f"the model writes {count} texts of at most {task.max_length} tokens")
    drawn = sample_tokens(teacher, count=count, seed=task.settings.seed, track=task.track, **how)
    return Tokens(pack(drawn, task.max_length, None), None)


def _chosen(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Return the distinct rows in a seeded order, as many as the settings ask for."""
    distinct = list(dict.fromkeys(rows))
    random.Random(task.settings.seed).shuffle(distinct)
    return distinct[: task.case.most_texts]


def _texts(task: Task) -> list[str]:
    """Return the texts of the corpus; a model that writes learns from no composed ones."""
    words = () if HEADS[task.dense.head].generates else words_of(task.dense.reader)
    column, count = task.settings.text_column, task.case.most_texts
    return read_corpus(task.corpus, column, words=words, count=count, track=task.track)


def _pairs(task: Task) -> list[Pair]:
    """Return the pairs of two columns, or pairs made of the texts of one."""
    column = task.settings.text_column
    if "," in column:
        return read_pairs(task.corpus, column)
    return pairs_of(list(dict.fromkeys(_texts(task))), task.settings.seed)


def _of_pairs(task: Task, pairs: Sequence[Pair]) -> Tokens:
    told_apart = takes_token_types(task.case.model)
    ids, type_ids = encode_pairs(task.dense.reader, pairs, task.max_length, told_apart=told_apart)
    return Tokens(ids, None, type_ids)


def _of_corpus(task: Task) -> Tokens:
    """Return the distinct texts of the corpus in a seeded order: as blocks for language models, else truncated."""
    tokenizer, length = task.dense.reader, task.max_length
    if task.case.pairs:
        return _of_pairs(task, _chosen(task, _pairs(task)))
    texts = _chosen(task, _texts(task))
    if task.dense.head == "causal":
        whole = tokenizer(texts)["input_ids"]
        begins = whole[0][:1] == [tokenizer.bos_token_id]  # then texts need nothing between them
        return Tokens(pack(whole, length, None if begins else tokenizer.eos_token_id), None)
    prompt = task.dense.sentence.prompt() if task.dense.sentence else ""
    ids = tokenizer([prompt + text for text in texts], truncation=True, max_length=length)["input_ids"]
    if task.dense.head != "seq2seq":
        return Tokens(ids, None)
    answers = greedy_answers(
        task.dense.model.to(task.device),
        ids,
        length=length,
        batch=AT_ONCE,
        pad_id=tokenizer.pad_token_id or 0,
        track=task.track,
    )
    return Tokens(ids, answers)
