"""Plans: the ways to execute one export, each a rewriting of the canonical graph.

| plan | what it is |
|---|---|
| `fused` | one `com.microsoft.MoE` node a layer |
| `qmoe8`, `qmoe4` | one `com.microsoft.QMoE` node a layer, other linear maps are `MatMulNBits`: 8 or 4 bits a weight |
| `sorted` | standard ops only: tokens sorted by expert, and each expert a `Gemm`, an activation and a `Gemm` |
| `sorted8` | `sorted` with its linear maps in int8, quantised as they run |
| `dense` | the teacher: what a user would deploy without this package |
| `dense8` | `dense` in int8, in the same way as `sorted8` |
| `dense4` | `dense` with every linear map a `MatMulNBits` of 4 bits |
| `ov-dense`, `ov-sorted` | the graphs of `dense` and `sorted` in OpenVINO: bfloat16 where the CPU has it |
| `ov-dense8` | `dense` with weights of 8 bits in OpenVINO, which multiplies them in what `ov-dense` multiplies in |
| `ov-native` | one `ffn2moe.RoutedExperts` node a layer in OpenVINO (`ffn2moe.runtime.native`, to be built): bfloat16 |
| `ov-native8` | the same with experts of 8 bits a weight and activations of 16 |
| `ov-native8a8`, `ov-native4` | of 8 or 4 bits a weight, and activations of 8, one scale a token |

Where each token has a number of experts of its own (selections `threshold` and `prefix`), `sorted` and `sorted8`
and the native plans compute what is used; the operators of `fused`, `qmoe8` and `qmoe4` run a fixed number, and are
refused. Another budget
of an elastic mixture is a plan of its own, `sorted-k1`, and so are layers that stay dense, `sorted-d0-2`: the same
rewriting of another canonical graph (`ffn2moe.moe.variants`). A layer of which every token runs every expert, with unit
gates, is a dense FFN in all plans but `fused`.

Which is fastest depends on the machine and on batch x sequence, so it is measured (`tasks.benchmark`), not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ffn2moe.onnx.editor import Editor, constant_of, only_use, replace
from ffn2moe.onnx.graph import DOMAIN, MIXTURE, PARTS
from ffn2moe.onnx.simplify import finish
from ffn2moe.runtime import native
from ffn2moe.runtime.plans import INT8_PLANS, MASKED_LOGIT, MICROSOFT, NATIVE_PLANS, Plan
from ffn2moe.runtime.quantise import BLOCK, quantize_blocks, swiglu_rows
from ffn2moe.runtime.selftest import MOE_ACTIVATIONS
from ffn2moe.spec import Activation, Gate, Selection

_BITS: dict[str, int] = {"qmoe8": 8, "qmoe4": 4, "dense4": 4}
SMALL_PLANS: tuple[str, ...] = ("ov-dense8", *NATIVE_PLANS)  # of few bits a weight, so that what is wide weighs most
HALVED_FROM = 4096  # numbers in a matrix


class PlanRefused(ValueError):
    """A plan that cannot hold this model, with the reason."""


def lower(canonical: ir.Model, plan: Plan) -> ir.Model:
    """The graph of one plan, from the canonical graph of the mixture (of the teacher, for the dense plans).

    Raises PlanRefused, a ValueError, where no operator of that plan computes what the model needs.
    """
    graph = canonical.clone()
    mixtures = [Mixture.of(node) for node in graph.graph if node.domain == DOMAIN]
    if plan in _BITS or plan == "fused":
        for mixture in mixtures:
            if plan == "fused" or not mixture.is_dense:
                _require_op(plan, mixture)
    editor = Editor(graph)
    for mixture in mixtures:
        editor.at = mixture.node
        if mixture.is_dense and plan != "fused":
            y_TD = _every_expert(editor, mixture)
        elif plan == "fused":
            y_TD = _fused(editor, mixture)
        elif plan in _BITS:
            y_TD = _quantized_experts(editor, mixture, _BITS[plan])
        elif plan in NATIVE_PLANS and mixture.selection == "topk" and mixture.route_BD is None:
            _routed_experts(editor, mixture, *NATIVE_PLANS[plan])
            continue
        elif plan in NATIVE_PLANS:
            y_TD = _native_experts(editor, mixture, *NATIVE_PLANS[plan])
        elif mixture.selection == "topk":
            y_TD = _sorted_experts(editor, mixture)
        else:
            y_TD = _used_experts(editor, mixture)
        replace(mixture.node.outputs[0], y_TD)
    if plan in NATIVE_PLANS:
        _bfloat16_between_layers(graph)
    if plan in INT8_PLANS:
        quantize(graph)
    elif plan in _BITS:
        quantize_weights(graph, _BITS[plan])
    elif plan == "ov-dense8":
        compress_weights(graph)
    if plan in SMALL_PLANS:
        halve_weights(graph, {mixture.router for mixture in mixtures})
    if any(node.domain == MICROSOFT for node in graph.graph):
        graph.graph.opset_imports[MICROSOFT] = 1
    graph.graph.opset_imports[native.DOMAIN] = native.VERSION  # dropped below where it is not used
    finish(graph)
    return graph


@dataclass(frozen=True)
class Mixture:
    """A mixture node of a canonical graph, read."""

    node: ir.Node
    x_TD: ir.Value
    route_BD: ir.Value | None  # what the router reads of each text; None: it reads x, token by token
    name: str  # of the layer
    selection: Selection
    num_active: int  # K of `topk`, else the most that a token may use
    gate: Gate
    activation: Activation
    router: ir.Value
    router_bias: ir.Value
    choice_bias: ir.Value | None
    margin: ir.Value | None  # of `threshold`
    w_in_EMD: np.ndarray
    b_in_EM: np.ndarray | None
    w_gate_EMD: np.ndarray | None
    b_gate_EM: np.ndarray | None
    w_out_EDM: np.ndarray
    b_out_D: np.ndarray | None

    @classmethod
    def of(cls, node: ir.Node) -> Mixture:
        assert node.op_type == MIXTURE
        values = dict(zip(PARTS, node.inputs[2:], strict=False))
        w_in = values["w_in"]
        arrays = {name: constant_of(value) for name, value in values.items()}
        assert node.inputs[0] is not None and w_in is not None
        return cls(
            node=node,
            x_TD=node.inputs[0],
            route_BD=node.inputs[1],
            name=(w_in.name or "").removesuffix(".w_in"),
            selection=node.attributes["selection"].as_string(),
            num_active=node.attributes["num_active"].as_int(),
            gate=node.attributes["gate"].as_string(),
            activation=node.attributes["activation"].as_string(),
            router=values["router"],
            router_bias=values["router_bias"],
            choice_bias=values.get("choice_bias"),
            margin=values.get("margin"),
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
        """Whether every token runs every expert, and none is weighed: a dense FFN in pieces."""
        return self.selection == "topk" and self.num_active == self.num_experts and self.gate == "unit"


# --- routing --------------------------------------------------------------------------------------------------------


def _scores(editor: Editor, mixture: Mixture) -> ir.Value:
    """The router's scores [T, E]; where it reads a text as a whole, every token has those of its text."""
    name = f"{mixture.name}.router"
    if mixture.route_BD is None:
        return editor.node("Gemm", mixture.x_TD, mixture.router, mixture.router_bias, transB=1, name=name)
    scores_BE = editor.node("Gemm", mixture.route_BD, mixture.router, mixture.router_bias, transB=1, name=name)
    texts = editor.node("Shape", scores_BE, start=0, end=1)
    length = editor.node("Div", editor.node("Shape", mixture.x_TD, start=0, end=1), texts)
    experts = editor.constant(f"experts_{mixture.num_experts}", np.array([mixture.num_experts]))
    scores_BLE = editor.node(
        "Expand",
        editor.node("Unsqueeze", scores_BE, editor.constant("axis_1", np.array([1]))),
        editor.node("Concat", texts, length, experts, axis=0),
    )
    to_tokens = editor.constant(f"tokens_of_{mixture.num_experts}", np.array([-1, mixture.num_experts]))
    return editor.node("Reshape", scores_BLE, to_tokens)


