"""Have a model write token sequences: texts drawn from a language model, answers of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ffn2moe.progress import Track, untracked


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
    track: Track = untracked,
) -> list[list[int]]:
    """Return `count` texts drawn from a causal language model, as token ids: the data of data-free distillation.

    Each begins with `bos`, or with a token drawn evenly from the vocabulary where that is None, and ends after
    `length` tokens or with the model's end-of-text token, which is kept. `batch` texts are drawn together, with a
    key-value cache; the same seed and batch give the same texts on the same machine. ValueError for logits that are
    not finite and for a `length` beyond the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"texts of {length} tokens are longer than the {positions} positions of the model: lower it")
    generator = torch.Generator(model.device).manual_seed(seed)
    ends = end_of_text(model)
    stop = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)
    texts: list[list[int]] = []
    starts = range(0, count, batch)
    for start in track(starts, len(starts), "sampling texts"):
        size = min(batch, count - start)
        rows_BL = _sample(model, size, length, bos, stop, temperature, generator)
        for row in rows_BL.tolist():
            end = next((place for place, token in enumerate(row) if place and token in ends), length - 1)
            texts.append(row[: end + 1])
    return texts


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


def _sample(
    model: Any,
    size: int,
    length: int,
    bos: int | None,
    stop: Tensor,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Return token ids [B, L]; tokens after an end-of-text token have no meaning."""
    device = model.device
    if bos is None:
        vocabulary = model.config.get_text_config().vocab_size
        token_B1 = torch.randint(vocabulary, (size, 1), generator=generator, device=device)
    else:
        token_B1 = torch.full((size, 1), bos, device=device)
    ids_BL = torch.zeros(size, length, dtype=torch.int64, device=device)
    ids_BL[:, :1] = token_B1
    done_B = torch.zeros(size, dtype=torch.bool, device=device)
    cache = None
    for place in range(1, length):
        output = model(input_ids=token_B1, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores_BV = output.logits[:, -1].float() / temperature
        if not torch.isfinite(scores_BV.logsumexp(-1)).all():
            raise ValueError("the model computes logits that are not finite, so no text can be drawn")
        token_B1 = torch.multinomial(scores_BV.softmax(-1), 1, generator=generator)
        ids_BL[:, place : place + 1] = token_B1
        done_B |= torch.isin(token_B1[:, 0], stop)
        if done_B.all():
            break
    return ids_BL
