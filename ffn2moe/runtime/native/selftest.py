"""Test the operator, as it is built on this machine, against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ffn2moe.runtime import native
from ffn2moe.runtime.engines.openvino import OpenVinoGraph
from ffn2moe.runtime.plans import EXPERTS, Plan
from ffn2moe.runtime.selftest import one_node

# Largest difference of the native operator from float64 arithmetic, as a share of the largest output. In the bfloat16
# and 8-bit forms the activations are rounded twice.
TOLERANCE: dict[str, float] = {"bf16": 2e-2, "int16": 1e-3, "int8": 5e-2}


def check_plan(plan: Plan, activation: str, gated: bool, providers: Sequence[str]) -> float:
    """Test the operator with the weights and activations of a plan (`self_test`). Providers are ONNX Runtime's."""
    return self_test(activation, native.weights_of(plan.bits), plan.activations, gated=gated)


def self_test(activation: str, weights: native.Weights, activations: str | None, *, gated: bool = False) -> float:
    """Test that the operator computes a tiny layer as `ffn2moe.runtime.native` defines it.

    Returns the largest difference, as a share of the largest output. RuntimeError where it computes something else,
    EngineMissing or FileNotFoundError where there is no OpenVINO or no operator.
    """
    E, K, D, M, T = 4, 2, 40, 24, 70  # no multiple of what the kernels take at once
    random = np.random.default_rng(0)
    given_TD = random.standard_normal((T, D)).astype(np.float32)
    shapes = {"w_in_EMD": (E, M, D), "w_out_EDM": (E, D, M)} | ({"w_gate_EMD": (E, M, D)} if gated else {})
    parts = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    names = ("b_in_EM", "b_gate_EM") if gated else ("b_in_EM",)
    biases = {name: random.standard_normal((E, M)).astype(np.float32) for name in names}
    router_ED, norm = random.standard_normal((E, D)).astype(np.float32), native.Norm("layer", np.ones(D))
    attributes = native.experts_attributes(
        D, M, gated=gated, activation=activation, weights=weights, activations=activations
    ) | native.frame_attributes(E, K, "softmax_topk", added="x", norm_out=norm)
    constants = {"experts": native.pack_experts(weights, **parts, **biases)}
    constants["frame"] = native.frame(router_ED, np.zeros(E), norm_out=norm)
    model = one_node(EXPERTS.name, {"given": D}, constants, attributes)
    graph = OpenVinoGraph(model, threads=1, precision="float32", extension=native.library())
    [found_TD] = graph.run(["y"], {"given": given_TD})
    experts: dict[str, Any] = {name: native.round_weights(weights, part) for name, part in parts.items()} | biases
    how: dict[str, Any] = {"activation": activation, "added": "x", "norm_out": norm}
    exact_TD = native.reference(given_TD, router_ED, np.zeros(E), K, "softmax_topk", **how, **experts)
    difference = float(np.abs(found_TD - exact_TD).max() / np.abs(exact_TD).max())
    if not difference < TOLERANCE[activations or native.ACTIVATIONS_OF[weights][0]]:
        raise RuntimeError(
            f"the operator of {native.DOMAIN} with weights in {weights}, activations in {activations}, computes "
            f"something else on this machine (off by {difference:.2g} of the largest output): build it again (make "
            "native), or take the plan ov-sorted"
        )
    return difference
