"""Collect what the FFNs of a model see on texts, and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.data.batches import Batch
from ffn2moe.dense.locate import ffn_modules, stacks_of
from ffn2moe.numerics import pool
from ffn2moe.spec import Head, Pooling

CHUNK = 4096  # tokens at once, where that makes no more numbers than ...
MOST_NUMBERS = 2**25  # ... this: the activations, or the outputs of all experts, of a chunk


@torch.no_grad()
def layer_inputs(
    model: Any, batches: Iterable[Batch], *, max_tokens: int, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """What the FFN of each layer gets to see: its inputs [T, D] on the CPU, float32, for every layer in order.

    Positions that are padding are left out. A layer sees at most the first `max_tokens` tokens of the batches, the
    same ones as the other layers of its stack. The model is moved to `device` and left in eval mode.
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
        for batch in batches:
            now.append(batch.to(torch.device(device)))
            model(**now[-1].inputs)
            if all(sum(map(len, parts)) >= max_tokens for parts in seen):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts)[:max_tokens] for parts in seen]


def real_tokens(x: Tensor, batch: Batch, layers: str) -> Tensor:
    """The rows [T, D] of a layer's input, [B, L, D] or [B * L, D], that are no padding.

    `layers` is the path of the layer's stack. The batch's mask is that of the output; the encoder before a decoder
    has its own, `attention_mask`. Input that no mask fits, such as image patches, is real throughout.
    """
    masks = [batch.mask, batch.inputs.get("attention_mask")]
    if layers.startswith("encoder") and "decoder_input_ids" in batch.inputs:
        masks.reverse()
    for mask in masks:
        if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
            return x[mask.bool().reshape(x.shape[:-1])]
    return x.reshape(-1, x.shape[-1])


def texts_of(batches: Iterable[Batch], max_tokens: int) -> Tensor:
    """Which text each token of `layer_inputs` belongs to, [T], counted from 0; for models of one stack."""
    parts: list[Tensor] = []
    texts = 0
    for batch in batches:
        mask = batch.inputs["attention_mask"] if batch.mask is None else batch.mask
        parts.append(mask.nonzero()[:, 0].cpu() + texts)
        texts += len(mask)
        if sum(map(len, parts)) >= max_tokens:
            break
    return torch.cat(parts)[:max_tokens]


def chunk_of(numbers: int) -> int:
    """How many tokens to work on at once, where each makes so many numbers."""
    return max(256, min(CHUNK, MOST_NUMBERS // numbers))


def output_gradients(
    model: Any,
    batches: Iterable[Batch],
    *,
    head: Head,
    pooling: Pooling | None,
    max_tokens: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """The gradient of the model's loss at the output of each layer's FFN, [T, D] for the tokens of `layer_inputs`.

    The loss of a model that writes text is the cross-entropy of the next token. Any other is judged by what it gives,
    a sentence embedding, logits or hidden states, which has no loss without labels: there it is the output's part in a
    random direction (one of signs, for each text), whose gradient is, squared and on average, how far the output moves.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = [layer.get_submodule(stack.w_out) for stack, layers in stacks_of(model) for layer in layers]
    paths = [stack.layers for stack, layers in stacks_of(model) for _ in layers]
    found: list[list[Tensor]] = [[] for _ in outputs]
    probes: list[Tensor] = []

    def add_probe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [module.register_forward_hook(add_probe) for module in outputs]
    model.to(device).eval().requires_grad_(False)
    try:
        for batch in batches:
            batch = batch.to(torch.device(device))
            probes.clear()
            gradients = torch.autograd.grad(_loss(model, batch, head, pooling, generator), probes)
            for parts, gradient, path in zip(found, gradients, paths, strict=True):
                parts.append(real_tokens(gradient, batch, path).float().cpu())
            if all(sum(map(len, parts)) >= max_tokens for parts in found):
                break
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return [torch.cat(parts)[:max_tokens] for parts in found]


def _loss(model: Any, batch: Batch, head: Head, pooling: Pooling | None, generator: torch.Generator) -> Tensor:
    """What `output_gradients` differentiates: a sum over texts and tokens."""
    if head == "causal" or head == "seq2seq":
        logits_BLV = model(**batch.inputs).logits[:, :-1]
        ids_BL = batch.inputs["input_ids" if head == "causal" else "decoder_input_ids"][:, 1:]
        if batch.mask is not None:
            ids_BL = ids_BL.masked_fill(batch.mask[:, 1:] == 0, -100)  # which cross_entropy leaves out
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), ids_BL.flatten(), reduction="sum")
    if head == "embedding":
        assert batch.mask is not None and pooling is not None
        output = pool(model(**batch.inputs)[0], batch.mask, pooling)
    else:
        found = model(**batch.inputs)
        output = found.logits if getattr(found, "logits", None) is not None else found[0]
    direction = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * direction).sum()
