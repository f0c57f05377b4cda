"""Leaf functions of tensors and devices that many modules need."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.spec import Pooling

# Wider FFNs keep the activations themselves, in bfloat16: F x F moments and their eigenvectors cost more than they say.
WIDEST_MOMENTS = 4096

# --- embeddings ---------------------------------------------------------------------------------------


def pool(last_hidden_state: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Sentence embeddings of unit length, [B, D], from hidden states [B, L, D] and their mask [B, L].

    `mean` over the tokens that are not padding, or `cls`: the first token.
    """
    if pooling == "cls":
        pooled_BD = last_hidden_state[:, 0]
    elif pooling == "mean":
        mask_BL1 = attention_mask.unsqueeze(-1).to(last_hidden_state.dtype)
        pooled_BD = (last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)
    else:
        raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
    return F.normalize(pooled_BD, dim=-1)


def low_precision(ffn_width: int, device: torch.device) -> torch.autocast:
    """A context in which the products of a wide FFN take bfloat16, where the hardware computes that.

    For what is summed over many tokens: rounding moves each activation by some thousandths of itself, up or down.
    """
    wide = ffn_width > WIDEST_MOMENTS and bf16_supported(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=wide)


def choose_device(wanted: str) -> str:
    """The device to compute on, where `auto` takes an accelerator if there is one. ValueError for one that is not."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted == "auto":
        return accelerator.type if accelerator else "cpu"
    if wanted != "cpu" and (accelerator is None or accelerator.type != wanted.partition(":")[0]):
        there = accelerator.type if accelerator else "no accelerator"
        raise ValueError(f"compute.device = {wanted}, but torch sees {there} here; set it to auto or cpu")
    return wanted


WARMUP_SHARE = 0.05  # of the steps


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a short linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + cos(pi * step / steps))


def bf16_supported(device: str | torch.device = "cpu") -> bool:
    """Whether bfloat16 products are computed in hardware on this device, and so are worth using."""
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    module = torch.get_device_module(kind)
    return bool(getattr(module, "is_bf16_supported", lambda: False)())
