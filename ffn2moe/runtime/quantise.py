"""Quantise weights in blocks, and back."""

from __future__ import annotations

import numpy as np

BLOCK = 32  # weights that share a scale, in plans of 8 and 4 bits


def quantize_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise matrices [..., N, K] to 8 or 4 bits, symmetric, with a scale for each `BLOCK` weights of a row.

    Return uint8 [..., N, K * bits / 8], whose zero is 2^(bits - 1), and float32 scales [..., N, K / BLOCK]. Of two
    4-bit numbers the first is in the low half. Zeros make K a multiple of the block.
    """
    *outer, N, K = weight.shape
    weight = np.pad(weight, [(0, 0)] * (len(outer) + 1) + [(0, -K % BLOCK)])
    blocks = weight.reshape(*outer, N, -1, BLOCK)
    largest = 2 ** (bits - 1) - 1
    scales = (np.abs(blocks).max(-1) / np.float32(largest)).astype(np.float32)
    steps = np.rint(blocks / np.maximum(scales, np.finfo(np.float32).tiny)[..., None])
    packed = (np.clip(steps, -largest, largest) + 2 ** (bits - 1)).astype(np.uint8).reshape(*outer, N, -1)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    return packed, scales


def dequantize_blocks(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Return the weights [..., N, K] that `quantize_blocks` kept."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    steps = packed.astype(np.float64).reshape(*scales.shape, BLOCK) - 2 ** (bits - 1)
    return (steps * scales[..., None]).reshape(packed.shape)