def _ranked(editor: Editor, mixture: Mixture, scores_TE: ir.Value) -> ir.Value:
    """What experts are chosen by [T, E]: the scores, shifted."""
    if mixture.choice_bias is None:
        return scores_TE
    on_gates = mixture.gate == "sigmoid" and mixture.selection == "topk"
    ranked_TE = editor.node("Sigmoid", scores_TE) if on_gates else scores_TE
    return editor.node("Add", ranked_TE, mixture.choice_bias)


def _highest(editor: Editor, ranked_TE: ir.Value, count: int) -> Sequence[ir.Value]:
    """Values and places [T, K] of the K highest, in falling order."""
    return editor.nodes("TopK", [ranked_TE, editor.constant(f"choose_{count}", np.array([count]))], outputs=2, axis=-1)


def _route(editor: Editor, mixture: Mixture) -> tuple[ir.Value, ir.Value]:
    """The router's scores [T, E] and choice [T, K], of the selection `topk`."""
    scores_TE = _scores(editor, mixture)
    return scores_TE, _highest(editor, _ranked(editor, mixture, scores_TE), mixture.num_active)[1]


def _used(editor: Editor, mixture: Mixture, scores_TE: ir.Value) -> ir.Value:
    """Which experts a token uses, bool [T, E], of selections that give each token a number of its own."""
    ranked_TE = _ranked(editor, mixture, scores_TE)
    if mixture.selection == "prefix":
        last_T1 = editor.node("ArgMax", ranked_TE, axis=-1, keepdims=1)
        return editor.node("GreaterOrEqual", last_T1, editor.constant("numbers", np.arange(mixture.num_experts)[None]))
    E, most = mixture.num_experts, mixture.num_active
    if most == E:
        best_T1 = editor.node("ReduceMax", ranked_TE, editor.constant("axis_1", np.array([1])), keepdims=1)
        return editor.node("GreaterOrEqual", ranked_TE, editor.node("Sub", best_T1, mixture.margin))
    value_TK, chosen_TK = _highest(editor, ranked_TE, most)
    best_T1 = editor.node("Slice", value_TK, *(_index(editor, n) for n in (0, 1, 1)))
    near_TK = editor.node("GreaterOrEqual", value_TK, editor.node("Sub", best_T1, mixture.margin))
    nothing_TE = editor.node("ConstantOfShape", editor.node("Shape", scores_TE), value=ir.tensor([False]))
    return editor.node("ScatterElements", nothing_TE, chosen_TK, near_TK, axis=1)


