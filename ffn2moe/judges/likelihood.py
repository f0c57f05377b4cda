"""Compute how probable a language model finds answers after their contexts: batched, each context read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffn2moe.data.batches import padded
from ffn2moe.judges.asked import Asked
from ffn2moe.judges.logits import MOST_LOGITS, log_probabilities, logits_at
from ffn2moe.progress import Track, untracked

BATCH_TOKENS = 1024  # of a pass: enough for fast products, few enough for the cache of a CPU


@torch.no_grad()
def log_likelihoods(model: Any, asked: Sequence[Asked], *, track: Track = untracked, what: str = "judging") -> Tensor:
    """Return the logarithm of the probability of each answer after its context, [N] float64, in nats.

    Several answers to one context share the pass over it, by the model's key-value cache; contexts of one length are
    read together. Other answers are read with their contexts. Answers of like lengths share a pass, padded on the
    right, where nothing that counts sees the padding.
    """
    answers: dict[tuple[int, ...], list[int]] = {}
    for place, one in enumerate(asked):
        answers.setdefault(one.context, []).append(place)
    shared = {context for context, places in answers.items() if len(context) > 1 and len(places) > 1}
    if shared and not _continues_from_cache(model):
        shared = set()
    apart = [place for context, places in answers.items() if context not in shared for place in places]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    passes: list[Contexts | Rows] = [*_together(shared, answers), *_like(asked, apart, vocabulary)]
    found_N = torch.zeros(len(asked), dtype=torch.float64)
    for one in track(passes, len(passes), what):
        places, nats = one.judge(model, asked, vocabulary)
        found_N[places] = nats
    return found_N


@dataclass(frozen=True)
class Rows:
    """Answers that are read together, each behind its context or behind the cached pass over it."""

    places: list[int]

    def judge(
        self, model: Any, asked: Sequence[Asked], vocabulary: int, cache: Any = None, context_PV: Tensor | None = None
    ) -> tuple[list[int], Tensor]:
        """Return the places and the log-likelihood of each, [N] float64.

        `cache` holds the contexts of these rows, and `context_PV` the logits at the last token of each, [N, V].
        """
        device, rows = model.device, [asked[place] for place in self.places]
        read = [[*(() if cache else one.context), *one.answer][:-1] for one in rows]
        first = [0 if cache else len(one.context) - 1 for one in rows]  # the position that predicts what is judged
        target_P = torch.tensor([token for one in rows for token in (one.answer[1:] if cache else one.answer)])
        found_N = torch.zeros(len(rows), dtype=torch.float64)
        if context_PV is not None:
            found_N += log_probabilities(context_PV, torch.tensor([one.answer[0] for one in rows], device=device))
        if not len(target_P):
            return self.places, found_N
        ids_NL, mask_NL = padded(read, 0, None)
        judged_NL = mask_NL.bool() & (torch.arange(ids_NL.shape[1]) >= torch.tensor(first).unsqueeze(1))
        options = {"past_key_values": cache} if cache else {"use_cache": False}
        logits_PV, _ = logits_at(model, judged_NL.to(device), input_ids=ids_NL.to(device), **options)
        row_P = judged_NL.nonzero()[:, 0]
        return self.places, found_N.index_add_(0, row_P, log_probabilities(logits_PV, target_P.to(device)))


@dataclass(frozen=True)
class Contexts:
    """Contexts of one length, which are read once, and the answers to each."""

    contexts: list[tuple[int, ...]]
    answers: list[list[int]]  # places

    def judge(self, model: Any, asked: Sequence[Asked], vocabulary: int) -> tuple[list[int], Tensor]:
        """Return the places of all answers and the log-likelihood of each, [N] float64."""
        ids_BL = torch.tensor(self.contexts, device=model.device)
        last_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        last_BL[:, -1] = True
        logits_BV, output = logits_at(model, last_BL, input_ids=ids_BL, use_cache=True)
        context_of = {place: row for row, places in enumerate(self.answers) for place in places}
        found = []
        for rows in _like(asked, list(context_of), vocabulary, behind_cache=True):
            index_N = torch.tensor([context_of[place] for place in rows.places], device=model.device)
            cache = copy.deepcopy(output.past_key_values)  # a pass adds to the cache that it is given
            cache.batch_select_indices(index_N)
            found.append(rows.judge(model, asked, vocabulary, cache, logits_BV[index_N]))
        return [place for places, _ in found for place in places], torch.cat([nats for _, nats in found])


def _together(shared: set[tuple[int, ...]], answers: dict[tuple[int, ...], list[int]]) -> Iterator[Contexts]:
    """Yield contexts of one length, the longest first, so that the estimate of the time left is no promise."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for context in answers:
        if context in shared:
            by_length.setdefault(len(context), []).append(context)
    for length, contexts in sorted(by_length.items(), reverse=True):
        step = max(1, BATCH_TOKENS // length)
        for start in range(0, len(contexts), step):
            part = contexts[start : start + step]
            yield Contexts(part, [answers[context] for context in part])


def _like(asked: Sequence[Asked], places: list[int], vocabulary: int, *, behind_cache: bool = False) -> Iterator[Rows]:
    """Yield answers of like lengths, the longest first, as many as a pass takes."""

    def read(place: int) -> int:
        one = asked[place]
        return len(one.answer) - 1 + (0 if behind_cache else len(one.context))

    most, rows = 0, []
    for place in sorted(places, key=read, reverse=True):
        most = most or max(1, min(BATCH_TOKENS, MOST_LOGITS // vocabulary) // max(1, read(place)))
        rows.append(place)
        if len(rows) == most:
            yield Rows(rows)
            most, rows = 0, []
    if rows:
        yield Rows(rows)


def _continues_from_cache(model: Any) -> bool:
    """Return whether several texts can be continued from one pass over their common beginning."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache = getattr(model(input_ids=token, use_cache=True), "past_key_values", None)
    able = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in able for layer in cache.layers)
