"""The fused experts operator for OpenVINO's CPU plugin: its ONNX node, its weights, and how it is built.

One node computes a layer of experts: y_T = sum over k of gates_TK[t, k] * E_chosen[t, k](x_T), with
E_e(x) = W_out_e act(W_in_e x + b_in_e), or W_out_e (act(W_gate_e x + b_gate_e) * (W_in_e x + b_in_e)) where gated.

The node, domain `ffn2moe`, op_type `Experts`, version 1:

| input | type | shape | |
|---|---|---|---|
| x | float32 | [T, D] | tokens; T may be 0 |
| chosen | int64 or int32 | [T, K] | experts of each token, 0 to E - 1; one named twice counts twice |
| gates | float32 | [T, K] | a pair of gate 0 is not computed |
| experts | uint8 constant | [E, bytes] | what `pack_experts` gives: weights, scales and input biases of each expert |

Output: y, float32 [T, D]. An output bias and a scale of the output stay outside.

| attribute | type | |
|---|---|---|
| width | int | D |
| expert_width | int | M: neurons of each expert |
| gated | int | 1 where there is a W_gate, else 0 |
| activation | string | `gelu` (erf), `gelu_tanh`, `quick_gelu`, `relu` or `silu` |
| weights | string | `bf16`, `int8` or `int4`: what `experts` holds |
| activations | string | what tokens are rounded to: `bf16` with those weights, `int16` or `int8` with others |

`attributes` makes them.

The node `RoutedExperts` does what stands around the experts of a layer as well, in float32 and while a token's vector
is in the cache. For each token, with x = norm_in(given + residual), or x = given where `norm_in` is "none":

    scores_E = router_ED x + router_bias_E
    chosen_K = the K highest of scores_E + choice_bias_E (where the gate is "sigmoid", of sigmoid(scores_E) +
               choice_bias_E), the first of equal ones
    gates_K  = 1 (`unit`), softmax(scores_E) of the chosen (`softmax`), softmax of their scores (`softmax_topk`) or
               sigmoid(scores_E) of them (`sigmoid`)
    y = norm_out(added + b_out_D + sum over k of gates[k] * E_chosen[k](x))

where `added` is x ("x": a residual around the experts, as in BERT), given + residual ("sum": norms before each part of
a layer) or nothing ("none").

| input | type | shape | |
|---|---|---|---|
| given | float32 or bfloat16 | [T, D] | tokens; T may be 0 |
| experts | uint8 constant | [E, bytes] | as above |
| frame | float32 constant | [numbers] | what `frame` gives: router, output bias and norms |
| residual | float32 or bfloat16 | [T, D] | only with a `norm_in` |

Its attributes are those above and:

| attribute | type | |
|---|---|---|
| num_experts, num_active | int | E and K |
| gate | string | `unit`, `softmax`, `softmax_topk` or `sigmoid` |
| norm_in, norm_out | string | `layer` (LayerNorm), `rms` (RMSNorm, whose bias is 0) or `none` |
| epsilon_in, epsilon_out | float | of the norms |
| added | string | `x`, `sum` or `none` |
| output | string | what y is in: `f32` or `bf16` |

`routed_attributes` makes them.

The weights stand in the file as the kernels read them, so that nothing is packed or copied when a model is loaded, and
the file is as small as its bits. Every path of the kernels reads the same layout (`pack_experts`); which one runs is
decided by the processor, or by the environment variable FFN2MOE_NATIVE, one of `PATHS`.

Precision. `bf16`: weights and activations are rounded to bfloat16 and summed in float32. `int8`: weights are whole
numbers with one scale an output row. `int4`: the same, each made of 4 bits and a whole-numbered factor for each 32 of
a row. With whole-numbered weights the activations of a token are whole numbers of 16 or 8 bits with one scale a token,
and sums are exact; the paths without such instructions compute in float32. 8 bits take half the products, and where
some columns of x are far above the others they cost precision: 6 to 7 % of the output where one is 30 times the others.
The same path gives the same bits whatever the number of threads, and whatever other tokens are in the batch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ffn2moe.spec import Activation, Gate

DOMAIN = "ffn2moe"
OP_TYPE = "Experts"
ROUTED_OP_TYPE = "RoutedExperts"
VERSION = 1
PATHS = ("amx", "avx512", "avx2", "plain")

Weights = Literal["bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
Activations = Literal["bf16", "int16", "int8"]
# What tokens may be rounded to; the first is taken where none is named. The error of 8 bits is far below that of
# weights of 4.
ACTIVATIONS_OF: dict[Weights, tuple[Activations, ...]] = {
    "bf16": ("bf16",),
    "int8": ("int16", "int8"),
    "int4": ("int8", "int16"),
}

_ROWS = 16  # outputs in a panel
_STEP = {"bf16": 32, "int8": 64, "int4": 64}  # inputs are padded to a multiple of
_BLOCK = 32  # inputs that share a factor, int4
_LARGEST_4, _LARGEST_FACTOR = 7, 18  # 7 * 18 = 126 is a signed byte, (7 + 7) * 18 = 252 an unsigned one
_LINE = 64  # bytes

SOURCES = Path(__file__).resolve().parent.parent / "native"
FOLDER = Path(sys.prefix) / "share" / "ffn2moe"  # of the environment: copies of the package in workspaces share it
REMEDY = "build it: make native (or python -m ffn2moe.runtime.native)"

# The instructions of each file; which path runs is decided when a model is loaded, so the library runs anywhere.
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
_INSTRUCTIONS = {
    "avx2.cpp": _AVX2,
    "avx512.cpp": _AVX512,
    "rows_avx2.cpp": _AVX2,
    "rows_avx512.cpp": _AVX512,
    "amx.cpp": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


def attributes(
    width: int,
    expert_width: int,
    *,
    gated: bool,
    activation: Activation,
    weights: Weights,
    activations: Activations | None = None,
) -> dict[str, Any]:
    """The attributes of the node. ValueError for an activation, weights or activations that the operator has not."""
    _check(weights, activation)
    if activations not in (None, *ACTIVATIONS_OF[weights]):
        fitting = " and ".join(ACTIVATIONS_OF[weights])
        raise ValueError(f"activations {activations!r} do not go with weights {weights!r}: {fitting} do")
    return {
        "width": width,
        "expert_width": expert_width,
        "gated": int(gated),
        "activation": activation,
        "weights": weights,
        "activations": activations or ACTIVATIONS_OF[weights][0],
    }


Added = Literal["x", "sum", "none"]


@dataclass(frozen=True)
class Norm:
    """A norm of a token's vector: LayerNorm or, of `rms`, RMSNorm."""

    kind: Literal["layer", "rms"]
    scale_D: np.ndarray
    bias_D: np.ndarray | None = None
    epsilon: float = 1e-5

    def __call__(self, x_TD: np.ndarray) -> np.ndarray:
        """The norm in float64."""
        if self.kind == "layer":
            x_TD = x_TD - x_TD.mean(-1, keepdims=True)
        normal_TD = x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + self.epsilon) * self.scale_D.astype(np.float64)
        return normal_TD if self.bias_D is None else normal_TD + self.bias_D


