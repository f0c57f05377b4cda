"""Encode texts as sentence embeddings, with a dense model or a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ffn2moe.dense.sentence import embed, prompt_of
from ffn2moe.progress import Track, untracked


@torch.no_grad()
def encode(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    max_length: int,
    prompt: str | None = None,
    batch_texts: int = 64,
    device: str | torch.device = "cpu",
    track: Track = untracked,
) -> Tensor:
    """Return embeddings, float32 on the CPU, [N, D'], in the order of `texts`.

    The modules attached to the model make them. Before each text stands `prompt`, or the model's default prompt, if it
    has one. Texts are cut to `max_length` tokens and batched with others of similar length, so that batches have little
    padding. The model is moved to `device` and left in eval mode. ValueError for no text, or for an empty one.
    """
    texts = list(texts)
    embeddings_ND: Tensor | None = None
    for batch, ids_BL, mask_BL in _batches(
        model,
        tokenizer,
        texts,
        prompt=prompt_of(model, prompt),
        max_length=max_length,
        batch_texts=batch_texts,
        device=device,
        track=track,
    ):
        hidden_BLD = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        pooled_BD = embed(model, hidden_BLD, mask_BL).cpu()
        if embeddings_ND is None:
            embeddings_ND = torch.empty(len(texts), pooled_BD.shape[1])
        embeddings_ND[batch] = pooled_BD
    assert embeddings_ND is not None
    return embeddings_ND


def _batches(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    prompt: str,
    max_length: int,
    batch_texts: int,
    device: str | torch.device,
    track: Track = untracked,
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Yield the indices of each batch's texts, token ids [B, L] and mask [B, L]; move the model to the device."""
    if not texts:
        raise ValueError("there is no text to encode")
    empty = next((index for index, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise ValueError(f"text {empty} is empty: leave it out")
    ids = tokenizer([prompt + text for text in texts], truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: -len(ids[index]))
    batches = [order[start : start + batch_texts] for start in range(0, len(order), batch_texts)]
    model.to(device).eval()
    for batch in track(batches, len(batches), "encoding"):
        rows = [torch.tensor(ids[index]) for index in batch]
        ids_BL = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
        length_B = torch.tensor([len(row) for row in rows])
        mask_BL = (torch.arange(ids_BL.shape[1]) < length_B.unsqueeze(1)).long()
        yield batch, ids_BL.to(device), mask_BL.to(device)
