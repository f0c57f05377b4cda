"""Simplify a traced graph without changing its results."""

from __future__ import annotations

from itertools import count

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    TopologicalSortPass,
)

from ffn2moe.onnx.editor import BATCH, SEQUENCE, Editor, constant_of, only_use, produced_by, replace


def finish(model: ir.Model) -> None:
    """Drop unused parts and make the bytes depend on the computation alone."""
    for tidy in (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(size_limit=16),  # shapes and axes; equal weights keep their own names
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),
        RemoveUnusedOpsetsPass(),
        TopologicalSortPass(),
        ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        value.doc_string = None
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "ffn2moe", None
    _name(graph)


def _name(graph: ir.Graph) -> None:
    """Name values by the parameter they come from, if there is one, else by position."""
    names: dict[ir.Value, str] = {}
    for node in graph:
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if bias is not None and (bias.name or "").endswith(".bias"):
            linear = bias.name.removesuffix(".bias")
            node.name = linear.removeprefix("model.")
            names[node.inputs[1]] = f"{linear}.weight"
    constants = list(graph.initializers.values())
    taken: set[str] = set()
    unnamed = count()
    for value in constants:
        name = names.get(value, value.name or "").removeprefix("model.")
        if not name or name.startswith(("val_", "constant_")) or name in taken:
            name = f"constant_{next(unnamed)}"
        taken.add(name)
        names[value] = name
    for position, value in enumerate(constants):
        value.name = f"renaming_{position}"
    for value in constants:
        value.name = names[value]
    taken.clear()
    for position, node in enumerate(graph):
        if not node.name or node.name.startswith("node_") or node.name in taken:
            node.name = f"{node.op_type}_{position}"
        taken.add(node.name)
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"t{position}" if len(node.outputs) == 1 else f"t{position}_{index}"


# --- rewriting the exporter's graph ---------------------------------------------------------------------------------


_TRANSPOSED = ".transposed"


def fold_transposed_weights(model: ir.Model) -> None:
    """Transpose the weight of ``x @ weight.T`` once: the exporter leaves a large one to every run."""
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        weight = constant_of(node.inputs[0])
        if weight is not None and weight.ndim == 2:
            replace(node.outputs[0], editor.constant(f"{node.inputs[0].name}{_TRANSPOSED}", weight.T))


def attention_without_transposes(model: ir.Model) -> None:
    """Put attention on heads [B, H, L, d], with transposes around it, as the same op on [B, L, D].

    The op splits heads itself when it gets their number, which saves a copy of each of its four tensors.
    """
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        sides = [_before_head_split(value) for value in node.inputs[:3]]
        merged = _after_head_merge(node.outputs[0])
        if merged is None or any(side is None for side in sides):
            continue
        heads, key_value_heads = (value.shape[1] for value in node.inputs[:2])
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        editor.at = node
        out_BLD = editor.node(
            "Attention",
            *sides,
            *node.inputs[3:],
            **attributes | {"q_num_heads": heads, "kv_num_heads": key_value_heads},
        )
        replace(merged, out_BLD)


def _before_head_split(heads_BHLd: ir.Value | None) -> ir.Value | None:
    """Return x [B, L, D] of ``x.view(B, L, H, d).transpose(1, 2)``."""
    transpose = produced_by(heads_BHLd, "Transpose")
    reshape = produced_by(transpose.inputs[0], "Reshape") if transpose and _swaps_heads(transpose) else None
    return reshape.inputs[0] if reshape is not None and _is_hidden(reshape.inputs[0]) else None


def _after_head_merge(heads_BHLd: ir.Value) -> ir.Value | None:
    """Return y [B, L, D] of ``heads.transpose(1, 2).reshape(B, L, D)``."""
    transpose = only_use(heads_BHLd)
    if transpose is None or transpose.op_type != "Transpose" or not _swaps_heads(transpose):
        return None
    reshape = only_use(transpose.outputs[0])
    if reshape is None or reshape.op_type != "Reshape" or not _is_hidden(reshape.outputs[0]):
        return None
    return reshape.outputs[0]


def _swaps_heads(transpose: ir.Node) -> bool:
    return list(transpose.attributes["perm"].value) == [0, 2, 1, 3]


# These ops act on each number or on the last axis, so the layout of tokens does not matter.
_TOKEN_WISE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "MatMul"),
        *("LayerNormalization", "RMSNormalization"),
    )
)


