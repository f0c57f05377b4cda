"""Compute on tensors and devices: leaf functions that many modules need."""

from __future__ import annotations

from math import cos, pi

import torch

# In wider FFNs the activations themselves are kept, in bfloat16: F x F moments and their eigenvectors cost too much.
WIDEST_MOMENTS = 4096
CHUNK = 4096  # most tokens at once
MOST_NUMBERS = 2**25  # most numbers at once: activations, or outputs of all experts


def low_precision(ffn_width: int, device: torch.device) -> torch.autocast:
    """Return a context in which the products of a wide FFN take bfloat16, where the hardware computes that.

    It is for sums over many tokens: rounding moves each activation by some thousandths of itself, up or down.
    """
    wide = ffn_width > WIDEST_MOMENTS and bf16_supported(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=wide)


def choose_device(wanted: str) -> str:
    """Return the device to compute on; `auto` takes an accelerator if there is one. ValueError for a missing device."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted == "auto":
        return accelerator.type if accelerator else "cpu"
    if wanted != "cpu" and (accelerator is None or accelerator.type != wanted.partition(":")[0]):
        there = accelerator.type if accelerator else "no accelerator"
        raise ValueError(f"compute.device = {wanted}, but torch sees {there} here; set it to auto or cpu")
    return wanted


WARMUP_SHARE = 0.05  # of the steps


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: a short linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + cos(pi * step / steps))


def bf16_supported(device: str | torch.device = "cpu") -> bool:
    """Return whether this device computes bfloat16 products in hardware, so that they are worth using."""
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    module = torch.get_device_module(kind)
    return bool(getattr(module, "is_bf16_supported", lambda: False)())


def chunk_of(numbers: int) -> int:
    """Return how many tokens to work on at once, where each token makes so many numbers."""
    return max(256, min(CHUNK, MOST_NUMBERS // numbers))