def _gates(editor: Editor, mixture: Mixture, scores_TE: ir.Value, chosen_TK: ir.Value) -> ir.Value | None:
    """The weight of each chosen expert [T, K] (`ffn2moe.moe.router.gates`); None where it is 1."""
    if mixture.gate == "unit":
        return None
    if mixture.gate == "softmax":
        return editor.node("GatherElements", editor.node("Softmax", scores_TE, axis=-1), chosen_TK, axis=1)
    s_TK = editor.node("GatherElements", scores_TE, chosen_TK, axis=1)
    return editor.node("Softmax", s_TK, axis=-1) if mixture.gate == "softmax_topk" else editor.node("Sigmoid", s_TK)


def _gates_of_used(editor: Editor, mixture: Mixture, scores_TE: ir.Value, used_TE: ir.Value) -> ir.Value | None:
    """The weight of each expert [T, E], as far as it is used (`ffn2moe.moe.router.gates`); None where it is 1."""
    if mixture.gate == "unit":
        return None
    if mixture.gate == "sigmoid":
        return editor.node("Sigmoid", scores_TE)
    if mixture.gate == "softmax_topk":
        masked = editor.constant("masked_score", np.array(-np.inf, dtype=np.float32))
        scores_TE = editor.node("Where", used_TE, scores_TE, masked)
    return editor.node("Softmax", scores_TE, axis=-1)


def _masked_logits(editor: Editor, mixture: Mixture) -> tuple[ir.Value, ir.Value | None]:
    """Logits [T, E] of which a MoE op makes the gates of the chosen experts, up to their sum [T, 1].

    The op weighs by the softmax of the K highest, so that logarithms of the gates go in, and -1e4 elsewhere; the
    sum is None where it is 1, and the op's output is to be multiplied by it elsewhere. Fed this way, every
    revision of the op computes the same. Unit gates go in as 0: each becomes 1/K, and K belongs into the weights.
    """
    scores_TE, chosen_TK = _route(editor, mixture)
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
            gate_TK = _gates(editor, mixture, scores_TE, chosen_TK)
            sum_T1 = editor.node("ReduceSum", gate_TK, editor.constant("axis_1", np.array([1])), keepdims=1)
    masked_TE = editor.node(
        "ConstantOfShape",
        editor.node("Shape", scores_TE),
        value=ir.tensor(np.array([MASKED_LOGIT], dtype=np.float32)),
    )
    return editor.node("ScatterElements", masked_TE, chosen_TK, logits_TK, axis=1), sum_T1