def routed_attributes(
    num_experts: int,
    num_active: int,
    gate: Gate,
    *,
    norm_in: Norm | None = None,
    norm_out: Norm | None = None,
    added: Added = "none",
    output: Literal["f32", "bf16"] = "f32",
) -> dict[str, Any]:
    """What a `RoutedExperts` node has beside `attributes`. ValueError for what the operator has not."""
    if not 0 < num_active <= num_experts:
        raise ValueError(f"num_active must be 1 to the number of experts, {num_experts}, not {num_active}")
    if added == "sum" and norm_in is None:
        raise ValueError("added 'sum' is that of given and residual, which come with norm_in: give one")
    return {
        "num_experts": num_experts,
        "num_active": num_active,
        "gate": gate,
        "norm_in": "none" if norm_in is None else norm_in.kind,
        "norm_out": "none" if norm_out is None else norm_out.kind,
        "epsilon_in": 0.0 if norm_in is None else norm_in.epsilon,
        "epsilon_out": 0.0 if norm_out is None else norm_out.epsilon,
        "added": added,
        "output": output,
    }


def frame(
    router_ED: np.ndarray,
    router_bias_E: np.ndarray,
    *,
    choice_bias_E: np.ndarray | None = None,
    b_out_D: np.ndarray | None = None,
    norm_in: Norm | None = None,
    norm_out: Norm | None = None,
) -> np.ndarray:
    """The constant `frame` of a `RoutedExperts` node, float32: router [E, D], its bias [E], the bias of the choice [E],
    the output's bias [D], and scale and bias [2, D] of each norm that there is. What is None is 0."""
    E, D = router_ED.shape

    def row(name: str, given: np.ndarray | None, width: int) -> np.ndarray:
        if given is None:
            return np.zeros(width, dtype=np.float32)
        if given.shape != (width,):
            raise ValueError(f"{name} has shape {list(given.shape)}, but the router, {[E, D]}, asks for {[width]}")
        return given.astype(np.float32)

    rows = [router_ED.astype(np.float32).ravel(), row("router_bias", router_bias_E, E)]
    rows += [row("choice_bias", choice_bias_E, E), row("b_out", b_out_D, D)]
    for name, norm in (("norm_in", norm_in), ("norm_out", norm_out)):
        if norm is not None:
            rows += [row(f"{name}'s scale", norm.scale_D, D), row(f"{name}'s bias", norm.bias_D, D)]
    return np.concatenate(rows)


