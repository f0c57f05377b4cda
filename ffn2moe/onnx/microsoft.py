"""Compute a layer of experts by one operator of ONNX Runtime: `com.microsoft.MoE`, or `QMoE` with 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ffn2moe.onnx.editor import Editor
from ffn2moe.onnx.mixture import Mixture, PlanRefused, gates, mixtures_of, replace_mixtures, route, weighed
from ffn2moe.onnx.sorted import every_expert
from ffn2moe.runtime.microsoft import MASKED_LOGIT, MICROSOFT, MOE_ACTIVATIONS, swiglu_rows
from ffn2moe.runtime.plans import MOE, QMOE, Plan
from ffn2moe.runtime.quantise import BLOCK, quantize_blocks


def use_moe(graph: ir.Model, plan: Plan) -> None:
    """Replace every mixture by a `MoE` node. PlanRefused for an FFN that the operator does not compute.

    A layer that runs all experts becomes such a node, too: the operator may have another form of GELU than the layers
    around it would have.
    """
    mixtures = mixtures_of(graph, plan)
    for mixture in mixtures:
        _require_op(plan, MOE.name, mixture)
    replace_mixtures(graph, mixtures, _moe)


def use_qmoe(graph: ir.Model, plan: Plan) -> None:
    """Replace every mixture by a `QMoE` node, and one that runs all experts by a dense FFN.

    PlanRefused for an FFN that the operator does not compute.
    """
    mixtures = mixtures_of(graph, plan)
    for mixture in mixtures:
        if not mixture.is_dense:
            _require_op(plan, QMOE.name, mixture)
            width = mixture.w_in_EMD.shape[2]
            if width % BLOCK:
                raise PlanRefused(
                    f"{plan.name}: {QMOE.name} wants a width that is a multiple of {BLOCK}, and this model's is {width}"
                )
    replace_mixtures(
        graph,
        mixtures,
        lambda editor, mixture: (
            every_expert(editor, mixture) if mixture.is_dense else _qmoe(editor, mixture, plan.bits)
        ),
    )


def _require_op(plan: Plan, op: str, mixture: Mixture) -> None:
    if mixture.w_gate_EMD is not None and mixture.activation != "silu":
        raise PlanRefused(
            f"{plan.name}: {op} has no gated FFN with {mixture.activation}, only with silu; the plan `sorted` has one"
        )
    if mixture.activation not in MOE_ACTIVATIONS:
        raise PlanRefused(f"{plan.name}: {op} has no {mixture.activation}; the plan `sorted` has it")


def _moe(editor: Editor, mixture: Mixture) -> ir.Value:
    attributes, fc1, fc1_bias, fc2 = _experts(mixture)
    logits_TE, sum_T1 = _masked_logits(editor, mixture)
    y_TD = editor.node(
        "MoE",
        mixture.x_TD,
        logits_TE,
        editor.constant(f"{mixture.name}.fc1", fc1),
        None if fc1_bias is None else editor.constant(f"{mixture.name}.fc1_bias", fc1_bias),
        editor.constant(f"{mixture.name}.fc2", fc2),
        domain=MICROSOFT,
        name=f"{mixture.name}.moe",
        **attributes,
    )
    return weighed(editor, mixture, y_TD, sum_T1)


def _qmoe(editor: Editor, mixture: Mixture, bits: int) -> ir.Value:
    """Add a QMoE node. Neurons of weight 0 make the experts a multiple of the block wide."""
    attributes, fc1, fc1_bias, fc2 = _experts(mixture)
    missing = -mixture.w_in_EMD.shape[1] % BLOCK
    rows = missing * (1 if mixture.w_gate_EMD is None else 2)
    fc1 = np.pad(fc1, ((0, 0), (0, rows), (0, 0)))
    fc2 = np.pad(fc2, ((0, 0), (0, 0), (0, missing)))
    inputs: list[ir.Value | None] = []
    for name, weight in (("fc1", fc1), ("fc2", fc2)):
        packed, scales = quantize_blocks(weight, bits)
        inputs += [
            editor.constant(f"{mixture.name}.{name}.int{bits}", packed),
            editor.constant(f"{mixture.name}.{name}.scales", scales),
        ]
        if name == "fc1":
            padded = None if fc1_bias is None else np.pad(fc1_bias, ((0, 0), (0, rows)))
            inputs.append(None if padded is None else editor.constant(f"{mixture.name}.fc1_bias", padded))
    logits_TE, sum_T1 = _masked_logits(editor, mixture)
    y_TD = editor.node(
        "QMoE",
        mixture.x_TD,
        logits_TE,
        *inputs,
        domain=MICROSOFT,
        name=f"{mixture.name}.moe",
        **attributes,
        expert_weight_bits=bits,
        block_size=BLOCK,
    )
    return weighed(editor, mixture, y_TD, sum_T1)


def _experts(mixture: Mixture) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None, np.ndarray]:
    """Return what both operators take: attributes, fc1 [E, M or 2M, D], its bias and fc2 [E, D, M]."""
    attributes: dict[str, Any] = {"k": mixture.num_active, "normalize_routing_weights": 1}
    # The op weighs each chosen expert of a unit gate by 1/K.
    w_out_EDM = mixture.w_out_EDM * np.float32(mixture.num_active if mixture.gate == "unit" else 1)
    if mixture.w_gate_EMD is None:
        attributes["activation_type"] = MOE_ACTIVATIONS[mixture.activation]
        return attributes, mixture.w_in_EMD, mixture.b_in_EM, w_out_EDM
    # act(gate) * up is `swiglu`; its default constants belong to another model.
    attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    b_gate, b_in = mixture.b_gate_EM, mixture.b_in_EM
    bias = None
    if b_gate is not None or b_in is not None:
        nothing = np.zeros(mixture.w_in_EMD.shape[:2], dtype=np.float32)
        bias = swiglu_rows(nothing if b_gate is None else b_gate, nothing if b_in is None else b_in)
    return attributes, swiglu_rows(mixture.w_gate_EMD, mixture.w_in_EMD), bias, w_out_EDM


def _masked_logits(editor: Editor, mixture: Mixture) -> tuple[ir.Value, ir.Value | None]:
    """Return logits [T, E] from which the op makes the gates of the chosen experts, up to their sum [T, 1].

    The op weighs by the softmax of the K highest, so logarithms of the gates go in, and -1e4 elsewhere. The sum is None
    where it is 1; elsewhere the op's output has to be multiplied by it. Fed this way, every revision of the op computes
    the same. Unit gates go in as 0: each becomes 1/K, and the weights take the factor K.
    """
    scores_TE, chosen_TK = route(editor, mixture)
    sum_T1 = None
    if mixture.gate == "unit":
        logits_TK = editor.node(
            "ConstantOfShape", editor.node("Shape", chosen_TK), value=ir.tensor(np.zeros(1, dtype=np.float32))
        )
    else:
        logits_TK = editor.node("GatherElements", scores_TE, chosen_TK, axis=1)
        if mixture.gate == "sigmoid":  # log sigmoid(s) = -softplus(-s)
            logits_TK = editor.node("Neg", editor.node("Softplus", editor.node("Neg", logits_TK)))
        if mixture.gate != "softmax_topk":
            gate_TK = gates(editor, mixture, scores_TE, chosen_TK)
            sum_T1 = editor.node("ReduceSum", gate_TK, editor.constant("axis_1", np.array([1])), keepdims=1)
    masked_TE = editor.node(
        "ConstantOfShape",
        editor.node("Shape", scores_TE),
        value=ir.tensor(np.array([MASKED_LOGIT], dtype=np.float32)),
    )
    return editor.node("ScatterElements", masked_TE, chosen_TK, logits_TK, axis=1), sum_T1
