"""Pack experts as the kernels of the operator read them, and unpack them again."""

from __future__ import annotations

import numpy as np

from ffn2moe.runtime.native.node import WEIGHTS, Weights, require

_ROWS = 16  # outputs in a panel
_STEP = {"bf16": 32, "int8": 64, "int4": 64}  # inputs are padded to a multiple of
_BLOCK = 32  # inputs that share a factor, int4
_LARGEST_4, _LARGEST_FACTOR = 7, 18  # 7 * 18 = 126 is a signed byte, (7 + 7) * 18 = 252 an unsigned one
_LINE = 64  # bytes


def pack_experts(
    weights: Weights,
    w_in_EMD: np.ndarray,
    w_out_EDM: np.ndarray,
    *,
    b_in_EM: np.ndarray | None = None,
    w_gate_EMD: np.ndarray | None = None,
    b_gate_EM: np.ndarray | None = None,
) -> np.ndarray:
    """Return the constant `experts` of a node, uint8 [E, bytes].

    A matrix [N, K] is stored in panels of 16 rows (`pack_bf16`, `pack_int8`, `pack_int4`). After each panel of W_in and
    W_gate come its 16 biases, float32. An expert is: panel 0 of W_in, panel 0 of W_gate (where gated), panel 1 of W_in
    and so on, then the panels of W_out. Padding is zero. ValueError for shapes that do not fit together
    and weights that are not finite.
    """
    E, M, D = w_in_EMD.shape
    _expect("w_out", w_out_EDM, (E, D, M))
    pairs = [("in", w_in_EMD, b_in_EM)]
    if w_gate_EMD is not None:
        _expect("w_gate", w_gate_EMD, (E, M, D))
        pairs.append(("gate", w_gate_EMD, b_gate_EM))
    elif b_gate_EM is not None:
        raise ValueError("b_gate without w_gate: give both, or neither")
    inner = []
    for name, weight_EMD, bias_EM in pairs:
        if bias_EM is None:
            bias_EM = np.zeros((E, M), dtype=np.float32)
        _expect(f"b_{name}", bias_EM, (E, M))
        bias_EPR = np.pad(bias_EM.astype(np.float32), [(0, 0), (0, -M % _ROWS)]).reshape(E, -1, _ROWS)
        inner.append(np.concatenate([_panels(weights, weight_EMD), bias_EPR.view(np.uint8)], axis=-1))
    outer = _panels(weights, w_out_EDM)
    return np.concatenate([np.stack(inner, axis=2).reshape(E, -1), outer.reshape(E, -1)], axis=1)


def _panels(weights: Weights, weight_ENK: np.ndarray) -> np.ndarray:
    require("weights", weights, WEIGHTS)
    if not np.isfinite(weight_ENK).all():
        raise ValueError("weights must be finite: the checkpoint holds NaN or infinity")
    return {"bf16": pack_bf16, "int8": pack_int8, "int4": pack_int4}[weights](weight_ENK)


