"""Compute the chosen experts in standard ops: tokens sorted by expert, and each expert two or three `Gemm`s."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ffn2moe.onnx.editor import Editor
from ffn2moe.onnx.mixture import Mixture, activate, gates, mixtures_of, replace_mixtures, route, weighed
from ffn2moe.runtime.plans import Plan


def sort_tokens(graph: ir.Model, plan: Plan) -> None:
    """Replace every mixture by its sorted form, and one that runs all experts by a dense FFN."""
    replace_mixtures(
        graph,
        mixtures_of(graph, plan),
        lambda editor, mixture: every_expert(editor, mixture) if mixture.is_dense else sorted_experts(editor, mixture),
    )


def sorted_experts(editor: Editor, mixture: Mixture) -> ir.Value:
    """Add ops that compute the chosen experts only, and return the layer's output [T, D].

    ``NonZero`` of the choice as [E, T x K] lists the pairs of a token and one of its choices: those of expert 0, then
    those of expert 1 and so on; each expert gathers its tokens. Nothing is padded and T x K numbers are never sorted;
    an expert without tokens multiplies an empty matrix. The outputs are gathered back by the place of their pair in
    that list, and the K of a token are added up: a ``ScatterND`` that adds would be one op less, but on more than one
    thread ONNX Runtime loses additions to it. (docs/decisions/0014 lists what else was tried, with figures.)
    """
    E, K = mixture.num_experts, mixture.num_active
    scores_TE, chosen_TK = route(editor, mixture)
    axis_1 = editor.constant("axis_1", np.array([1]))
    experts = editor.constant(f"experts_{E}", np.array([E]))
    flat_P = editor.node("Reshape", chosen_TK, editor.constant("fill_axis", np.array([-1])))
    taken_EP = editor.node("OneHot", flat_P, experts, editor.constant("no_yes", np.arange(2)), axis=0)
    pair_R = editor.node("Gather", editor.node("NonZero", taken_EP), editor.constant("number_1", np.array(1)), axis=0)
    token_R = pair_R if K == 1 else editor.node("Div", pair_R, editor.constant(f"choices_{K}", np.array(K)))
    count_E = editor.node("ReduceSum", taken_EP, axis_1, keepdims=0)
    tokens = editor.nodes("Split", [token_R, count_E], outputs=E, axis=0) if E > 1 else [token_R]
    y_RD = _outputs(editor, mixture, tokens)

    zero, one = (editor.constant(f"number_{number}", np.array(number)) for number in (0, 1))
    place_R = editor.node("Range", zero, editor.node("Size", pair_R), one)
    place_P = editor.node("ScatterElements", pair_R, pair_R, place_R, axis=0)
    gate_TK = gates(editor, mixture, scores_TE, chosen_TK)
    if K == 1:
        y_TD = editor.node("Gather", y_RD, place_P, axis=0)
        return weighed(editor, mixture, y_TD, gate_TK) if gate_TK is not None else y_TD
    place_TK = editor.node("Reshape", place_P, editor.constant(f"by_{K}", np.array([-1, K])))
    y_TKD = editor.node("Gather", y_RD, place_TK, axis=0)
    if gate_TK is None:
        return editor.node("ReduceSum", y_TKD, axis_1, keepdims=0)
    y_TKD = editor.node("Mul", y_TKD, editor.node("Unsqueeze", gate_TK, editor.constant("axis_2", np.array([2]))))
    return weighed(editor, mixture, editor.node("ReduceSum", y_TKD, axis_1, keepdims=0), None)


def _outputs(editor: Editor, mixture: Mixture, tokens: Sequence[ir.Value]) -> ir.Value:
    """Return the outputs [R, D] of all experts for their tokens, one expert after the other.

    With unit gates each of a token's K experts adds its share of the output bias inside its Gemm, which saves a pass
    over memory. Other gates would multiply the shares.
    """
    b_share_D = None
    if mixture.b_out_D is not None and mixture.gate == "unit":
        b_share_D = editor.constant(f"{mixture.name}.b_share", mixture.b_out_D / np.float32(mixture.num_active))
    outputs = [
        _one_expert(editor, mixture, expert, editor.node("Gather", mixture.x_TD, token_n, axis=0), b_share_D)
        for expert, token_n in enumerate(tokens)
    ]
    return editor.node("Concat", *outputs, axis=0) if len(outputs) > 1 else outputs[0]


def every_expert(editor: Editor, mixture: Mixture) -> ir.Value:
    """Add a layer that stays dense (K = E, gates of 1) as one FFN without a router; return its output [T, D]."""

    def rows(stacked: np.ndarray | None) -> np.ndarray | None:
        return None if stacked is None else stacked.reshape(1, -1, *stacked.shape[2:])

    w_in_1FD = rows(mixture.w_in_EMD)
    assert w_in_1FD is not None
    whole = dataclasses.replace(
        mixture,
        w_in_EMD=w_in_1FD,
        b_in_EM=rows(mixture.b_in_EM),
        w_gate_EMD=rows(mixture.w_gate_EMD),
        b_gate_EM=rows(mixture.b_gate_EM),
        w_out_EDM=np.concatenate(mixture.w_out_EDM, axis=1)[None],
    )
    b_out_D = None if mixture.b_out_D is None else editor.constant(f"{mixture.name}.b_out", mixture.b_out_D)
    return _one_expert(editor, whole, 0, mixture.x_TD, b_out_D)


def _one_expert(editor: Editor, mixture: Mixture, expert: int, x_nD: ir.Value, bias_D: ir.Value | None) -> ir.Value:
    """Return the output [n, D] of one expert for its tokens, with the layer's output bias where one is given."""
    name = f"{mixture.name}.experts.{expert}"

    def linear(part: str, weight_MD: np.ndarray, bias_EM: np.ndarray | None) -> ir.Value:
        weight = editor.constant(f"{name}.{part}.weight", weight_MD.T)
        bias = [] if bias_EM is None else [editor.constant(f"{name}.{part}.bias", bias_EM[expert])]
        return editor.node("Gemm", x_nD, weight, *bias, name=f"{name}.{part}")

    h_nM = linear("in", mixture.w_in_EMD[expert], mixture.b_in_EM)
    if mixture.w_gate_EMD is None:
        h_nM = activate(editor, h_nM, mixture.activation)
    else:
        gate_nM = linear("gate", mixture.w_gate_EMD[expert], mixture.b_gate_EM)
        h_nM = editor.node("Mul", activate(editor, gate_nM, mixture.activation), h_nM)
    w_out_MD = editor.constant(f"{name}.out.weight", mixture.w_out_EDM[expert].T)
    return editor.node("Gemm", h_nM, w_out_MD, *([] if bias_D is None else [bias_D]), name=f"{name}.out")
