"""Plans: the ways to execute one export, each a rewriting of the canonical graph.

| plan | what it is |
|---|---|
| `fused` | the canonical graph: one `com.microsoft.MoE` node a layer |
| `sorted` | standard ops only: tokens sorted by expert, and each expert a `Gemm`, an activation and a `Gemm` |
| `sorted8` | `sorted` with its linear maps in int8, quantised as they run |
| `dense` | the teacher: what a user would deploy without this package |
| `dense8` | `dense` in int8, in the same way |

Which is fastest depends on the machine and on batch x sequence, so it is measured (`tasks.benchmark`), not known.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ffn2moe.onnx_graph import Editor, constant_of, finish, only_use, replace
from ffn2moe.runtime import INT8_PLANS, Plan
from ffn2moe.spec import Activation


def lower(canonical: ir.Model, plan: Plan, activation: Activation) -> ir.Model:
    """The graph of one plan, from the canonical graph of the mixture (of the teacher, for the dense plans)."""
    graph = canonical.clone()
    if plan in ("sorted", "sorted8"):
        sort_tokens(graph, activation)
    if plan in INT8_PLANS:
        quantize(graph)
    return graph


# --- sorted ---------------------------------------------------------------------------------------------------------


def sort_tokens(model: ir.Model, activation: Activation) -> None:
    """Every MoE node becomes standard ops that compute the chosen experts only.

    ``NonZero`` of the choice as [E, T] lists the tokens of expert 0, then those of expert 1 and so on; each
    expert gathers its own. No padding and no sorting of T x K numbers; an expert without tokens multiplies an empty
    matrix. The outputs are gathered back by their rank in that list and the K of a token are added up: a
    ``ScatterND`` that adds would be one op less, but on more than one thread ONNX Runtime loses additions to it.
    """
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type == "MoE"]:
        editor.at = node
        whole, bias = _with_output_bias(node.outputs[0])
        replace(whole, _sorted_experts(editor, node, activation, bias))
    finish(model)


def _with_output_bias(y_TD: ir.Value) -> tuple[ir.Value, np.ndarray | None]:
    """The value after the output bias that follows a MoE node, and that bias; the node's own where none does."""
    add = only_use(y_TD)
    if add is not None and add.op_type == "Add":
        for bias in add.inputs:
            array = constant_of(bias)
            if array is not None and array.ndim == 1:
                return add.outputs[0], array
    return y_TD, None


def _sorted_experts(editor: Editor, moe: ir.Node, activation: Activation, b_out_D: np.ndarray | None) -> ir.Value:
    x_TD, logits_TE, fc1, fc1_bias, fc2 = moe.inputs[:5]
    w_in_EMD, w_out_EDM = constant_of(fc1), constant_of(fc2)
    b_in_EM = constant_of(fc1_bias)
    assert w_in_EMD is not None and w_out_EDM is not None
    E, K = len(w_in_EMD), moe.attributes["k"].as_int()
    scores_TE, chosen_TK = _routing(logits_TE)
    layer = (fc1.name or "").removesuffix(".fc1")
    axis_1 = editor.constant("axis_1", np.array([1]))

    # Which expert takes which token: true at the choice.
    nothing_TE = editor.node("ConstantOfShape", editor.node("Shape", scores_TE), value=ir.tensor([False]))
    yes_TK = editor.node("ConstantOfShape", editor.node("Shape", chosen_TK), value=ir.tensor([True]))
    mask_ET = editor.node(
        "Transpose", editor.node("ScatterElements", nothing_TE, chosen_TK, yes_TK, axis=1), perm=[1, 0]
    )
    # The tokens of all experts in a row, and how many each has.
    _, token_R = editor.nodes("Split", [editor.node("NonZero", mask_ET)], outputs=2, axis=0, num_outputs=2)
    token_R = editor.node("Reshape", token_R, editor.constant("fill_axis", np.array([-1])))
    taken_ET = editor.node("Cast", mask_ET, to=ir.DataType.INT64)
    count_E = editor.node("ReduceSum", taken_ET, axis_1, keepdims=0)
    tokens = editor.nodes("Split", [token_R, count_E], outputs=E, axis=0) if E > 1 else [token_R]

    # Each of a token's K experts adds its share of the output bias, inside its Gemm: no pass of its own.
    b_share_D = [] if b_out_D is None else [editor.constant(f"{layer}.b_share", b_out_D / np.float32(K))]
    outputs = []
    for expert in range(E):
        name = f"{layer}.experts.{expert}"
        x_nD = editor.node("Gather", x_TD, tokens[expert], axis=0)
        w_in_DM = editor.constant(f"{name}.in.weight", w_in_EMD[expert].T)
        b_in_M = [] if b_in_EM is None else [editor.constant(f"{name}.in.bias", b_in_EM[expert])]
        h_nM = _activate(editor, editor.node("Gemm", x_nD, w_in_DM, *b_in_M, name=f"{name}.in"), activation)
        # The op's unit weights are 1/K, and K is folded into fc2: here the weights are 1.
        w_out_MD = editor.constant(f"{name}.out.weight", w_out_EDM[expert].T / np.float32(K))
        outputs.append(editor.node("Gemm", h_nM, w_out_MD, *b_share_D, name=f"{name}.out"))
    y_RD = editor.node("Concat", *outputs, axis=0) if E > 1 else outputs[0]

    # Rank of each (expert, token) in the row: how many choices come before it.
    before_ET = editor.node(
        "Reshape",
        editor.node(
            "CumSum",
            editor.node("Reshape", taken_ET, editor.constant("fill_axis", np.array([-1]))),
            editor.constant("axis_0_scalar", np.array(0)),
            exclusive=1,
        ),
        editor.node("Shape", mask_ET),
    )
    rank_TK = editor.node("GatherElements", editor.node("Transpose", before_ET, perm=[1, 0]), chosen_TK, axis=1)
    y_TKD = editor.node("Gather", y_RD, rank_TK, axis=0)
    return editor.node("ReduceSum", y_TKD, axis_1, keepdims=0)


