"""Run frozen weights in bfloat16 and attention in float32 where that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Half = tuple[nn.Module, str, nn.Parameter, nn.Parameter]


def bf16_copies(*models: nn.Module) -> list[Half]:
    """Return the frozen weights of the models' linear maps with bfloat16 copies: module, name, weights, copy.

    Autocast makes the same copies, but again in every pass.
    """
    from transformers.pytorch_utils import Conv1D

    return [
        (module, name, weights, nn.Parameter(weights.detach().to(torch.bfloat16), requires_grad=False))
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        for name, weights in module.named_parameters(recurse=False)
        if weights.dtype == torch.float32 and not weights.requires_grad
    ]


@contextmanager
def weights_in_bf16(halves: Sequence[Half]) -> Iterator[None]:
    """Give the linear maps their bfloat16 weights while the block runs."""
    for module, name, _, half in halves:
        module.register_parameter(name, half)
    try:
        yield
    finally:
        for module, name, weights, _ in halves:
            module.register_parameter(name, weights)


def use_float32_attention(model: Any) -> Any:
    """Compute attention in float32 under autocast, on a CPU, if it has a gradient or one query; return the model.

    On CPUs the backward pass of scaled_dot_product_attention takes 9 times longer in bfloat16 than in float32
    (torch 2.13, AMX: 168 ms against 18 ms at 32 x 12 x 128 x 32), and the forward pass half as long. With one query, as
    where a token is drawn, the forward pass alone takes 6 times longer (Zen 4: 7.7 ms against 1.35 ms at 64 texts, 9
    heads and 3 of keys, 129 keys of 64). Other attention without a gradient, or on another device, does not change.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register("sdpa_float32", _float32_attention)
        AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
        model.set_attn_implementation("sdpa_float32")
    return model


def _float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kind = query.device.type
    slow = kind == "cpu" and (query.shape[2] == 1 or any(one.requires_grad for one in (query, key, value)))
    with torch.autocast(kind, enabled=False) if slow else nullcontext():
        if slow:
            query, key, value = query.float(), key.float(), value.float()
            if options.get("position_bias") is not None:  # T5 adds it to its scores
                options["position_bias"] = options["position_bias"].float()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