# --- one operator a layer -------------------------------------------------------------------------------------------


def _require_op(plan: str, mixture: Mixture) -> None:
    op = "com.microsoft.MoE" if plan == "fused" else "com.microsoft.QMoE"
    if mixture.selection != "topk":
        raise PlanRefused(
            f"{plan}: {op} runs the same number of experts for every token, and the selection {mixture.selection!r} "
            "does not; the plan `sorted` computes only what is used"
        )
    if mixture.w_gate_EMD is not None and mixture.activation != "silu":
        raise PlanRefused(
            f"{plan}: {op} has no gated FFN with {mixture.activation}, only with silu; the plan `sorted` has one"
        )
    if mixture.activation not in MOE_ACTIVATIONS:
        raise PlanRefused(f"{plan}: {op} has no {mixture.activation}; the plan `sorted` has it")
    width = mixture.w_in_EMD.shape[2]
    if plan in _BITS and width % BLOCK:
        raise PlanRefused(f"{plan}: {op} wants a width that is a multiple of {BLOCK}, and this model's is {width}")


def _experts(mixture: Mixture) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None, np.ndarray]:
    """Attributes, fc1 [E, M or 2M, D], its bias and fc2 [E, D, M] of the MoE ops."""
    attributes: dict[str, Any] = {"k": mixture.num_active, "normalize_routing_weights": 1}
    # The op weighs each chosen expert of a unit gate by 1/K.
    w_out_EDM = mixture.w_out_EDM * np.float32(mixture.num_active if mixture.gate == "unit" else 1)
    if mixture.w_gate_EMD is None:
        attributes["activation_type"] = MOE_ACTIVATIONS[mixture.activation]
        return attributes, mixture.w_in_EMD, mixture.b_in_EM, w_out_EDM
    # act(gate) * up as `swiglu`, whose constants would be another model's if left alone.
    attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    b_gate, b_in = mixture.b_gate_EM, mixture.b_in_EM
    bias = None
    if b_gate is not None or b_in is not None:
        nothing = np.zeros(mixture.w_in_EMD.shape[:2], dtype=np.float32)
        bias = swiglu_rows(nothing if b_gate is None else b_gate, nothing if b_in is None else b_in)
    return attributes, swiglu_rows(mixture.w_gate_EMD, mixture.w_in_EMD), bias, w_out_EDM


def _weighed(editor: Editor, mixture: Mixture, y_TD: ir.Value, sum_T1: ir.Value | None) -> ir.Value:
    """What comes after the op: the sum of the gates, and the output bias."""
    if sum_T1 is not None:
        y_TD = editor.node("Mul", y_TD, sum_T1)
    if mixture.b_out_D is not None:
        y_TD = editor.node("Add", y_TD, editor.constant(f"{mixture.name}.b_out", mixture.b_out_D))
    return y_TD


def _fused(editor: Editor, mixture: Mixture) -> ir.Value:
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
    return _weighed(editor, mixture, y_TD, sum_T1)


def _quantized_experts(editor: Editor, mixture: Mixture, bits: int) -> ir.Value:
    """A QMoE node. Experts are made a multiple of the block wide, by neurons whose weights are 0."""
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
    return _weighed(editor, mixture, y_TD, sum_T1)


