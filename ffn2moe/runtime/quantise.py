"""Quantise weights in blocks, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass

BLOCK = 32  # weights that share a scale, in plans of 8 and 4 bits


# --- the MoE ops on this runtime ------------------------------------------------------------------------------------


def swiglu_rows(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows [E, M, ...] of gate and up as the MoE ops take them, [E, 2M, ...]: gate 0, up 0, gate 1, up 1, ..."""
    E, M, *rest = gate.shape
    return np.stack([gate, up], axis=2).reshape(E, 2 * M, *rest)


def quantize_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [..., N, K] in 8 or 4 bits, symmetric, with a scale for each `BLOCK` weights of a row.

    Gives uint8 [..., N, K * bits / 8], zero at 2^(bits - 1) and of two 4-bit numbers the first in the low half, and
    float32 scales [..., N, K / BLOCK]. K is made a multiple of the block by zeros.
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
    """The weights [..., N, K] that `quantize_blocks` left."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    steps = packed.astype(np.float64).reshape(*scales.shape, BLOCK) - 2 ** (bits - 1)
    return (steps * scales[..., None]).reshape(packed.shape)