def flatten_tokens(model: ir.Model) -> None:
    """Reshape hidden states [B, L, n] to [T, n] wherever tokens do not see each other."""
    graph = model.graph
    editor = Editor(model)
    editor.at = graph[0]
    of_ids = None
    if graph.inputs[0].shape == ir.Shape([BATCH, SEQUENCE]):
        of_ids = editor.node(
            "Concat", editor.node("Shape", graph.inputs[0]), editor.constant("fill_axis", np.array([-1])), axis=0
        )

    def hidden_shape(out: ir.Value) -> ir.Value:
        length = out.shape[1]
        if not isinstance(length, int):
            assert of_ids is not None
            return of_ids
        return editor.constant(f"hidden_{length}_{out.shape[2]}", np.array([-1, length, out.shape[2]]))

    for node in list(graph):
        out = node.outputs[0]
        editor.at = node
        if node.op_type == "Reshape" and _is_hidden(node.inputs[0]) and _is_tokens(out, node.inputs[0].shape[2]):
            replace(out, _as_tokens(editor, node.inputs[0]))
        elif _is_token_wise(node):
            inputs = [_as_tokens(editor, value) if _is_hidden(value) else value for value in node.inputs]
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            out_Tn = editor.node(node.op_type, *inputs, domain=node.domain, **attributes)
            out_Tn.shape, out_Tn.type = ir.Shape(["tokens", out.shape[2]]), out.type
            replace(out, editor.node("Reshape", out_Tn, hidden_shape(out)))


def _as_tokens(editor: Editor, hidden: ir.Value) -> ir.Value:
    """Return the value [B, L, n] as [T, n]: its source, if that has this shape."""
    width = hidden.shape[2]
    reshape = produced_by(hidden, "Reshape")
    if reshape is not None and _is_tokens(reshape.inputs[0], width):
        return reshape.inputs[0]
    tokens = editor.node("Reshape", hidden, editor.constant(f"tokens_of_{width}", np.array([-1, width])))
    tokens.shape, tokens.type = ir.Shape(["tokens", width]), hidden.type
    return tokens


def _is_hidden(value: ir.Value | None) -> bool:
    """Return whether the value is [B, L, n] for a fixed n."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) != 3:
        return False
    return shape[0] == BATCH and (shape[1] == SEQUENCE or isinstance(shape[1], int)) and isinstance(shape[2], int)


def _is_tokens(value: ir.Value, width: int) -> bool:
    """Return whether the value is [anything, width]."""
    return value.shape is not None and len(value.shape) == 2 and value.shape[1] == width


def _is_token_wise(node: ir.Node) -> bool:
    if node.op_type not in _TOKEN_WISE or not _is_hidden(node.outputs[0]):
        return False
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        axis = node.attributes.get("axis")
        return _is_hidden(node.inputs[0]) and (axis is None or axis.value in (-1, 2))
    if node.op_type == "MatMul":
        weight = constant_of(node.inputs[1])
        return _is_hidden(node.inputs[0]) and weight is not None and weight.ndim == 2
    constants = [constant_of(value) for value in node.inputs]
    return all(
        _is_hidden(value) and value.shape[1] == node.outputs[0].shape[1] if constant is None else constant.ndim <= 1
        for value, constant in zip(node.inputs, constants, strict=True)
    )


def linear_maps_as_gemm(model: ir.Model) -> None:
    """Put ``x @ W + b`` on tokens into one Gemm: the bias costs no pass over memory of its own."""
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type == "Add"]:
        for product, bias in (node.inputs, reversed(node.inputs)):
            multiply = produced_by(product, "MatMul")
            user = only_use(product)
            if multiply is None or user is None or user is not node:
                continue
            weight, offset = constant_of(multiply.inputs[1]), constant_of(bias)
            if weight is None or weight.ndim != 2 or offset is None or offset.shape != weight.shape[1:]:
                continue
            if _is_tokens(product, weight.shape[1]):
                editor.at = node
                replace(node.outputs[0], editor.node("Gemm", *multiply.inputs, bias))
                break


def share_tied_weights(model: ir.Model) -> None:
    """Let a map onto the vocabulary read the embedding table where that is its weight: the file holds it once."""
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type in ("Gemm", "MatMul")]:
        weight = node.inputs[1]
        name = (weight.name or "").removesuffix(_TRANSPOSED)
        table = model.graph.initializers.get(name)
        if name == weight.name or table is None or not list(table.uses()) or len(node.inputs[0].shape or ()) != 2:
            continue
        editor.at = node
        replace(node.outputs[0], editor.node("Gemm", node.inputs[0], table, *node.inputs[2:], transB=1))