def _native_experts(
    editor: Editor, mixture: Mixture, weights: native.Weights, activations: native.Activations
) -> ir.Value:
    """An `Experts` node. Where tokens use numbers of their own, all are named, and those not used have gates of 0."""
    scores_TE = _scores(editor, mixture)
    if mixture.selection == "topk":
        chosen_TK = _highest(editor, _ranked(editor, mixture, scores_TE), mixture.num_active)[1]
        gate_TK = _gates(editor, mixture, scores_TE, chosen_TK)
        if gate_TK is None:
            one = ir.tensor(np.ones(1, dtype=np.float32))
            gate_TK = editor.node("ConstantOfShape", editor.node("Shape", chosen_TK), value=one)
    else:
        used_TE = _used(editor, mixture, scores_TE)
        gate_TK = editor.node("Cast", used_TE, to=ir.DataType.FLOAT)
        gate_TE = _gates_of_used(editor, mixture, scores_TE, used_TE)
        if gate_TE is not None:
            gate_TK = editor.node("Mul", gate_TE, gate_TK)
        numbers = editor.constant("numbers", np.arange(mixture.num_experts)[None])
        chosen_TK = editor.node("Expand", numbers, editor.node("Shape", scores_TE))
    _, M, D = mixture.w_in_EMD.shape
    y_TD = editor.node(
        native.OP_TYPE,
        mixture.x_TD,
        chosen_TK,
        gate_TK,
        _packed_experts(editor, mixture, weights),
        domain=native.DOMAIN,
        name=f"{mixture.name}.experts",
        **native.attributes(
            D,
            M,
            gated=mixture.w_gate_EMD is not None,
            activation=mixture.activation,
            weights=weights,
            activations=activations,
        ),
    )
    return _weighed(editor, mixture, y_TD, None)


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


def _routed_experts(editor: Editor, mixture: Mixture, weights: native.Weights, activations: native.Activations) -> None:
    """A `RoutedExperts` node in the place of the mixture and of what it does besides: norms and residuals around it."""
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
        native.ROUTED_OP_TYPE,
        frame.given_TD,
        _packed_experts(editor, mixture, weights),
        editor.constant(f"{mixture.name}.frame", numbers),
        *([] if frame.residual_TD is None else [frame.residual_TD]),
        domain=native.DOMAIN,
        name=f"{mixture.name}.experts",
        **native.attributes(
            D,
            M,
            gated=mixture.w_gate_EMD is not None,
            activation=mixture.activation,
            weights=weights,
            activations=activations,
        ),
        **native.routed_attributes(
            mixture.num_experts, mixture.num_active, mixture.gate, added=frame.added, output="f32", **norms
        ),
    )
    replace(frame.out_TD, y_TD)


def _bfloat16_between_layers(graph: ir.Model) -> None:
    """Routed layers whose output goes into products and the next layer's residual alone give it in bfloat16.

    Products take it so, and OpenVINO would convert it for them; the residual's sum and norm stay in float32.
    """
    editor = Editor(graph)
    RemoveUnusedNodesPass()(graph)  # what the layers have replaced would count as a use
    for node in [node for node in graph.graph if node.op_type == native.ROUTED_OP_TYPE]:
        y_TD = node.outputs[0]
        uses = list(y_TD.uses())
        products = [use for use in uses if use.node.op_type in ("Gemm", "MatMul") and use.idx == 0]
        residuals = [use for use in uses if use.node.op_type == native.ROUTED_OP_TYPE]
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
    """What stands around a mixture in the graph, as far as `RoutedExperts` does it."""

    given_TD: ir.Value
    residual_TD: ir.Value | None
    norm_in: native.Norm | None
    added: native.Added
    norm_out: native.Norm | None
    out_TD: ir.Value

    @classmethod
    def around(cls, node: ir.Node) -> Frame:
        """Norms and residuals go into the node where nothing else reads what lies between them and the experts."""
        x_TD, out_TD = node.inputs[0], node.outputs[0]
        assert x_TD is not None
        norm_in, sum_TD, sides = _norm(x_TD.producer()), None, None
        if norm_in is not None:
            sum_TD = x_TD.producer().inputs[0]
            sides = _two_rows(sum_TD.producer())
        readers: set[ir.Node] = {node}  # of x, that go into the node
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
    """A norm over the last axis of [T, D] whose scale and bias are constants."""
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
    """Both sides of an addition of two [T, D]."""
    if node is None or node.op_type != "Add" or any(constant_of(value) is not None for value in node.inputs):
        return None
    first, second = node.inputs
    width = _row_width(first)
    return (first, second) if width is not None and width == _row_width(second) else None


def _row_width(value: ir.Value | None) -> int | None:
    """D of a value [T, D]."""
    shape = None if value is None else value.shape
    return shape[1] if shape is not None and len(shape) == 2 and isinstance(shape[1], int) else None


def _read_by(value: ir.Value | None, readers: set[Any]) -> bool:
    """Whether nothing else reads the value."""
    return value is not None and not value.is_graph_output() and {use.node for use in value.uses()} <= readers


# --- sorted ---------------------------------------------------------------------------------------------------------


