"""Compute a layer by one `ffn2moe.RoutedExperts` node: router, experts, and the norms and residuals around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ffn2moe.onnx.editor import Editor, constant_of, only_use, replace
from ffn2moe.onnx.mixture import Mixture, PlanRefused, mixtures_of
from ffn2moe.onnx.sorted import every_expert
from ffn2moe.runtime import native
from ffn2moe.runtime.plans import BLOCKS, Plan
from ffn2moe.table import unknown


def use_routed_experts(graph: ir.Model, plan: Plan) -> None:
    """Replace every mixture by a `RoutedExperts` node, and one that runs all experts by a dense FFN.

    The weights are in `plan.bits`, the activations of a token in `plan.activations`. PlanRefused for what the operator
    does not compute.
    """
    mixtures = mixtures_of(graph, plan)
    editor = Editor(graph)
    for mixture in mixtures:
        editor.at = mixture.node
        if mixture.is_dense:
            replace(mixture.node.outputs[0], every_expert(editor, mixture))
        else:
            _require_op(plan, mixture)
            _routed_experts(editor, mixture, native.weights_of(plan.bits), plan.activations)
    if BLOCKS not in plan.steps:  # with weights in blocks, OpenVINO computes in float32
        _bfloat16_between_layers(graph)


def _require_op(plan: Plan, mixture: Mixture) -> None:
    for choice, name, known in (
        ("activation", mixture.activation, tuple(native.ACTIVATIONS)),
        ("gate", mixture.gate, native.GATES),
    ):
        if name not in known:
            raise PlanRefused(f"{plan.name}: {unknown(f'{choice} of the operator', name, known)}")


def _packed_experts(editor: Editor, mixture: Mixture, weights: native.Weights) -> ir.Value:
    packed = native.pack_experts(
        weights,
        mixture.w_in_EMD,
        mixture.w_out_EDM,
        b_in_EM=mixture.b_in_EM,
        w_gate_EMD=mixture.w_gate_EMD,
        b_gate_EM=mixture.b_gate_EM,
    )
    return editor.constant(f"{mixture.name}.experts.{weights}", packed)


def _routed_experts(editor: Editor, mixture: Mixture, weights: native.Weights, activations: str | None) -> None:
    """Put a `RoutedExperts` node in the place of the mixture and of the norms and residuals around it."""
    frame = Frame.around(mixture.node)
    _, M, D = mixture.w_in_EMD.shape
    norms = {"norm_in": frame.norm_in, "norm_out": frame.norm_out}
    numbers = native.frame(
        constant_of(mixture.router),  # type: ignore[arg-type]
        constant_of(mixture.router_bias),  # type: ignore[arg-type]
        choice_bias_E=constant_of(mixture.choice_bias),
        b_out_D=mixture.b_out_D,
        **norms,
    )
    y_TD = editor.node(
        native.OP_TYPE,
        frame.given_TD,
        _packed_experts(editor, mixture, weights),
        editor.constant(f"{mixture.name}.frame", numbers),
        *([] if frame.residual_TD is None else [frame.residual_TD]),
        domain=native.DOMAIN,
        name=f"{mixture.name}.experts",
        **native.experts_attributes(
            D,
            M,
            gated=mixture.w_gate_EMD is not None,
            activation=mixture.activation,
            weights=weights,
            activations=activations,
        ),
        **native.frame_attributes(
            mixture.num_experts, mixture.num_active, mixture.gate, added=frame.added, output="f32", **norms
        ),
    )
    replace(frame.out_TD, y_TD)


def _bfloat16_between_layers(graph: ir.Model) -> None:
    """Let routed layers give bfloat16 where only products and the next layer's residual read their output.

    Products take bfloat16, and OpenVINO would convert the output for them; the residual's sum and norm stay in float32.
    """
    editor = Editor(graph)
    RemoveUnusedNodesPass()(graph)  # a replaced node would still count as a use
    for node in [node for node in graph.graph if node.op_type == native.OP_TYPE]:
        y_TD = node.outputs[0]
        uses = list(y_TD.uses())
        products = [use for use in uses if use.node.op_type in ("Gemm", "MatMul") and use.idx == 0]
        residuals = [use for use in uses if use.node.op_type == native.OP_TYPE]
        if y_TD.is_graph_output() or not products or len(products) + len(residuals) < len(uses):
            continue
        node.attributes.add(ir.AttrString("output", "bf16"))
        editor.at = products[0].node
        widened_TD = editor.node("Cast", y_TD, to=ir.DataType.FLOAT)
        widened_TD.shape, widened_TD.type = y_TD.shape, y_TD.type
        y_TD.type = ir.TensorType(ir.DataType.BFLOAT16)
        for use in products:
            use.node.replace_input_with(use.idx, widened_TD)


@dataclass(frozen=True)
class Frame:
    """The norms and residuals around a mixture in the graph that `RoutedExperts` computes as well."""

    given_TD: ir.Value
    residual_TD: ir.Value | None
    norm_in: native.Norm | None
    added: native.Added
    norm_out: native.Norm | None
    out_TD: ir.Value

    @classmethod
    def around(cls, node: ir.Node) -> Frame:
        """Find the norms and residuals that can go into the node: nothing else reads what lies between."""
        x_TD, out_TD = node.inputs[0], node.outputs[0]
        assert x_TD is not None
        norm_in, sum_TD, sides = _norm(x_TD.producer()), None, None
        if norm_in is not None:
            sum_TD = x_TD.producer().inputs[0]
            sides = _two_rows(sum_TD.producer())
        readers: set[ir.Node] = {node}  # those of x that go into the node
        readers_of_sum: set[ir.Node | None] = {x_TD.producer()}
        added: native.Added = "none"
        after = only_use(out_TD)
        if after is not None and after.op_type == "Add" and _two_rows(after):
            other = next((value for value in after.inputs if value is not out_TD), None)
            if other is x_TD:
                added = "x"
                readers.add(after)
            elif sum_TD is not None and other is sum_TD:
                added = "sum"
                readers_of_sum.add(after)
        alone = sides is not None and _read_by(x_TD, readers) and _read_by(sum_TD, readers_of_sum)
        norm_out = None
        if added == "sum" and not alone:
            added = "none"
        elif added != "none":
            assert after is not None
            out_TD = after.outputs[0]
            last = only_use(out_TD)
            norm_out = _norm(last) if last is not None and last.inputs[0] is out_TD else None
            out_TD = out_TD if norm_out is None else last.outputs[0]  # type: ignore[union-attr]
        if not alone:
            return cls(x_TD, None, None, added, norm_out, out_TD)
        assert sides is not None
        return cls(sides[0], sides[1], norm_in, added, norm_out, out_TD)


def _norm(node: ir.Node | None) -> native.Norm | None:
    """Return the norm that a node computes over the last axis of [T, D], if its scale and bias are constants."""
    kinds: dict[str, Literal["layer", "rms"]] = {"LayerNormalization": "layer", "RMSNormalization": "rms"}
    if node is None or node.domain or node.op_type not in kinds:
        return None
    width = _row_width(node.inputs[0])
    constants = [constant_of(value) for value in node.inputs[1:]]
    if width is None or any(constant is None or constant.shape != (width,) for constant in constants):
        return None
    if node.attributes.get_int("axis", -1) not in (-1, 1):
        return None
    bias_D = constants[1] if len(constants) > 1 else None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return native.Norm(kinds[node.op_type], constants[0], bias_D, epsilon)  # type: ignore[arg-type]


def _two_rows(node: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    """Return both sides of a node that adds two values [T, D]."""
    if node is None or node.op_type != "Add" or any(constant_of(value) is not None for value in node.inputs):
        return None
    first, second = node.inputs
    width = _row_width(first)
    return (first, second) if width is not None and width == _row_width(second) else None


def _row_width(value: ir.Value | None) -> int | None:
    """Return D of a value [T, D]; None for any other shape."""
    shape = None if value is None else value.shape
    return shape[1] if shape is not None and len(shape) == 2 and isinstance(shape[1], int) else None


def _read_by(value: ir.Value | None, readers: set[Any]) -> bool:
    """Return whether nothing but these nodes reads the value."""
    return value is not None and not value.is_graph_output() and {use.node for use in value.uses()} <= readers