# --- weights --------------------------------------------------------------------------------------------------------


def pack_experts(
    weights: Weights,
    w_in_EMD: np.ndarray,
    w_out_EDM: np.ndarray,
    *,
    b_in_EM: np.ndarray | None = None,
    w_gate_EMD: np.ndarray | None = None,
    b_gate_EM: np.ndarray | None = None,
) -> np.ndarray:
    """The constant `experts` of the node, uint8 [E, bytes].

    A matrix [N, K] is cut into panels of 16 rows (`pack_bf16`, `pack_int8`, `pack_int4`). After each panel of W_in and
    W_gate come its 16 biases, float32. An expert is: panel 0 of W_in, panel 0 of W_gate (where gated), panel 1 of W_in
    and so on, then the panels of W_out. Rows and columns that fill up are zero. ValueError for shapes that do not
    fit together and weights that are not finite.
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
    if not np.isfinite(weight_ENK).all():
        raise ValueError("weights must be finite: the checkpoint holds NaN or infinity")
    return {"bf16": pack_bf16, "int8": pack_int8, "int4": pack_int4}[weights](weight_ENK)


def pack_bf16(weight_ENK: np.ndarray) -> np.ndarray:
    """Panels uint8 [E, N/16, bytes] of matrices [E, N, K] in bfloat16, rounded to the nearest.

    A panel holds [K/2, 16, 2]: pairs of neighbours in a row, of 16 rows; K is filled up to a multiple of 32.
    """
    bits = np.ascontiguousarray(weight_ENK, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return _grouped(rounded, 2, _STEP["bf16"]).view(np.uint8)


def pack_int8(weight_ENK: np.ndarray) -> np.ndarray:
    """Panels uint8 [E, N/16, bytes] of matrices [E, N, K] as signed bytes, -127 to 127, and a scale for each row.

    A panel holds [K/4, 16, 4] bytes, four neighbours in a row, of 16 rows, then 16 scales, float32; K is filled up to a
    multiple of 64.
    """
    scale_EN = (np.abs(weight_ENK).max(-1) / np.float32(127)).astype(np.float32)
    steps = np.rint(weight_ENK / _nonzero(scale_EN)[..., None]).astype(np.int8)
    return np.concatenate([_grouped(steps, 4, _STEP["int8"]).view(np.uint8), _row_scales(scale_EN)], axis=-1)


def pack_int4(weight_ENK: np.ndarray) -> np.ndarray:
    """Panels uint8 [E, N/16, bytes] of matrices [E, N, K] in 4 bits: scale of the row * factor of the block * number.

    Numbers are -7 to 7, factors 1 to 18 for each 32 of a row, so that a product is a signed byte. A panel holds
    [K/8, 16, 4] bytes (number + 7; in the low half that of places 0 to 3 of eight neighbours, in the high half 4 to 7),
    [K/32, 16] factors, zeros up to a multiple of 64 bytes, then 16 scales, float32; K is filled up to a multiple of 64.
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
    """[E, N, K] -> [E, N/16, K/group * 16 * group], the `group` neighbours of each of 16 rows side by side."""
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
    """Matrices [E, N, K] as the operator holds them, float64: unpacked from what `pack_experts` stores."""
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
    """The inverse of `_grouped`: [E, P, K * 16] -> [E, P * 16, K]."""
    E, P, _ = panels.shape
    return panels.reshape(E, P, -1, _ROWS, group).transpose(0, 1, 3, 2, 4).reshape(E, P * _ROWS, -1)