def _routing(logits_TE: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The router's scores [T, E] and choice [T, K] from which the canonical graph made its masked logits."""
    scatter = logits_TE.producer()
    chosen_TK = scatter.inputs[1] if scatter is not None and scatter.op_type == "ScatterElements" else None
    top_k = chosen_TK.producer() if chosen_TK is not None else None
    assert top_k is not None and top_k.op_type == "TopK", "not a MoE node of a canonical graph"
    return top_k.inputs[0], chosen_TK


def _activate(editor: Editor, h: ir.Value, activation: Activation) -> ir.Value:
    if activation == "gelu":
        return editor.node("Gelu", h)
    if activation == "gelu_tanh":
        return editor.node("Gelu", h, approximate="tanh")
    if activation == "relu":
        return editor.node("Relu", h)
    return editor.node("Mul", h, editor.node("Sigmoid", h))


# --- int8 -----------------------------------------------------------------------------------------------------------


def quantize(model: ir.Model) -> None:
    """Linear maps in int8: weights now, per output channel; activations as they run, per tensor.

    The form is that of ONNX Runtime's ``quantize_dynamic``, whose kernels it is fused into when a session is
    created: unsigned activations and signed symmetric weights, the pair that AMX and VNNI multiply. (Unsigned
    weights are 4x slower there; on a CPU with neither, signed ones may saturate: the plan's quality is measured.)
    Besides, what several maps read is quantised once, and before it is gathered by expert. The router stays in
    float32: a token sent to another expert costs more than the router does.
    """
    editor = Editor(model)
    quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node in [node for node in model.graph if node.op_type == "Gemm"]:
        weight = constant_of(node.inputs[1])
        if weight is None or any(user.op_type == "TopK" for user, _ in node.outputs[0].uses()):
            continue
        editor.at = node
        x, index = node.inputs[0], None
        gather = x.producer()
        if gather is not None and gather.op_type == "Gather":
            x, index = gather.inputs
        if x not in quantized:
            if index is not None:
                editor.at = gather
            quantized[x] = tuple(editor.nodes("DynamicQuantizeLinear", [x], outputs=3))
            editor.at = node
        q_x, scale_x, zero_x = quantized[x]
        if index is not None:
            q_x = editor.node("Gather", q_x, index, axis=0)
        name = (node.inputs[1].name or "").removesuffix(".weight")
        scale_N = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / np.float32(127)
        q_weight = editor.constant(f"{name}.int8", np.rint(weight / scale_N).astype(np.int8))
        scale = editor.node("Mul", scale_x, editor.constant(f"{name}.scale", scale_N.astype(np.float32)))
        y = editor.node("Cast", editor.node("MatMulInteger", q_x, q_weight, zero_x), to=ir.DataType.FLOAT)
        y = editor.node("Mul", y, scale)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            y = editor.node("Add", y, node.inputs[2])
        replace(node.outputs[0], y)
    finish(model)
