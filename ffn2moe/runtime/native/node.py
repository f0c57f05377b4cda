"""Describe a node of the operator: its attributes and the constant `frame`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ffn2moe.runtime.activations import ACTIVATIONS
from ffn2moe.table import unknown

DOMAIN = "ffn2moe"
OP_TYPE = "RoutedExperts"
VERSION = 1
PATHS = ("amx", "avx512", "avx2", "plain")

Weights = Literal["bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
Activations = Literal["bf16", "int16", "int8"]
# What tokens may be rounded to. The first is the default: the error of 8 bits is far below that of weights of 4.
ACTIVATIONS_OF: dict[Weights, tuple[Activations, ...]] = {
    "bf16": ("bf16",),
    "int8": ("int16", "int8"),
    "int4": ("int8", "int16"),
}
GATES = ("unit", "softmax", "softmax_topk", "sigmoid")
Added = Literal["x", "sum", "none"]


def require(choice: str, name: str, known: Collection[str]) -> None:
    """Raise ValueError, with the nearest known name, where the operator does not have this one."""
    if name not in known:
        raise ValueError(unknown(f"{choice} of the experts operator", name, tuple(known)))


def weights_of(bits: int) -> Weights:
    """Return the name of weights of so many bits. ValueError for bits that the operator does not have."""
    known: dict[int, Weights] = {16: "bf16", 8: "int8", 4: "int4"}
    if bits not in known:
        raise ValueError(f"the experts operator has weights of 16, 8 or 4 bits, not {bits}")
    return known[bits]


def experts_attributes(
    width: int,
    expert_width: int,
    *,
    gated: bool,
    activation: str,
    weights: Weights,
    activations: str | None = None,
) -> dict[str, Any]:
    """Return the attributes that describe the experts. ValueError for a choice that the operator does not have.

    `activations` None takes the first that goes with the weights (`ACTIVATIONS_OF`).
    """
    require("weights", weights, WEIGHTS)
    require("activation", activation, ACTIVATIONS)
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


@dataclass(frozen=True)
class Norm:
    """Normalise a token's vector: LayerNorm (`layer`) or RMSNorm (`rms`)."""

    kind: Literal["layer", "rms"]
    scale_D: np.ndarray
    bias_D: np.ndarray | None = None
    epsilon: float = 1e-5

    def __call__(self, x_TD: np.ndarray) -> np.ndarray:
        """Return the norm of each row in float64."""
        if self.kind == "layer":
            x_TD = x_TD - x_TD.mean(-1, keepdims=True)
        normal_TD = x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + self.epsilon) * self.scale_D.astype(np.float64)
        return normal_TD if self.bias_D is None else normal_TD + self.bias_D


def frame_attributes(
    num_experts: int,
    num_active: int,
    gate: str,
    *,
    norm_in: Norm | None = None,
    norm_out: Norm | None = None,
    added: Added = "none",
    output: Literal["f32", "bf16"] = "f32",
) -> dict[str, Any]:
    """Return the attributes that describe what stands around the experts. ValueError for a choice it does not have."""
    require("gate", gate, GATES)
    if not 0 < num_active <= num_experts:
        raise ValueError(f"num_active must be 1 to the number of experts, {num_experts}, not {num_active}")
    if added == "sum" and norm_in is None:
        raise ValueError("added 'sum' adds given and residual, which come with norm_in: give a norm_in")
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
    """Return the constant `frame` of a `RoutedExperts` node, float32.

    It holds the router [E, D], its bias [E], the bias of the choice [E], the output's bias [D], and scale and bias
    [2, D] of each norm that is given. A bias that is None is 0.
    """
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
