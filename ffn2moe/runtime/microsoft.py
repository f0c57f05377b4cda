"""Test ONNX Runtime's MoE operators on this machine: `com.microsoft.MoE` and `com.microsoft.QMoE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ffn2moe.runtime.activations import ACTIVATIONS
from ffn2moe.runtime.engines import CPU
from ffn2moe.runtime.engines.onnxruntime import session
from ffn2moe.runtime.plans import MOE, QMOE, Plan
from ffn2moe.runtime.quantise import BLOCK, dequantize_blocks, quantize_blocks
from ffn2moe.runtime.selftest import one_node

MICROSOFT = "com.microsoft"
MASKED_LOGIT = -1e4  # for an expert that is not chosen: its softmax is 0 in float32, and nothing is infinite
# Activations of the operators (their `gelu` is the tanh form on the CPU), keyed by ours.
MOE_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}


def swiglu_rows(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return rows [E, M, ...] of gate and up as the MoE ops take them, [E, 2M, ...]: gate 0, up 0, gate 1, up 1."""
    E, M, *rest = gate.shape
    return np.stack([gate, up], axis=2).reshape(E, 2 * M, *rest)


def check_plan(plan: Plan, activation: str, gated: bool, providers: Sequence[str]) -> float:
    """Test the operator with the bits of a plan's weights (`self_test`)."""
    return self_test(activation, providers, gated=gated, bits=plan.bits)


def self_test(activation: str, providers: Sequence[str] = CPU, *, gated: bool = False, bits: int = 32) -> float:
    """Test that this runtime's `com.microsoft.MoE` routes, weighs and activates as the export expects.

    The op changed silently between releases (no softmax in one, hard-coded constants in another), so a tiny layer
    is compared with float64 arithmetic. With 8 or 4 `bits` the op is `com.microsoft.QMoE`, and the layout of its
    bits, its zero points and its scales are checked too. Returns the largest difference (for QMoE as a
    share of the largest output); RuntimeError where the op computes something else. GELU may be the erf or the tanh
    form: kernels differ, and the manifest says what was measured.
    """
    op = (MOE if bits == 32 else QMOE).name
    E, K, D, M, T = (4, 2, 8, 8, 6) if bits == 32 else (4, 2, 2 * BLOCK, BLOCK, 6)
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((T, D)).astype(np.float32)
    w_in_EMD = random.standard_normal((E, M, D)).astype(np.float32)
    b_in_EM = random.standard_normal((E, M)).astype(np.float32)
    w_out_EDM = random.standard_normal((E, D, M)).astype(np.float32)
    chosen_TK = np.stack([random.permutation(E)[:K] for _ in range(T)])
    logits_TE = np.full((T, E), MASKED_LOGIT, dtype=np.float32)
    weight_TK = np.full((T, K), 1 / K)
    if gated:  # with different gates; a plain FFN's gates are equal
        weight_TK = random.dirichlet(np.ones(K), T)
    np.put_along_axis(logits_TE, chosen_TK, np.log(weight_TK * K).astype(np.float32), axis=1)
    if gated:
        w_in_EMD = np.concatenate([w_in_EMD, random.standard_normal((E, M, D)).astype(np.float32)], axis=1)
        b_in_EM = np.concatenate([b_in_EM, random.standard_normal((E, M)).astype(np.float32)], axis=1)

    model = _moe_graph(activation, K, gated, bits, w_in_EMD, b_in_EM, w_out_EDM)
    try:
        (y_TD,) = session(model, threads=1, providers=providers).run(None, {"x": x_TD, "logits": logits_TE})
    except Exception as error:  # the runtime raises many types; each means that the op cannot be used
        raise RuntimeError(f"this onnxruntime cannot run {op} ({error}); open the export with plan='sorted'") from error
    if bits != 32:
        w_in_EMD, w_out_EDM = (
            dequantize_blocks(*quantize_blocks(weight, bits), bits) for weight in (w_in_EMD, w_out_EDM)
        )

    def layer(act: Any) -> np.ndarray:
        h_TEM = np.einsum("td,emd->tem", x_TD, w_in_EMD, dtype=np.float64) + b_in_EM
        h_TEM = act(h_TEM[..., :M]) * h_TEM[..., M:] if gated else act(h_TEM)
        y_TED = np.einsum("tem,edm->ted", h_TEM, w_out_EDM)
        return np.einsum("tk,tkd->td", weight_TK, np.take_along_axis(y_TED, chosen_TK[:, :, None], axis=1))

    forms = ("gelu_tanh", "gelu") if MOE_ACTIVATIONS[activation] == "gelu" else (activation,)
    expected = [layer(ACTIVATIONS[form]) for form in forms]
    difference = min(float(np.abs(y_TD - y).max()) for y in expected)
    tolerance = 1e-4
    if bits != 32:
        # As a share of the largest output. With 8 bits the kernel quantises the activations as well.
        difference /= float(np.abs(expected[0]).max())
        tolerance = 0.05 if bits == 8 else 1e-4
    if not difference < tolerance:
        raise RuntimeError(
            f"{op} of this onnxruntime computes something else (off by {difference:.2g}): its routing, activation "
            "or layout of bits differs; open the export with plan='sorted', or use another onnxruntime"
        )
    return difference


def _moe_graph(
    activation: str,
    num_active: int,
    gated: bool,
    bits: int,
    w_in_EMD: np.ndarray,
    b_in_EM: np.ndarray,
    w_out_EDM: np.ndarray,
) -> bytes:
    """Return a model of one MoE or QMoE node, as a plan holds it. The gate's rows of a gated FFN come first."""
    E, _, D = w_in_EMD.shape
    attributes: dict[str, Any] = {"activation_type": MOE_ACTIVATIONS[activation]}
    if gated:
        w_in_EMD, b_in_EM = (swiglu_rows(*np.split(part, 2, axis=1)) for part in (w_in_EMD, b_in_EM))
        attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    attributes |= {"k": num_active, "normalize_routing_weights": 1}
    constants = {"fc1": w_in_EMD, "fc1_bias": b_in_EM, "fc2": w_out_EDM}
    if bits != 32:
        attributes |= {"expert_weight_bits": bits, "block_size": BLOCK}
        fc1, fc1_scales = quantize_blocks(w_in_EMD, bits)
        fc2, fc2_scales = quantize_blocks(w_out_EDM, bits)
        constants = {"fc1": fc1, "s1": fc1_scales, "fc1_bias": b_in_EM, "fc2": fc2, "s2": fc2_scales}
    return one_node((MOE if bits == 32 else QMOE).name, {"x": D, "logits": E}, constants, attributes)