def _sorted_experts(editor: Editor, mixture: Mixture) -> ir.Value:
    """Standard ops that compute the chosen experts only.

    ``NonZero`` of the choice as [E, T x K] lists the pairs of a token and one of its choices: those of expert 0, then
    those of expert 1 and so on; each expert gathers its tokens. No padding and no sorting of T x K numbers; an expert
    without tokens multiplies an empty matrix. The outputs are gathered back by the place of their pair in that list,
    and the K of a token are added up: a ``ScatterND`` that adds would be one op less, but on more than one thread ONNX
    Runtime loses additions to it. (What else was tried, with figures: docs/decisions/0014.)
    """
    E, K = mixture.num_experts, mixture.num_active
    scores_TE, chosen_TK = _route(editor, mixture)
    axis_1 = editor.constant("axis_1", np.array([1]))
    experts = editor.constant(f"experts_{E}", np.array([E]))
    taken_EP = editor.node("OneHot", _flat(editor, chosen_TK), experts, editor.constant("no_yes", np.arange(2)), axis=0)
    pair_R = _tokens(editor, taken_EP)
    token_R = pair_R if K == 1 else editor.node("Div", pair_R, editor.constant(f"choices_{K}", np.array(K)))
    count_E = editor.node("ReduceSum", taken_EP, axis_1, keepdims=0)
    tokens = editor.nodes("Split", [token_R, count_E], outputs=E, axis=0) if E > 1 else [token_R]

    # Each of a token's K experts adds its share of the output bias, inside its Gemm: no pass of its own. Not where
    # gates would multiply the shares.
    b_share_D = None
    if mixture.b_out_D is not None and mixture.gate == "unit":
        b_share_D = editor.constant(f"{mixture.name}.b_share", mixture.b_out_D / np.float32(K))
    outputs = [
        _one_expert(editor, mixture, expert, editor.node("Gather", mixture.x_TD, tokens[expert], axis=0), b_share_D)
        for expert in range(E)
    ]
    y_RD = editor.node("Concat", *outputs, axis=0) if E > 1 else outputs[0]

    zero, one = (editor.constant(f"number_{number}", np.array(number)) for number in (0, 1))
    place_R = editor.node("Range", zero, editor.node("Size", pair_R), one)
    place_P = editor.node("ScatterElements", pair_R, pair_R, place_R, axis=0)
    gate_TK = _gates(editor, mixture, scores_TE, chosen_TK)
    if K == 1:
        y_TD = editor.node("Gather", y_RD, place_P, axis=0)
        return _weighed(editor, mixture, y_TD, gate_TK) if gate_TK is not None else y_TD
    place_TK = editor.node("Reshape", place_P, editor.constant(f"by_{K}", np.array([-1, K])))
    y_TKD = editor.node("Gather", y_RD, place_TK, axis=0)
    if gate_TK is None:
        return editor.node("ReduceSum", y_TKD, axis_1, keepdims=0)
    y_TKD = editor.node("Mul", y_TKD, editor.node("Unsqueeze", gate_TK, editor.constant("axis_2", np.array([2]))))
    return _weighed(editor, mixture, editor.node("ReduceSum", y_TKD, axis_1, keepdims=0), None)


def _tokens(editor: Editor, taken_ET: ir.Value) -> ir.Value:
    """The tokens (or pairs) that each expert takes, one expert after the other, as one row [R]."""
    return editor.node("Gather", editor.node("NonZero", taken_ET), editor.constant("number_1", np.array(1)), axis=0)


