"""Measure what an error in the output of an FFN costs the whole model.

The Fisher information of the FFN's output, ``E[g g']`` over tokens with g the gradient of the loss, weighs an error e
of it: the divergence of the model's output grows by ``e' E[g g'] e / 2`` (Martens 2020, arXiv 1412.1193).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.choices import HEADS
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import real_tokens
from ffn2moe.dense.locate import stacks_of
from ffn2moe.dense.sentence import directions, embed, modules_of
from ffn2moe.progress import Track, untracked

IMAGES_AT_ONCE = 4
PATCHES = 49  # tokens of an image at least: 7 x 7
TOKENS_AT_ONCE = 1024  # of a backward pass, whose logits and activations are kept
FISHER_TOKENS = 4096  # that the Fisher information is measured on

Loss = Callable[[Any, Batch], Tensor]  # a sum over texts and tokens


def output_gradients(
    model: Any, batches: Iterable[Batch], loss: Loss, *, device: str | torch.device = "cpu"
) -> Iterator[list[Tensor]]:
    """Yield for each batch the gradient of the loss at the output of every layer's FFN, [T, D] each, on the CPU.

    Padding is left out. The model is moved to `device` and left in eval mode; its weights get no gradient.
    """
    outputs = [layer.get_submodule(stack.w_out) for stack, layers in stacks_of(model) for layer in layers]
    paths = [stack.layers for stack, layers in stacks_of(model) for _ in layers]
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
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(model, batch), probes)
            yield [real_tokens(one, batch, path).float().cpu() for one, path in zip(gradients, paths, strict=True)]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def fisher(
    model: Any,
    batches: Iterable[Batch],
    *,
    head: str,
    seed: int,
    max_tokens: int = FISHER_TOKENS,
    device: str | torch.device = "cpu",
    track: Track = untracked,
) -> list[Tensor]:
    """Return ``E[g g']`` of the output of every layer's FFN, [D, D] each, on about the first `max_tokens` tokens.

    The loss is that of `drawn`. The model is moved to `device`.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: list[Tensor] = []
    tokens: list[int] = []
    small = first_parts(batches, max_tokens)
    tracked = track(small, len(small), "differentiating the model")
    for gradients in output_gradients(model, tracked, lambda m, batch: drawn(m, batch, head, generator), device=device):
        moments = [g_TD.T @ g_TD for g_TD in gradients]
        sums = [one + more for one, more in zip(sums, moments, strict=True)] if sums else moments
        counts = map(len, gradients)
        tokens = [one + more for one, more in zip(tokens, counts, strict=True)] if tokens else list(counts)
        if min(tokens) >= max_tokens:
            break
    return [total / count for total, count in zip(sums, tokens, strict=True)]


def first_parts(batches: Iterable[Batch], max_tokens: int) -> list[Batch]:
    """Return the first batches in parts (`parts_of`) with about `max_tokens` tokens, padding left out."""
    found, tokens = [], 0
    for batch in batches:
        for part in parts_of(batch):
            found.append(part)
            tokens += _tokens_of(part)
            if tokens >= max_tokens:
                return found
    return found


def _tokens_of(batch: Batch) -> int:
    first = next(iter(batch.inputs.values()))
    if batch.mask is not None:
        return int(batch.mask.sum())
    return first.numel() if first.dim() == 2 else PATCHES * len(first)


def parts_of(batch: Batch) -> Iterator[Batch]:
    """Yield a batch in parts of about `TOKENS_AT_ONCE` tokens."""
    first = next(iter(batch.inputs.values()))
    lengths = [tensor.shape[1] for tensor in batch.inputs.values() if tensor.dim() == 2]
    rows = max(1, TOKENS_AT_ONCE // max(lengths)) if lengths else IMAGES_AT_ONCE
    for start in range(0, len(first), rows):
        yield batch.rows(slice(start, start + rows))


def drawn(model: Any, batch: Batch, head: str, generator: torch.Generator) -> Tensor:
    """Return the loss of a batch whose gradients make the Fisher information.

    Of a model that generates it is the cross-entropy of tokens drawn from its own distribution. Other models have no
    loss without labels; there it is the part of the output, embeddings where the model makes them, in a random
    direction of signs: squared and on average, its gradient is how far the output moves.
    """
    found = model(**batch.inputs)
    if HEADS[head].generates:
        logits_TV = found.logits[batch.mask.bool()] if batch.mask is not None else found.logits.flatten(0, 1)
        shares_TV = logits_TV.detach().float().softmax(-1).cpu()
        drawn_T = torch.multinomial(shares_TV, 1, generator=generator).flatten()
        return F.cross_entropy(logits_TV.float(), drawn_T.to(logits_TV.device), reduction="sum")
    if modules_of(model) is not None and batch.mask is not None:
        output = directions(model, embed(model, found[0], batch.mask))
    else:
        output = found.logits if getattr(found, "logits", None) is not None else found[0]
        if batch.mask is not None and output.shape[:2] == batch.mask.shape:
            output = output[batch.mask.bool()]
    signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * signs).sum()
