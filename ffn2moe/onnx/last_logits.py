"""Let the graph of a language model compute logits for some of its tokens alone.

The map onto the vocabulary is the largest of a small model. A prompt needs it for its last token only.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ffn2moe.onnx.editor import BATCH, Editor, constant_of, replace
from ffn2moe.onnx.simplify import finish
from ffn2moe.runtime.decoders import LOGITS_AT

KEPT = "kept"  # the number of tokens with logits


def logits_of_chosen_tokens(model: ir.Model) -> None:
    """Add the input `LOGITS_AT`, int64 [kept]: places of tokens in [0, L), or -1 for the last; logits are [B, kept, V].

    A graph whose logits do not end in a product with a constant matrix, on tokens [T, D], stays as it is.
    """
    graph = model.graph
    (logits,) = (value for value in graph.outputs if value.name == "logits")
    product = _product_behind(logits)
    if product is None:
        return
    reshape, x_TD = logits.producer(), product.inputs[0]
    assert reshape is not None and x_TD is not None and logits.shape is not None
    at_N = ir.val(LOGITS_AT, dtype=ir.DataType.INT64, shape=ir.Shape([KEPT]))
    graph.inputs.append(at_N)
    editor = Editor(model)
    editor.at = product
    width = editor.constant("logits_width", np.array([-1, x_TD.shape[1]]))
    x_BLD = editor.node("Reshape", x_TD, reshape.inputs[1])
    kept_TD = editor.node("Reshape", editor.node("Gather", x_BLD, at_N, axis=1), width)
    kept_TD.shape, kept_TD.type = x_TD.shape, x_TD.type
    product.replace_input_with(0, kept_TD)
    editor.at = reshape
    batch_1 = editor.node("Shape", graph.inputs[0], start=0, end=1)
    rows = editor.node(
        "Concat", batch_1, editor.node("Shape", at_N), editor.constant("fill_axis", np.array([-1])), axis=0
    )
    vocabulary = logits.shape[2]
    replace(logits, editor.node("Reshape", reshape.inputs[0], rows))
    graph.outputs[0].shape = ir.Shape([BATCH, KEPT, vocabulary])
    finish(model)


def _product_behind(logits: ir.Value) -> ir.Node | None:
    """Return the product with a constant matrix that the logits come from, through operations on single numbers."""
    node = logits.producer()
    if node is None or node.op_type != "Reshape" or len(node.inputs[0].shape or ()) != 2:
        return None
    while node is not None:
        values = [value for value in node.inputs if value is not None and constant_of(value) is None]
        if node.op_type in ("Gemm", "MatMul"):
            weight = constant_of(node.inputs[1])
            return node if weight is not None and weight.ndim == 2 and len(node.inputs[0].shape or ()) == 2 else None
        node = values[0].producer() if len(values) == 1 or node.op_type == "Reshape" else None
    return None