def _used_experts(editor: Editor, mixture: Mixture) -> ir.Value:
    """The same for selections that give each token a number of experts of its own: only used pairs are computed.

    As many rows for every token, to be gathered back, would be those of the token that uses most. So each expert adds
    its outputs to those of the tokens that it took, one expert after the other: within one ``ScatterND`` no token
    comes twice, and nothing is lost on several threads. The first block of a `prefix` takes every token as it is.
    """
    E = mixture.num_experts
    scores_TE = _scores(editor, mixture)
    used_TE = _used(editor, mixture, scores_TE)
    gate_TE = _gates_of_used(editor, mixture, scores_TE, used_TE)
    axis_1 = editor.constant("axis_1", np.array([1]))
    b_out_D = None if mixture.b_out_D is None else editor.constant(f"{mixture.name}.b_out", mixture.b_out_D)

    first = 1 if mixture.selection == "prefix" and gate_TE is None else 0
    if first:
        y_TD = _one_expert(editor, mixture, 0, mixture.x_TD, b_out_D)
    else:
        nothing = editor.node(
            "ConstantOfShape", editor.node("Shape", mixture.x_TD), value=ir.tensor(np.zeros(1, dtype=np.float32))
        )
        y_TD = nothing if b_out_D is None else editor.node("Add", nothing, b_out_D)
    if first == E:
        return y_TD

    used_ET = editor.node("Transpose", used_TE, perm=[1, 0])
    if first:
        used_ET = editor.node("Slice", used_ET, *(_index(editor, n) for n in (first, E, 0)))
    token_R = _tokens(editor, used_ET)
    count_E = editor.node("ReduceSum", editor.node("Cast", used_ET, to=ir.DataType.INT64), axis_1, keepdims=0)

    def by_expert(row: ir.Value) -> Sequence[ir.Value]:
        return editor.nodes("Split", [row, count_E], outputs=E - first, axis=0) if E - first > 1 else [row]

    tokens, places = by_expert(token_R), by_expert(editor.node("Unsqueeze", token_R, axis_1))
    gates: Sequence[ir.Value] = ()
    if gate_TE is not None:
        gate_R = editor.node("Compress", editor.node("Transpose", gate_TE, perm=[1, 0]), _flat(editor, used_ET))
        gates = by_expert(editor.node("Unsqueeze", gate_R, axis_1))
    for expert in range(first, E):
        x_nD = editor.node("Gather", mixture.x_TD, tokens[expert - first], axis=0)
        y_nD = _one_expert(editor, mixture, expert, x_nD, None)
        if gates:
            y_nD = editor.node("Mul", y_nD, gates[expert - first])
        y_TD = editor.node("ScatterND", y_TD, places[expert - first], y_nD, reduction="add")
    return y_TD


def _every_expert(editor: Editor, mixture: Mixture) -> ir.Value:
    """A layer that stays dense (K = E): its experts side by side are one FFN, and there is nothing to route.

    Not in `fused`, whose operator may have another form of GELU than the layers around it would have.
    """

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


def _index(editor: Editor, number: int) -> ir.Value:
    return editor.constant(f"index_{number}", np.array([number]))


def _flat(editor: Editor, value: ir.Value) -> ir.Value:
    return editor.node("Reshape", value, editor.constant("fill_axis", np.array([-1])))


def _one_expert(editor: Editor, mixture: Mixture, expert: int, x_nD: ir.Value, bias_D: ir.Value | None) -> ir.Value:
    """The output [n, D] of one expert for the tokens that it took, with a bias of the layer's, if any."""
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


def activate(editor: Editor, h: ir.Value, activation: Activation) -> ir.Value:
    """The activation of an FFN, in standard ops."""
    if activation == "gelu":
        return editor.node("Gelu", h)
    if activation == "gelu_tanh":
        return editor.node("Gelu", h, approximate="tanh")
    if activation == "relu":
        return editor.node("Relu", h)
    scaled = h
    if activation == "quick_gelu":
        scaled = editor.node("Mul", h, editor.constant("quick_gelu_slope", np.array(1.702, dtype=np.float32)))
    return editor.node("Mul", h, editor.node("Sigmoid", scaled))


# --- linear maps in fewer bits --------------------------------------------------------------------------------------


