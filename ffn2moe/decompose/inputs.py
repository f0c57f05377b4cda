"""Collect the inputs of a model's FFNs on texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import Batch
from ffn2moe.dense.locate import ffn_modules, stacks_of
from ffn2moe.progress import Track, untracked


@torch.no_grad()
def layer_inputs(
    model: Any,
    batches: Iterable[Batch],
    *,
    max_tokens: int,
    device: str | torch.device = "cpu",
    track: Track = untracked,
) -> list[Tensor]:
    """Return the inputs of the FFN of every layer in order, [T, D] each, float32 on the CPU.

    Padding is left out. A layer sees at most the first `max_tokens` tokens of the batches, the same ones as the other
    layers of its stack. The model is moved to `device` and left in eval mode.
    """
    seen: list[list[Tensor]] = []
    now: list[Batch] = []

    def keep(index: int, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if sum(map(len, seen[index])) < max_tokens:
                seen[index].append(real_tokens(inputs[0], now[-1], path).float().cpu())

        return hook

    paths = [stack.layers for stack, layers in stacks_of(model) for _ in layers]
    hooks = []
    for index, (module, path) in enumerate(zip(ffn_modules(model), paths, strict=True)):
        seen.append([])
        hooks.append(module.register_forward_pre_hook(keep(index, path)))
    model.to(device).eval()
    try:
        for batch in _tracked(batches, max_tokens, track):
            now.append(batch.to(torch.device(device)))
            without_logits(model, batch)(**now[-1].inputs)
            if all(sum(map(len, parts)) >= max_tokens for parts in seen):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts)[:max_tokens] for parts in seen]


def _tracked(batches: Iterable[Batch], max_tokens: int, track: Track) -> Iterable[Batch]:
    """Show the progress through as many batches as hold `max_tokens` tokens, if all are like the first."""
    if isinstance(batches, Sequence):
        return track(batches, len(batches), "recording the inputs of the FFNs")
    every = iter(batches)
    first = next(every, None)
    if first is None:
        return ()
    mask = first.inputs.get("attention_mask", first.mask)
    total = 1 if mask is None else ceil(max_tokens / max(1, int(mask.sum())))
    return track(chain([first], every), total, "recording the inputs of the FFNs")


def without_logits(model: Any, batch: Batch) -> Any:
    """Return the part of a model that runs its FFNs on a batch: of a language model all but the map to its logits."""
    map_to_logits = getattr(model, "get_output_embeddings", lambda: None)()
    return model if map_to_logits is None or "decoder_input_ids" in batch.inputs else model.base_model


def real_tokens(x: Tensor, batch: Batch, layers: str) -> Tensor:
    """Return the rows [T, D] of a layer's input, [B, L, D] or [B * L, D], that are no padding.

    `layers` is the path of the layer's stack. The batch's mask belongs to the output; the encoder before a decoder
    has its own, `attention_mask`. Input that no mask fits, such as image patches, has no padding.
    """
    masks = [batch.mask, batch.inputs.get("attention_mask")]
    if layers.startswith("encoder") and "decoder_input_ids" in batch.inputs:
        masks.reverse()
    for mask in masks:
        if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
            return x[mask.bool().reshape(x.shape[:-1])]
    return x.reshape(-1, x.shape[-1])


def texts_of(batches: Iterable[Batch], max_tokens: int) -> Tensor:
    """Return the text of each token of `layer_inputs`, [T], counted from 0; for models of one stack."""
    parts: list[Tensor] = []
    texts = 0
    for batch in batches:
        mask = batch.inputs["attention_mask"] if batch.mask is None else batch.mask
        parts.append(mask.nonzero()[:, 0].cpu() + texts)
        texts += len(mask)
        if sum(map(len, parts)) >= max_tokens:
            break
    return torch.cat(parts)[:max_tokens]