# --- what it computes -----------------------------------------------------------------------------------------------


def reference(
    x_TD: np.ndarray,
    chosen_TK: np.ndarray,
    gates_TK: np.ndarray,
    w_in_EMD: np.ndarray,
    w_out_EDM: np.ndarray,
    *,
    activation: Activation,
    b_in_EM: np.ndarray | None = None,
    w_gate_EMD: np.ndarray | None = None,
    b_gate_EM: np.ndarray | None = None,
) -> np.ndarray:
    """What the node computes, in float64 and one pair of token and expert after the other: y_TD."""
    _check("bf16", activation)
    act = ACTIVATIONS[activation]
    y_TD = np.zeros(x_TD.shape, dtype=np.float64)
    for t, k in np.argwhere(gates_TK != 0):
        e = chosen_TK[t, k]
        x_D = x_TD[t].astype(np.float64)
        up_M = w_in_EMD[e].astype(np.float64) @ x_D + (0 if b_in_EM is None else b_in_EM[e])
        if w_gate_EMD is None:
            h_M = act(up_M)
        else:
            h_M = act(w_gate_EMD[e].astype(np.float64) @ x_D + (0 if b_gate_EM is None else b_gate_EM[e])) * up_M
        y_TD[t] += gates_TK[t, k] * (w_out_EDM[e].astype(np.float64) @ h_M)
    return y_TD


def routed_reference(
    given_TD: np.ndarray,
    router_ED: np.ndarray,
    router_bias_E: np.ndarray,
    num_active: int,
    gate: Gate,
    *,
    choice_bias_E: np.ndarray | None = None,
    residual_TD: np.ndarray | None = None,
    norm_in: Norm | None = None,
    norm_out: Norm | None = None,
    added: Added = "none",
    b_out_D: np.ndarray | None = None,
    **experts: Any,
) -> np.ndarray:
    """What a `RoutedExperts` node computes, in float64: y_TD. `experts` are those of `reference`."""
    sum_TD = given_TD.astype(np.float64) + (0 if residual_TD is None else residual_TD)
    x_TD = sum_TD if norm_in is None else norm_in(sum_TD)
    scores_TE = x_TD @ router_ED.astype(np.float64).T + router_bias_E
    sigmoid_TE = 1 / (1 + np.exp(-scores_TE))
    ranked_TE = (sigmoid_TE if gate == "sigmoid" else scores_TE) + (0 if choice_bias_E is None else choice_bias_E)
    chosen_TK = np.argsort(-ranked_TE, axis=1, kind="stable")[:, :num_active]
    weight_TE = {"unit": np.ones_like(scores_TE), "sigmoid": sigmoid_TE}.get(gate, np.exp(scores_TE))
    gates_TK = np.take_along_axis(weight_TE, chosen_TK, axis=1)
    if gate == "softmax":
        gates_TK = gates_TK / weight_TE.sum(1, keepdims=True)
    elif gate == "softmax_topk":
        gates_TK = gates_TK / gates_TK.sum(1, keepdims=True)
    y_TD = reference(x_TD, chosen_TK, gates_TK, **experts) + (0 if b_out_D is None else b_out_D)
    y_TD = y_TD + {"x": x_TD, "sum": sum_TD, "none": 0}[added]
    return y_TD if norm_out is None else norm_out(y_TD)


