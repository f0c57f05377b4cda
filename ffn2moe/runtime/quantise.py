"""Quantise weights in blocks, and back."""

from __future__ import annotations

import numpy as np

BLOCK = 32  # weights that share a scale, in plans of 8 and 4 bits
REACHES = np.linspace(6.5, 8.5, 9, dtype=np.float32)  # steps from 0 to a block's farthest weight that are tried, 4 bits


def quantize_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise matrices [..., N, K] to 8 or 4 bits, with a scale and no offset for each `BLOCK` weights of a row.

    Return uint8 [..., N, K * bits / 8], whose zero is 2^(bits - 1), and float32 scales [..., N, K / BLOCK]. Of two
    4-bit numbers the first is in the low half. Zeros make K a multiple of the block.
    """
    *outer, N, K = weight.shape
    weight = np.pad(weight, [(0, 0)] * (len(outer) + 1) + [(0, -K % BLOCK)])
    blocks = weight.reshape(*outer, N, -1, BLOCK)
    steps, scales = _nearest(blocks) if bits == 8 else _fitted(blocks)
    packed = (steps + 2 ** (bits - 1)).astype(np.uint8).reshape(*outer, N, -1)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    return packed, scales


def _nearest(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whole numbers in [-127, 127] for blocks [..., BLOCK], and their scales [...]."""
    scales = (np.abs(blocks).max(-1) / np.float32(127)).astype(np.float32)
    steps = np.rint(blocks / np.maximum(scales, np.finfo(np.float32).tiny)[..., None])
    return np.clip(steps, -127, 127), scales


def _fitted(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whole numbers in [-8, 7] for blocks [..., BLOCK], and the scales [...] of least squared error among a few.

    The weight farthest from 0 comes to lie near -8, so a scale may be negative: there is one step more on that side.
    Each trial's scale is fitted to its whole numbers.
    """
    far = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    best = np.full(blocks.shape[:-1], -1, dtype=np.float32)  # squares that the numbers explain, of the block's
    steps, scales = np.zeros_like(blocks), np.zeros(blocks.shape[:-1], dtype=np.float32)
    for reach in REACHES:
        trial = np.clip(np.rint(blocks * (-reach / np.where(far == 0, 1, far))), -8, 7)
        product, square = (blocks * trial).sum(-1), (trial * trial).sum(-1)
        scale = product / np.maximum(square, 1)
        better = product * scale > best
        best = np.where(better, product * scale, best)
        scales = np.where(better, scale, scales)
        steps = np.where(better[..., None], trial, steps)
    return steps, scales.astype(np.float32)


def dequantize_blocks(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Return the weights [..., N, K] that `quantize_blocks` kept."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    steps = packed.astype(np.float64).reshape(*scales.shape, BLOCK) - 2 ** (bits - 1)
    return (steps * scales[..., None]).reshape(packed.shape)
