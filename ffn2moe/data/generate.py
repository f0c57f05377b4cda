"""Have a model write token sequences: texts drawn from a language model, answers of an encoder-decoder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ffn2moe.dense.precision import bf16_copies, use_float32_attention, weights_in_bf16
from ffn2moe.progress import Track, untracked

TIMED_TOKENS = 4  # of each text of a batch
MOST_OF_ONE_TOKEN = 0.5  # share of a corpus that may be one token, ...
FEWEST_COUNTED = 64  # ... where it has so many


@torch.no_grad()
def sample_tokens(
    model: Any,
    *,
    count: int,
    length: int,
    seed: int,
    bos: int | None,
    batch: int,
    temperature: float = 1.0,
    bf16: bool = False,
    track: Track = untracked,
) -> list[list[int]]:
    """Return `count` texts drawn from a causal language model, as token ids: the data of data-free distillation.

    Each begins with `bos`, or with a token drawn evenly from the vocabulary where that is None, and ends after
    `length` tokens or with the model's end-of-text token, which is kept. `batch` texts are drawn together, with a
    key-value cache; the same seed and batch give the same texts on the same machine. `bf16` multiplies in bfloat16.
    ValueError for logits that are not finite, for a `length` beyond the model's positions, and for texts that are
    mostly one token.
    """
    _require_positions(model, length)
    generator = torch.Generator(model.device).manual_seed(seed)
    ends = end_of_text(model)
    texts: list[list[int]] = []
    starts, places = range(0, count, batch), max(1, length - 1)
    drawn: Drawn | None = None
    steps = ((start, place) for start in starts for place in range(places))
    with _half(model, bf16):
        for start, place in track(steps, len(starts) * places, "writing texts"):
            if place == 0:
                drawn = Drawn(model, min(batch, count - start), length, bos, ends, temperature, generator)
            assert drawn is not None
            if length > 1:
                drawn.step()
            if place == places - 1:
                texts += drawn.texts()
                if start == 0:
                    require_varied(texts)
    return texts


@torch.no_grad()
def texts_in(
    model: Any, seconds: float, *, length: int, bos: int | None, batch: int, bf16: bool = False, most: int
) -> int:
    """Return how many texts `sample_tokens` draws in this time, `most` at most: whole batches, at least one.

    A few tokens of one batch are drawn, timed and dropped.
    """
    _require_positions(model, length)
    with _half(model, bf16):
        drawn = Drawn(model, batch, TIMED_TOKENS + 2, bos, set(), 1.0, torch.Generator(model.device).manual_seed(0))
        drawn.step()  # the first is slower
        start = time.monotonic()
        for _ in range(TIMED_TOKENS):
            drawn.step()
        each = (time.monotonic() - start) / TIMED_TOKENS * length
    return min(most, batch * max(1, int(seconds / each)))


def require_varied(texts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for texts that are mostly one token: a model that is broken, or started wrongly, writes them."""
    counts = Counter(token for text in texts for token in text[1:])
    token, most = counts.most_common(1)[0] if counts else (0, 0)
    share = most / max(1, counts.total())
    if counts.total() >= FEWEST_COUNTED and share > MOST_OF_ONE_TOKEN:
        raise ValueError(
            f"{100 * share:.0f} % of what the model writes is the token {token}, from which nothing can be learnt: its "
            "weights are damaged, or it needs a prompt to write; give texts instead (--corpus, or data.corpus)"
        )


@contextmanager
def _half(model: Any, bf16: bool) -> Iterator[None]:
    """Let the model multiply in bfloat16 while the block runs."""
    if not bf16:
        yield
        return
    attention = model.config._attn_implementation
    use_float32_attention(model)
    try:
        with torch.autocast(model.device.type, torch.bfloat16), weights_in_bf16(bf16_copies(model)):
            yield
    finally:
        model.set_attn_implementation(attention)


def _require_positions(model: Any, length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"texts of {length} tokens are longer than the {positions} positions of the model: lower it")


@torch.no_grad()
def greedy_answers(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    *,
    length: int,
    batch: int,
    pad_id: int,
    track: Track = untracked,
) -> list[list[int]]:
    """Return a seq2seq model's greedy answer to each text, as the decoder's input ids [L] that reproduce it.

    An answer has at most `length` tokens. It begins with the decoder's start token and leaves out the last predicted
    token, because nothing is predicted from it.
    """
    ends = end_of_text(model)
    answers: list[list[int]] = []
    starts = range(0, len(token_ids), batch)
    for start in track(starts, len(starts), "answering texts"):
        rows = [torch.tensor(ids) for ids in token_ids[start : start + batch]]
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        length_B = torch.tensor([len(row) for row in rows])
        mask_BL = (torch.arange(ids_BL.shape[1]) < length_B.unsqueeze(1)).long()
        found_BL = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
        )
        for row in found_BL.tolist():
            # The first token starts the decoder; in some models it is the one that ends a text, too.
            end = next((place for place, token in enumerate(row) if place and token in ends), len(row) - 1)
            answers.append(row[:end])
    return answers


def end_of_text(model: Any) -> set[int]:
    """Return the tokens that end a text, from the generation config, or else the model's config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return set()


class Drawn:
    """Texts that are drawn together, a token at a time. Tokens after an end-of-text token have no meaning."""

    def __init__(
        self,
        model: Any,
        size: int,
        length: int,
        bos: int | None,
        ends: set[int],
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        device = model.device
        if bos is None:
            vocabulary = model.config.get_text_config().vocab_size
            token_B1 = torch.randint(vocabulary, (size, 1), generator=generator, device=device)
        else:
            token_B1 = torch.full((size, 1), bos, device=device)
        self._model, self._ends, self._temperature, self._generator = model, ends, temperature, generator
        self._stop = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
        self._ids_BL = torch.zeros(size, length, dtype=torch.int64, device=device)
        self._ids_BL[:, :1] = token_B1
        self._done_B = torch.zeros(size, dtype=torch.bool, device=device)
        self._place, self._cache = 1, None

    def step(self) -> None:
        """Draw the next token of each text; do nothing once all have ended."""
        if self._done_B.all():
            return
        last_B1 = self._ids_BL[:, self._place - 1 : self._place]
        output = self._model(input_ids=last_B1, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        scores_BV = output.logits[:, -1].float() / self._temperature
        if not torch.isfinite(scores_BV.logsumexp(-1)).all():
            raise ValueError("the model computes logits that are not finite, so no text can be drawn")
        token_B1 = torch.multinomial(scores_BV.softmax(-1), 1, generator=self._generator)
        self._ids_BL[:, self._place : self._place + 1] = token_B1
        self._done_B |= torch.isin(token_B1[:, 0], self._stop)
        self._place += 1

    def texts(self) -> list[list[int]]:
        """Return the token ids of each text up to its end."""
        found = []
        for row in self._ids_BL.tolist():
            end = next((place for place, token in enumerate(row) if place and token in self._ends), len(row) - 1)
            found.append(row[: end + 1])
        return found