_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS: dict[str, Any] = {
    "gelu": lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


def _check(weights: str, activation: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, but w_in asks for {list(shape)}")


# --- the library ----------------------------------------------------------------------------------------------------


def is_built() -> bool:
    """Whether `library` finds the operator."""
    try:
        library()
    except FileNotFoundError:
        return False
    return True


def library() -> Path:
    """The extension library, for `openvino.Core().add_extension`: built for the installed openvino from these sources.

    A copy of the package without sources, such as that beside a registered model, takes what is built for this
    openvino. FileNotFoundError, with the remedy, if there is none.
    """
    _openvino()
    if any(SOURCES.glob("*.cpp")):
        path = _library(FOLDER)
    else:
        built = sorted(FOLDER.glob(f"{_stem()}-openvino{importlib.metadata.version('openvino')}-*.so"))
        path = built[0] if built else FOLDER / "none"
    if path.is_file():
        return path
    others = sorted(FOLDER.glob(f"{_stem()}-*")) if FOLDER.is_dir() else []
    if others:
        built_for = {other.name.split("-openvino")[1].rsplit("-", 1)[0] for other in others}
        version = importlib.metadata.version("openvino")
        why = (
            "its sources have changed since it was built"
            if version in built_for
            else f"it is built for openvino {', '.join(sorted(built_for))}, and {version} is installed"
        )
        raise FileNotFoundError(f"the experts operator must be built again, as {why}; {REMEDY}")
    raise FileNotFoundError(f"the experts operator is not built; {REMEDY}")


def build(folder: Path = FOLDER) -> Path:
    """Compiles the operator into `folder` with the C++ compiler of this machine ($CXX, c++, g++ or clang++).

    Gives the library. FileNotFoundError where there is no compiler, no openvino or no sources, RuntimeError where the
    compiler fails, both with the remedy. What was built there before, for another openvino, is removed.
    """
    compiler = _compiler()
    home = _openvino()
    sources = _sources()
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w", f"-I{home / 'include'}"]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    target = _library(folder)
    with tempfile.TemporaryDirectory(prefix="ffn2moe-native-") as scratch:

        def compile_one(source: Path) -> str:
            result = str(Path(scratch) / f"{source.stem}.o")
            extra = _INSTRUCTIONS.get(source.name, []) if x86 else []
            _run([*compiler, *flags, *extra, "-c", str(source), "-o", result])
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, [source for source in sources if source.suffix == ".cpp"]))
        libraries = [_engine_library(home, name) for name in ("libopenvino", "libopenvino_onnx_frontend", "libtbb")]
        built = Path(scratch) / target.name
        kind = "-dynamiclib" if sys.platform == "darwin" else "-shared"
        _run([*compiler, kind, *objects, *libraries, f"-Wl,-rpath,{home / 'libs'}", "-o", str(built)])
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"{_stem()}-*"):
            if other != target:
                other.unlink()
        fresh = folder / f".{target.name}.{os.getpid()}"
        shutil.copy(built, fresh)
        fresh.replace(target)
    return target


def _stem() -> str:
    return f"experts-{sys.platform}-{platform.machine().lower()}"


def _library(folder: Path) -> Path:
    """Where the library of these sources and the installed openvino stands."""
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.read_bytes())
    version = importlib.metadata.version("openvino")
    return folder / f"{_stem()}-openvino{version}-{digest.hexdigest()[:8]}.so"


def _sources() -> list[Path]:
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    if not files:
        raise FileNotFoundError(f"the operator's sources are not in {SOURCES}: it is built in a checkout of ffn2moe")
    return files


def _openvino() -> Path:
    spec = importlib.util.find_spec("openvino")
    if spec is None or spec.origin is None:
        raise FileNotFoundError('the experts operator needs openvino: pip install "ffn2moe[openvino]"')
    return Path(spec.origin).parent


def _engine_library(home: Path, name: str) -> str:
    found = sorted((home / "libs").glob(f"{name}.*"))
    if not found:
        raise FileNotFoundError(f"{home / 'libs'} has no {name}: install openvino as a wheel, pip install openvino")
    return str(found[0])


def _compiler() -> list[str]:
    wish = shlex.split(os.environ.get("CXX", ""))
    if wish:
        if shutil.which(wish[0]) is None:
            raise FileNotFoundError(f"CXX={wish[0]} is not there: name another compiler, or unset CXX")
        return wish
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler was found: install one (Debian, Ubuntu: apt install g++), or set CXX")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"the compiler failed (g++ 11 or clang++ 14 and later are known to do): {shlex.join(command)}\n"
            + done.stderr[-4000:]
        )


def main() -> int:
    """python -m ffn2moe.runtime.native: build the operator, and say where it is."""
    from rich.console import Console

    try:
        path = build()
    except (FileNotFoundError, RuntimeError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2
    Console(soft_wrap=True, highlight=False, markup=False).print(f"the experts operator is built: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
