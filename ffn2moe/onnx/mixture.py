"""Read the mixture nodes of a canonical graph, and write their routing in standard ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ffn2moe.onnx.editor import Editor, constant_of, replace
from ffn2moe.onnx.names import DOMAIN, MIXTURE, PARTS
from ffn2moe.runtime.plans import Plan
from ffn2moe.table import unknown

GATES = ("unit", "softmax", "softmax_topk", "sigmoid")  # those that have a form in ONNX


class PlanRefused(ValueError):
    """A plan cannot hold this model; the message says why and which plan can."""


@dataclass(frozen=True)
class Mixture:
    """A mixture node of a canonical graph, read: a token runs the `num_active` experts of the highest score."""

    node: ir.Node
    x_TD: ir.Value
    name: str  # of the layer
    num_active: int
    gate: str
    activation: str
    router: ir.Value
    router_bias: ir.Value
    choice_bias: ir.Value | None
    w_in_EMD: np.ndarray
    b_in_EM: np.ndarray | None
    w_gate_EMD: np.ndarray | None
    b_gate_EM: np.ndarray | None
    w_out_EDM: np.ndarray
    b_out_D: np.ndarray | None

    @classmethod
    def read(cls, node: ir.Node, plan: str) -> Mixture:
        """Read a node. PlanRefused for a selection, a routing or a gate that has no form in ONNX."""
        assert node.op_type == MIXTURE
        selection, routing = (node.attributes[name].as_string() for name in ("selection", "routing"))
        if selection != "topk":
            raise PlanRefused(
                f"{plan}: the selection {selection!r} has no form in ONNX, only `topk` has: keep the checkpoint for "
                "PyTorch, or convert the model with topk"
            )
        if routing != "token":
            raise PlanRefused(
                f"{plan}: routers that read a whole text (routing {routing!r}) have no form in ONNX: keep the "
                "checkpoint for PyTorch, or route each token"
            )
        gate = node.attributes["gate"].as_string()
        if gate not in GATES:
            raise PlanRefused(f"{plan}: {unknown('gate in ONNX', gate, GATES)}")
        values = dict(zip(PARTS, node.inputs[1:], strict=False))
        w_in = values["w_in"]
        arrays = {name: constant_of(value) for name, value in values.items()}
        assert node.inputs[0] is not None and w_in is not None
        return cls(
            node=node,
            x_TD=node.inputs[0],
            name=(w_in.name or "").removesuffix(".w_in"),
            num_active=node.attributes["num_active"].as_int(),
            gate=gate,
            activation=node.attributes["activation"].as_string(),
            router=values["router"],
            router_bias=values["router_bias"],
            choice_bias=values.get("choice_bias"),
            w_in_EMD=arrays["w_in"],  # type: ignore[arg-type]
            b_in_EM=arrays.get("b_in"),
            w_gate_EMD=arrays.get("w_gate"),
            b_gate_EM=arrays.get("b_gate"),
            w_out_EDM=arrays["w_out"],  # type: ignore[arg-type]
            b_out_D=arrays.get("b_out"),
        )

    @property
    def num_experts(self) -> int:
        return len(self.w_in_EMD)

    @property
    def is_dense(self) -> bool:
        """Whether every token runs every expert with gates of 1: a dense FFN in pieces."""
        return self.num_active == self.num_experts and self.gate == "unit"


def mixtures_of(graph: ir.Model, plan: Plan) -> list[Mixture]:
    """Return the mixtures of a canonical graph in their order. PlanRefused for one that has no form in ONNX."""
    return [Mixture.read(node, plan.name) for node in graph.graph if node.domain == DOMAIN and node.op_type == MIXTURE]


def replace_mixtures(graph: ir.Model, mixtures: list[Mixture], experts: Callable[[Editor, Mixture], ir.Value]) -> None:
    """Put what `experts` makes of each mixture, its output [T, D], in the place of the node."""
    editor = Editor(graph)
    for mixture in mixtures:
        editor.at = mixture.node
        replace(mixture.node.outputs[0], experts(editor, mixture))


# --- routing --------------------------------------------------------------------------------------------------------


def route(editor: Editor, mixture: Mixture) -> tuple[ir.Value, ir.Value]:
    """Add the router: return its scores [T, E] and the chosen experts [T, K], in the order of falling score."""
    name = f"{mixture.name}.router"
    scores_TE = editor.node("Gemm", mixture.x_TD, mixture.router, mixture.router_bias, transB=1, name=name)
    ranked_TE = scores_TE
    if mixture.choice_bias is not None:
        if mixture.gate == "sigmoid":
            ranked_TE = editor.node("Sigmoid", scores_TE)
        ranked_TE = editor.node("Add", ranked_TE, mixture.choice_bias)
    count = editor.constant(f"choose_{mixture.num_active}", np.array([mixture.num_active]))
    return scores_TE, editor.nodes("TopK", [ranked_TE, count], outputs=2, axis=-1)[1]


def gates(editor: Editor, mixture: Mixture, scores_TE: ir.Value, chosen_TK: ir.Value) -> ir.Value | None:
    """Add the weight of each chosen expert and return it [T, K] (`ffn2moe.moe.router.gates`); None where it is 1."""
    if mixture.gate == "unit":
        return None
    if mixture.gate == "softmax":
        return editor.node("GatherElements", editor.node("Softmax", scores_TE, axis=-1), chosen_TK, axis=1)
    score_TK = editor.node("GatherElements", scores_TE, chosen_TK, axis=1)
    if mixture.gate == "softmax_topk":
        return editor.node("Softmax", score_TK, axis=-1)
    assert mixture.gate == "sigmoid", mixture.gate
    return editor.node("Sigmoid", score_TK)


def weighed(editor: Editor, mixture: Mixture, y_TD: ir.Value, sum_T1: ir.Value | None) -> ir.Value:
    """Multiply the experts' output by the sum of the gates, if there is one, and add the output bias."""
    if sum_T1 is not None:
        y_TD = editor.node("Mul", y_TD, sum_T1)
    if mixture.b_out_D is not None:
        y_TD = editor.node("Add", y_TD, editor.constant(f"{mixture.name}.b_out", mixture.b_out_D))
    return y_TD


def activate(editor: Editor, h: ir.Value, activation: str) -> ir.Value:
    """Add the activation of an FFN in standard ops. PlanRefused for an unknown one."""
    if activation not in _ACTIVATIONS:
        raise PlanRefused(unknown("activation in ONNX", activation, tuple(_ACTIVATIONS)))
    return _ACTIVATIONS[activation](editor, h)


def _quick_gelu(editor: Editor, h: ir.Value) -> ir.Value:
    slope = editor.constant("quick_gelu_slope", np.array(1.702, dtype=np.float32))
    return editor.node("Mul", h, editor.node("Sigmoid", editor.node("Mul", h, slope)))


_ACTIVATIONS: dict[str, Callable[[Editor, ir.Value], ir.Value]] = {
    "gelu": lambda editor, h: editor.node("Gelu", h),
    "gelu_tanh": lambda editor, h: editor.node("Gelu", h, approximate="tanh"),
    "relu": lambda editor, h: editor.node("Relu", h),
    "silu": lambda editor, h: editor.node("Mul", h, editor.node("Sigmoid", h)),
    "quick_gelu": _quick_gelu,
}