def _linear_maps(model: ir.Model) -> list[tuple[ir.Node, np.ndarray, Sequence[ir.Value | None]]]:
    """Every product with a constant matrix [in, out] but the routers, with that matrix and its bias, if any.

    Routers stay in float32: a token sent to another expert costs more than the router does.
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
        found.append((node, weight.T if attributes.get_int("transB", 0) else weight, node.inputs[2:]))
    return found


def quantize(model: ir.Model) -> None:
    """Linear maps in int8: weights now, per output channel; activations as they run, per tensor.

    The form is that of ONNX Runtime's ``quantize_dynamic``, whose kernels it is fused into when a session is
    created: unsigned activations and signed symmetric weights, the pair that AMX and VNNI multiply. (Unsigned
    weights are 4x slower there; on a CPU with neither, signed ones may saturate: the plan's quality is measured.)
    Besides, what several maps read is quantised once, and before it is gathered by expert.
    """
    editor = Editor(model)
    quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node, weight, bias in _linear_maps(model):
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
        name = (node.inputs[1].name or "").removesuffix(".weight")
        scale_N = np.maximum(np.abs(weight).max(axis=0) / np.float32(127), np.finfo(np.float32).tiny)
        q_weight = editor.constant(f"{name}.int8", np.rint(weight / scale_N).astype(np.int8))
        scale = editor.node("Mul", scale_x, editor.constant(f"{name}.scale", scale_N.astype(np.float32)))
        y = editor.node("Cast", editor.node("MatMulInteger", q_x, q_weight, zero_x), to=ir.DataType.FLOAT)
        y = editor.node("Mul", y, scale)
        if bias and bias[0] is not None:
            y = editor.node("Add", y, bias[0])
        replace(node.outputs[0], y)


def _gathers_tokens(node: ir.Node) -> bool:
    """Whether the node picks rows of activations, as experts do of their tokens."""
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 and constant_of(node.inputs[0]) is None


def compress_weights(model: ir.Model) -> None:
    """Weights of linear maps as signed bytes with a scale for each output: standard ONNX, activations as they are.

    OpenVINO keeps them so in memory, and widens them as it multiplies.
    """
    editor = Editor(model)
    for node, weight, bias in _linear_maps(model):
        editor.at = node
        name = (node.inputs[1].name or "").removesuffix(".weight")
        scale_N = np.maximum(np.abs(weight).max(axis=0) / np.float32(127), np.finfo(np.float32).tiny)
        steps = editor.constant(f"{name}.int8", np.rint(weight / scale_N).astype(np.int8))
        scales = editor.constant(f"{name}.scale", scale_N.astype(np.float32))
        widened = editor.node("DequantizeLinear", steps, scales, axis=1)
        y = editor.node("MatMul", node.inputs[0], widened)
        if bias and bias[0] is not None:
            y = editor.node("Add", y, bias[0])
        replace(node.outputs[0], y)


def halve_weights(model: ir.Model, kept: Container[ir.Value | None]) -> None:
    """Large float32 matrices but for those in `kept` as float16, widened where they are used: half the bytes.

    What is left of a plan in few bits is mostly its table of embeddings. A number of them is rounded to 11 bits, where
    bfloat16, which the plan computes in, has 8; matrices with numbers beyond float16 stay as they are.
    """
    editor = Editor(model)
    editor.at = next(iter(model.graph), None)
    for value in list(model.graph.initializers.values()):
        weight = constant_of(value)
        if value in kept or weight is None or weight.dtype != np.float32:
            continue
        if weight.ndim < 2 or weight.size < HALVED_FROM:
            continue
        if not np.abs(weight).max() <= np.finfo(np.float16).max:
            continue
        half = editor.constant(f"{value.name}.half", weight.astype(np.float16))
        value.replace_all_uses_with(editor.node("Cast", half, to=ir.DataType.FLOAT))


def quantize_weights(model: ir.Model, bits: int) -> None:
    """Linear maps with weights of 8 or 4 bits in blocks; activations stay as they are until the kernel.

    Fewer bytes are read for each token, which is what decoding waits for. The last map, onto the vocabulary, keeps
    8 bits: its errors go straight into the logits.
    """
    editor = Editor(model)
    vocabulary = [
        value.shape[-1] for value in model.graph.outputs if value.name == "logits" and value.shape is not None
    ]
    for node, weight, bias in _linear_maps(model):
        editor.at = node
        kept = 8 if weight.shape[1] in vocabulary else bits
        packed, scales = quantize_blocks(weight.T, kept)
        name = (node.inputs[1].name or "").removesuffix(".weight")
        K, N = weight.shape
        has_bias = bool(bias) and bias[0] is not None
        y = editor.node(
            "MatMulNBits",
            node.inputs[0],
            editor.constant(f"{name}.int{kept}", packed.reshape(N, -1, BLOCK * kept // 8)),
            editor.constant(f"{name}.scales", scales.reshape(-1)),
            *((None, None, bias[0]) if has_bias else ()),
            domain=MICROSOFT,
            K=K,
            N=N,
            bits=kept,
            block_size=BLOCK,
            accuracy_level=4,
        )
        replace(node.outputs[0], y)