def pack_bf16(weight_ENK: np.ndarray) -> np.ndarray:
    """Return panels uint8 [E, N/16, bytes] of matrices [E, N, K] in bfloat16, rounded to the nearest.

    A panel holds [K/2, 16, 2]: pairs of neighbours in a row, of 16 rows; K is padded to a multiple of 32.
    """
    bits = np.ascontiguousarray(weight_ENK, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return _grouped(rounded, 2, _STEP["bf16"]).view(np.uint8)


def pack_int8(weight_ENK: np.ndarray) -> np.ndarray:
    """Return panels uint8 [E, N/16, bytes] of matrices [E, N, K] as signed bytes, -127 to 127, a scale for each row.

    A panel holds [K/4, 16, 4] bytes, four neighbours in a row, of 16 rows, then 16 scales, float32; K is padded to a
    multiple of 64.
    """
    scale_EN = (np.abs(weight_ENK).max(-1) / np.float32(127)).astype(np.float32)
    steps = np.rint(weight_ENK / _nonzero(scale_EN)[..., None]).astype(np.int8)
    return np.concatenate([_grouped(steps, 4, _STEP["int8"]).view(np.uint8), _row_scales(scale_EN)], axis=-1)


def pack_int4(weight_ENK: np.ndarray) -> np.ndarray:
    """Return panels uint8 [E, N/16, bytes] of matrices [E, N, K] in 4 bits: row scale * block factor * number.

    Numbers are -7 to 7, factors 1 to 18 for each 32 of a row, so that a product is a signed byte. A panel holds
    [K/8, 16, 4] bytes (number + 7; in the low half that of places 0 to 3 of eight neighbours, in the high half 4 to 7),
    [K/32, 16] factors, zeros up to a multiple of 64 bytes, then 16 scales, float32; K is padded to a multiple of 64.
    """
    E, N, K = weight_ENK.shape
    weight_ENBC = np.pad(weight_ENK, [(0, 0), (0, 0), (0, -K % _STEP["int4"])]).reshape(E, N, -1, _BLOCK)
    step_ENB = np.abs(weight_ENBC).max(-1) / np.float32(_LARGEST_4)
    scale_EN = (step_ENB.max(-1) / np.float32(_LARGEST_FACTOR)).astype(np.float32)
    factor_ENB = np.clip(np.rint(step_ENB / _nonzero(scale_EN)[..., None]), 1, _LARGEST_FACTOR)
    steps = np.rint(weight_ENBC / (_nonzero(scale_EN)[..., None] * factor_ENB)[..., None])
    numbers = np.clip(steps, -_LARGEST_4, _LARGEST_4).astype(np.int8).reshape(E, N, -1)
    grouped = _grouped((numbers + _LARGEST_4).astype(np.uint8), 4, _STEP["int4"], filling=_LARGEST_4).reshape(
        E, -(-N // _ROWS), -1, 2, _LINE
    )
    nibbles = (grouped[..., 0, :] | (grouped[..., 1, :] << 4)).reshape(E, grouped.shape[1], -1)
    factors = _grouped(factor_ENB.astype(np.uint8), 1, 1, filling=1)
    factors = np.pad(factors, [(0, 0), (0, 0), (0, -factors.shape[-1] % _LINE)])
    return np.concatenate([nibbles, factors, _row_scales(scale_EN)], axis=-1)


def _grouped(values_ENK: np.ndarray, group: int, step: int, filling: int = 0) -> np.ndarray:
    """Return [E, N, K] as [E, N/16, K/group * 16 * group]: the `group` neighbours of each of 16 rows side by side."""
    E, N, K = values_ENK.shape
    padding = [(0, 0), (0, -N % _ROWS), (0, -K % step)]
    values = np.pad(values_ENK, padding, constant_values=filling)
    values = values.reshape(E, -1, _ROWS, values.shape[2] // group, group).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(values).reshape(E, values.shape[1], -1)


def _row_scales(scale_EN: np.ndarray) -> np.ndarray:
    return _grouped(scale_EN[..., None], 1, 1).view(np.uint8)


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.maximum(scale, np.finfo(np.float32).tiny)


def round_weights(weights: Weights, weight_ENK: np.ndarray) -> np.ndarray:
    """Return matrices [E, N, K] as the operator holds them, in float64: packed as `pack_experts` does, and unpacked."""
    E, N, K = weight_ENK.shape
    panels = _panels(weights, weight_ENK)
    padded = K + -K % _STEP[weights]
    if weights == "bf16":
        bits = panels.view(np.uint16).astype(np.uint32) << 16
        return _ungrouped(bits.view(np.float32), 2)[:, :N, :K].astype(np.float64)
    scale_EN = _ungrouped(np.ascontiguousarray(panels[..., -_LINE:]).view(np.float32), 1)[..., 0]
    if weights == "int8":
        steps = _ungrouped(np.ascontiguousarray(panels[..., : _ROWS * padded]).view(np.int8), 4).astype(np.float64)
    else:
        lines = panels[..., : _ROWS * padded // 2].reshape(E, panels.shape[1], -1, 1, _LINE)
        numbers = np.concatenate([lines & 15, lines >> 4], axis=3).reshape(E, panels.shape[1], -1)
        start = _ROWS * padded // 2
        factors = _ungrouped(panels[..., start : start + _ROWS * padded // _BLOCK], 1)
        steps = (_ungrouped(numbers, 4).astype(np.float64) - _LARGEST_4) * np.repeat(factors, _BLOCK, axis=-1)
    return (steps * scale_EN[..., None])[:, :N, :K]


def _ungrouped(panels: np.ndarray, group: int) -> np.ndarray:
    """Undo `_grouped`: return [E, P, K * 16] as [E, P * 16, K]."""
    E, P, _ = panels.shape
    return panels.reshape(E, P, -1, _ROWS, group).transpose(0, 1, 3, 2, 4).reshape(E, P * _ROWS, -1)


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, but w_in asks for {list(shape)}")
