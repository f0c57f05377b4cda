"""Compute in float64 what a node of the operator computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ffn2moe.runtime.activations import ACTIVATIONS
from ffn2moe.runtime.native.node import GATES, Added, Norm, require


def experts_reference(
    x_TD: np.ndarray,
    chosen_TK: np.ndarray,
    gates_TK: np.ndarray,
    w_in_EMD: np.ndarray,
    w_out_EDM: np.ndarray,
    *,
    activation: str,
    b_in_EM: np.ndarray | None = None,
    w_gate_EMD: np.ndarray | None = None,
    b_gate_EM: np.ndarray | None = None,
) -> np.ndarray:
    """Return the sum of each token's chosen experts, y_TD in float64: one pair of token and expert after the other."""
    require("activation", activation, ACTIVATIONS)
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


def reference(
    given_TD: np.ndarray,
    router_ED: np.ndarray,
    router_bias_E: np.ndarray,
    num_active: int,
    gate: str,
    *,
    choice_bias_E: np.ndarray | None = None,
    residual_TD: np.ndarray | None = None,
    norm_in: Norm | None = None,
    norm_out: Norm | None = None,
    added: Added = "none",
    b_out_D: np.ndarray | None = None,
    **experts: Any,
) -> np.ndarray:
    """Return what a `RoutedExperts` node computes, y_TD in float64. `experts` go to `experts_reference`."""
    require("gate", gate, GATES)
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
    y_TD = experts_reference(x_TD, chosen_TK, gates_TK, **experts) + (0 if b_out_D is None else b_out_D)
    y_TD = y_TD + {"x": x_TD, "sum": sum_TD, "none": 0}[added]
    return y_TD if norm_out is None else norm_out(y_TD)
