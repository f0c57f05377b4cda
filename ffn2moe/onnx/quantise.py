"""Give the linear maps of a graph weights of 8 or 4 bits, or float16 tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ffn2moe.onnx.editor import Editor, constant_of, replace
from ffn2moe.runtime.microsoft import MICROSOFT
from ffn2moe.runtime.plans import Plan
from ffn2moe.runtime.quantise import BLOCK, quantize_blocks

HALVED_FROM = 4096  # numbers in a matrix


class LinearMap(NamedTuple):
    node: ir.Node
    name: str
    weight: np.ndarray  # [in, out]
    bias: ir.Value | None


def linear_maps(model: ir.Model) -> list[LinearMap]:
    """Return every product with a constant matrix; routers are left out.

    Routers stay in float32: a token sent to another expert costs more quality than the router costs time.
    """
    found = []
    for node in model.graph:
        if node.op_type not in ("Gemm", "MatMul") or (node.name or "").endswith(".router"):
            continue
        weight = constant_of(node.inputs[1])
        if weight is None or weight.ndim != 2:
            continue
        attributes = node.attributes
        if any(attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta")) or attributes.get_int("transA", 0):
            continue
        name = (node.inputs[1].name or "").removesuffix(".weight")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        found.append(LinearMap(node, name, weight.T if attributes.get_int("transB", 0) else weight, bias))
    return found


def int8(editor: Editor, name: str, weight: np.ndarray, most: int = 127) -> tuple[ir.Value, ir.Value]:
    """Return a matrix [in, out] as signed bytes from -most to most, and the scale of each output."""
    scale_N = np.maximum(np.abs(weight).max(axis=0) / np.float32(most), np.finfo(np.float32).tiny)
    steps = editor.constant(f"{name}.int8", np.rint(weight / scale_N).astype(np.int8))
    return steps, editor.constant(f"{name}.scale", scale_N.astype(np.float32))


def quantise_dynamically(model: ir.Model, plan: Plan) -> None:
    """Put linear maps in int8: weights now, per output channel; activations as they run, per tensor.

    The form is that of ONNX Runtime's ``quantize_dynamic``, whose kernels it is fused into when a session is
    created: unsigned activations and signed symmetric weights, the pair that AMX and VNNI multiply. (Unsigned
    weights are 4x slower there; on a CPU with neither, signed ones may saturate: the plan's quality is measured.)
    An input of several maps is quantised once, and before it is gathered by expert.
    """
    editor = Editor(model)
    quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node, name, weight, bias in linear_maps(model):
        editor.at = node
        x, index = node.inputs[0], None
        gather = x.producer()
        if gather is not None and _gathers_tokens(gather):
            x, index = gather.inputs
        if x not in quantized:
            if index is not None:
                editor.at = gather
            quantized[x] = tuple(editor.nodes("DynamicQuantizeLinear", [x], outputs=3))
            editor.at = node
        q_x, scale_x, zero_x = quantized[x]
        if index is not None:
            q_x = editor.node("Gather", q_x, index, axis=0)
        q_weight, scale_N = int8(editor, name, weight)
        scale = editor.node("Mul", scale_x, scale_N)
        y = editor.node("Cast", editor.node("MatMulInteger", q_x, q_weight, zero_x), to=ir.DataType.FLOAT)
        y = editor.node("Mul", y, scale)
        if bias is not None:
            y = editor.node("Add", y, bias)
        replace(node.outputs[0], y)


def _gathers_tokens(node: ir.Node) -> bool:
    """Return whether the node picks rows of activations, as each expert picks its tokens."""
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 and constant_of(node.inputs[0]) is None


def compress_weights(model: ir.Model, plan: Plan) -> None:
    """Store weights of linear maps as signed bytes with a scale for each output: standard ONNX, float activations.

    OpenVINO keeps the bytes in memory and widens them as it multiplies.
    """
    editor = Editor(model)
    for node, name, weight, bias in linear_maps(model):
        editor.at = node
        widened = editor.node("DequantizeLinear", *int8(editor, name, weight), axis=1)
        y = editor.node("MatMul", node.inputs[0], widened)
        if bias is not None:
            y = editor.node("Add", y, bias)
        replace(node.outputs[0], y)


def halve_large_matrices(model: ir.Model, plan: Plan) -> None:
    """Store large float32 matrices as float16, widened where they are used: half the bytes.

    In a plan of few bits they are mostly the table of embeddings. float16 rounds its numbers to 11 bits, where
    bfloat16, in which the plan computes, has 8. Matrices with numbers beyond float16 stay as they are.
    """
    editor = Editor(model)
    editor.at = next(iter(model.graph), None)
    for value in list(model.graph.initializers.values()):
        weight = constant_of(value)
        if weight is None or weight.dtype != np.float32:
            continue
        if weight.ndim < 2 or weight.size < HALVED_FROM:
            continue
        if not np.abs(weight).max() <= np.finfo(np.float16).max:
            continue
        half = editor.constant(f"{value.name}.half", weight.astype(np.float16))
        value.replace_all_uses_with(editor.node("Cast", half, to=ir.DataType.FLOAT))


def _join_projections(model: ir.Model) -> None:
    """Make one product of those that give attention its queries, keys and values: they read the same tokens.

    The kernel of a small product takes longer to begin, and to round the token, than to multiply.
    """
    editor = Editor(model)
    by_source: dict[ir.Value, list[LinearMap]] = {}
    for one in linear_maps(model):
        if all(use.node.op_type == "Reshape" for use in one.node.outputs[0].uses()) and constant_of(one.bias) is None:
            by_source.setdefault(one.node.inputs[0], []).append(one)
    for x_TD, maps in by_source.items():
        if len(maps) < 2:
            continue
        editor.at = maps[0].node
        weight = editor.constant(f"{maps[0].name}.joined", np.concatenate([one.weight for one in maps], axis=1))
        sizes = editor.constant(f"{maps[0].name}.sizes", np.array([one.weight.shape[1] for one in maps]))
        parts = editor.nodes("Split", [editor.node("MatMul", x_TD, weight), sizes], outputs=len(maps), axis=1)
        for one, part in zip(maps, parts, strict=True):
            replace(one.node.outputs[0], part)
    RemoveUnusedNodesPass()(model)


def quantise_in_blocks(model: ir.Model, plan: Plan) -> None:
    """Put weights of linear maps in `plan.bits`, 8 or 4, in blocks; activations stay as they are until the kernel.

    Decoding waits for memory, and fewer bytes are read for each token. The last map, onto the vocabulary, keeps 8 bits:
    its errors go straight into the logits.
    """
    _join_projections(model)
    editor = Editor(model)
    vocabulary = [
        value.shape[-1] for value in model.graph.outputs if value.name == "logits" and value.shape is not None
    ]
    for node, name, weight, bias in linear_maps(model):
        editor.at = node
        kept = 8 if weight.shape[1] in vocabulary else plan.bits
        packed, scales = quantize_blocks(weight.T, kept)
        K, N = weight.shape
        y = editor.node(
            "MatMulNBits",
            node.inputs[0],
            editor.constant(f"{name}.int{kept}", packed.reshape(N, -1, BLOCK * kept // 8)),
            editor.constant(f"{name}.scales", scales.reshape(-1)),
            *(() if bias is None else (None, None, bias)),
            domain=MICROSOFT,
            K=K,
            N=N,
            bits=kept,
            block_size=BLOCK,
            accuracy_level=4,
        )
        replace(node.outputs[0], y)
