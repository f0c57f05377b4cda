"""The canonical ONNX graph of an encoder, and its parity with PyTorch.

Every plan (`ffn2moe.onnx_plans`) comes from this graph, so that attention, norms and embeddings are the same in
all of them and a comparison of plans compares FFNs only. What the exporter gives is rewritten in three ways:

- a layer that holds a mixture becomes one `com.microsoft.MoE` node. Its logits are 0 at the chosen experts and
  -1e4 elsewhere, so the op's softmax gives each of the K experts 1/K; K and the layer's scale are folded into the
  output matrix and the output bias stays outside. Fed this way, every revision of the op computes the same.
- hidden states are [T, D] instead of [B, L, D] between attentions, so that each linear map is one `Gemm` with its
  bias inside and a mixture needs no reshaping.
- attention is the standard `Attention` op on [B, L, D], without transposes around it.

The file depends on the weights alone: no paths, stack traces, times or names that count across runs.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
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
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.dense import family_of
from ffn2moe.metrics import pool
from ffn2moe.moe import MoEFFN, moe_layers
from ffn2moe.spec import Pooling

OPSET = 23  # the first with a standard Attention op
MICROSOFT = "com.microsoft"
MASKED_LOGIT = -1e4  # of an expert that is not chosen: its softmax is 0 in float32, and nothing is infinite
BATCH, SEQUENCE = "batch", "sequence"
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
# Activations of the MoE op (its `gelu` is the tanh form on the CPU), keyed by ours.
_MOE_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}


# --- out of PyTorch -------------------------------------------------------------------------------------------------


class _ExportedMoE(nn.Module):
    """Stands in for a `MoEFFN` while the exporter traces: the same function as a routing and one MoE op."""

    def __init__(self, moe: MoEFFN) -> None:
        super().__init__()
        if moe.w_gate is not None:
            raise ValueError("a gated FFN cannot be exported yet: the export takes encoders with a plain FFN")
        K = moe.num_active
        self.num_active = K
        self.op_activation = _MOE_ACTIVATIONS[moe.activation]
        with torch.no_grad():
            self.router_weight = nn.Parameter(moe.router.weight.clone())
            self.router_bias = nn.Parameter(moe.router.bias + moe.router.balance_bias)
            self.fc1 = nn.Parameter(moe.w_in.clone())
            self.fc1_bias = None if moe.b_in is None else nn.Parameter(moe.b_in.clone())
            # Unit weights: the op weighs each chosen expert by 1/K.
            self.fc2 = nn.Parameter(moe.w_out * (moe.output_scale * K))
            self.b_out = None if moe.b_out is None else nn.Parameter(moe.b_out.clone())

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        scores_TE = F.linear(x_TD, self.router_weight, self.router_bias)
        chosen_TK = scores_TE.topk(self.num_active, dim=-1).indices
        logits_TE = torch.full_like(scores_TE, MASKED_LOGIT).scatter(1, chosen_TK, 0.0)
        y_TD = torch.onnx.ops.symbolic(
            f"{MICROSOFT}::MoE",
            (x_TD, logits_TE, self.fc1, self.fc1_bias, self.fc2),
            {"k": self.num_active, "activation_type": self.op_activation, "normalize_routing_weights": 1},
            dtype=x_TD.dtype,
            shape=x_TD.shape,
            version=1,
        )
        if self.b_out is not None:
            y_TD = y_TD + self.b_out
        return y_TD.reshape(x.shape)


class _SentenceEncoder(nn.Module):
    """What is exported: token ids and their mask in, hidden states and unit embeddings out."""

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        # Models on the attention interface take a ready mask as it is; building it here saves a score of nodes.
        self.ready_mask = model.config._attn_implementation == "sdpa"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = attention_mask
        if self.ready_mask:
            B, L = attention_mask.shape
            mask = attention_mask.to(torch.bool)[:, None, None, :].expand(B, 1, L, L)
        hidden_BLD = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden_BLD, pool(hidden_BLD, attention_mask, self.pooling)


@contextmanager
def _exportable(model: nn.Module) -> Iterator[None]:
    """Replaces the mixtures of `model` by what the exporter understands, and puts them back."""
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}
    try:
        for name, moe in mixtures.items():
            model.set_submodule(name, _ExportedMoE(moe))
        yield
    finally:
        for name, moe in mixtures.items():
            model.set_submodule(name, moe)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on optional packages and on its own deprecations; none of it is for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def canonical_graph(model: nn.Module, pooling: Pooling) -> ir.Model:
    """The graph of an encoder, dense or factorised, as described at the top of this file.

    Inputs `input_ids` and `attention_mask`, int64 [B, L], any B and L from 1 up to what the model's positions
    allow; outputs `last_hidden_state` [B, L, D] and `sentence_embedding` [B, D] of unit length, float32.
    Raises ValueError for a model that makes no embeddings.
    """
    family = family_of(model)
    if "embedding" not in family.heads:
        raise ValueError(
            f"{family.name} is a causal model: the export makes sentence embeddings and takes encoders only"
        )
    was_training = model.training
    wrapped = _SentenceEncoder(model.eval(), pooling)
    example = torch.full((2, 7), 1, dtype=torch.int64)
    axes = {0: BATCH, 1: SEQUENCE}
    try:
        with _exportable(model), _quiet(), torch.no_grad():
            program = torch.onnx.export(
                wrapped,
                (example, torch.ones_like(example)),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_shapes={name: axes for name in INPUTS},
                verbose=False,
            )
    finally:
        model.train(was_training)
    graph = program.model
    for rewrite in (_attention_without_transposes, _flatten_tokens, _linear_maps_as_gemm):
        rewrite(graph)
        RemoveUnusedNodesPass()(graph)  # what a rewrite leaves behind would still count as a use
    finish(graph)
    return graph


# --- editing a graph ------------------------------------------------------------------------------------------------


class Editor:
    """Adds nodes and constants to a graph; what is left without a use goes in `finish`."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.at: ir.Node | None = None  # new nodes come before this one; at the end when None

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer of that name; asked for twice, it is the same one."""
        if name not in self.graph.initializers:
            value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def nodes(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        *,
        outputs: int = 1,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Adds one node and gives its outputs."""
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        if self.at is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.at, node)
        return node.outputs

    def node(
        self, op: str, *inputs: ir.Value | None, domain: str = "", name: str | None = None, **attributes: Any
    ) -> ir.Value:
        """Adds one node with one output and gives that."""
        return self.nodes(op, inputs, domain=domain, name=name, **attributes)[0]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant value, else None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def replace(old: ir.Value, new: ir.Value) -> None:
    """Every use of `old`, as an input of a node or an output of the graph, becomes one of `new`."""
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def only_use(value: ir.Value) -> ir.Node | None:
    """The one node that uses the value; None if there are more or fewer, or if the graph gives it out."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _produced_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def finish(model: ir.Model) -> None:
    """Drops what has no use and makes the bytes depend on the computation alone."""
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
    model.graph.name = "encoder"
    _name(graph)


def _name(graph: ir.Graph) -> None:
    """Names by content where a parameter gives one, else by position."""
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
    for value, name in zip(graph.outputs, OUTPUTS, strict=True):
        value.name = name
    taken.clear()
    for position, node in enumerate(graph):
        if not node.name or node.name.startswith("node_") or node.name in taken:
            node.name = f"{node.op_type}_{position}"
        taken.add(node.name)
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"t{position}" if len(node.outputs) == 1 else f"t{position}_{index}"


# --- rewriting what the exporter gives ------------------------------------------------------------------------------


def _attention_without_transposes(model: ir.Model) -> None:
    """Attention on heads [B, H, L, d], with transposes around it, becomes the same op on [B, L, D].

    The op splits heads itself when it is told their number; one copy fewer of each of its four tensors.
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
    """x [B, L, D] of ``x.view(B, L, H, d).transpose(1, 2)``."""
    transpose = _produced_by(heads_BHLd, "Transpose")
    reshape = _produced_by(transpose.inputs[0], "Reshape") if transpose and _swaps_heads(transpose) else None
    return reshape.inputs[0] if reshape is not None and _is_hidden(reshape.inputs[0]) else None


def _after_head_merge(heads_BHLd: ir.Value) -> ir.Value | None:
    """y [B, L, D] of ``heads.transpose(1, 2).reshape(B, L, D)``."""
    transpose = only_use(heads_BHLd)
    if transpose is None or transpose.op_type != "Transpose" or not _swaps_heads(transpose):
        return None
    reshape = only_use(transpose.outputs[0])
    if reshape is None or reshape.op_type != "Reshape" or not _is_hidden(reshape.outputs[0]):
        return None
    return reshape.outputs[0]


def _swaps_heads(transpose: ir.Node) -> bool:
    return list(transpose.attributes["perm"].value) == [0, 2, 1, 3]


# Ops that act on each number or on the last axis, and so do not care how tokens are laid out.
_TOKEN_WISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "LayerNormalization", "MatMul")
)


def _flatten_tokens(model: ir.Model) -> None:
    """Hidden states [B, L, n] become [T, n] wherever tokens do not see each other."""
    graph = model.graph
    editor = Editor(model)
    editor.at = graph[0]
    hidden_shape = editor.node(
        "Concat", editor.node("Shape", graph.inputs[0]), editor.constant("fill_axis", np.array([-1])), axis=0
    )
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
            replace(out, editor.node("Reshape", out_Tn, hidden_shape))


def _as_tokens(editor: Editor, hidden: ir.Value) -> ir.Value:
    """The value [B, L, n] as [T, n]: where it came from, if it was that before."""
    width = hidden.shape[2]
    reshape = _produced_by(hidden, "Reshape")
    if reshape is not None and _is_tokens(reshape.inputs[0], width):
        return reshape.inputs[0]
    tokens = editor.node("Reshape", hidden, editor.constant(f"tokens_of_{width}", np.array([-1, width])))
    tokens.shape, tokens.type = ir.Shape(["tokens", width]), hidden.type
    return tokens


def _is_hidden(value: ir.Value | None) -> bool:
    """Whether the value is [B, L, n] for a fixed n."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) != 3:
        return False
    return shape[0] == BATCH and shape[1] == SEQUENCE and isinstance(shape[2], int)


def _is_tokens(value: ir.Value, width: int) -> bool:
    """Whether the value is [anything, width]."""
    return value.shape is not None and len(value.shape) == 2 and value.shape[1] == width


def _is_token_wise(node: ir.Node) -> bool:
    if node.op_type not in _TOKEN_WISE or not _is_hidden(node.outputs[0]):
        return False
    if node.op_type == "LayerNormalization":
        axis = node.attributes.get("axis")
        return _is_hidden(node.inputs[0]) and (axis is None or axis.value in (-1, 2))
    if node.op_type == "MatMul":
        weight = constant_of(node.inputs[1])
        return _is_hidden(node.inputs[0]) and weight is not None and weight.ndim == 2
    constants = [constant_of(value) for value in node.inputs]
    return all(
        _is_hidden(value) if constant is None else constant.ndim <= 1
        for value, constant in zip(node.inputs, constants, strict=True)
    )


def _linear_maps_as_gemm(model: ir.Model) -> None:
    """``x @ W + b`` on tokens becomes one Gemm: the bias costs no pass over memory of its own."""
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type == "Add"]:
        for product, bias in (node.inputs, reversed(node.inputs)):
            multiply = _produced_by(product, "MatMul")
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


def save_graph(model: ir.Model, path: str | Path) -> str:
    """Writes the graph with its weights inside and gives the sha256 of the file."""
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    Path(path).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


# --- parity with PyTorch --------------------------------------------------------------------------------------------

# A graph as a function: token ids and mask [B, L] in, hidden states [B, L, D] and embeddings [B, D] out.
Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# Two experts closer than this share of the layer's typical score may swap by rounding alone.
NEAR_TIE = 1e-5


@dataclass(frozen=True)
class Reference:
    """What PyTorch makes of one batch, and how sure its routing is of each text."""

    ids_BL: np.ndarray
    mask_BL: np.ndarray
    hidden_BLD: np.ndarray
    embedding_BD: np.ndarray
    margin_B: np.ndarray  # smallest lead of a chosen expert over the next, as a share of the layer's typical score
    choices: tuple[np.ndarray, ...]  # of each layer, as indicators [B, L, E], false at padding


@torch.no_grad()
def reference(
    model: nn.Module,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    pooling: Pooling,
    *,
    tanh: bool = False,
) -> list[Reference]:
    """PyTorch's outputs for batches of token ids and masks [B, L]; with `tanh`, experts use GELU's tanh form."""
    model.eval()
    mixtures = moe_layers(model)
    before = [(moe.observer, moe.activation) for moe in mixtures]
    seen: list[tuple[Tensor, Tensor, int]] = []
    for moe in mixtures:
        moe.observer = lambda scores_TE, chosen_TK, moe=moe: seen.append(
            (scores_TE + moe.router.balance_bias, chosen_TK, moe.num_experts)
        )
        if tanh and moe.activation == "gelu":
            moe.activation = "gelu_tanh"
    try:
        found = []
        for ids_BL, mask_BL in batches:
            seen.clear()
            ids, mask = torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)
            hidden_BLD = model(input_ids=ids, attention_mask=mask).last_hidden_state
            padding_BL = mask == 0
            margin_B = torch.full((len(ids),), torch.inf)
            choices = []
            for scores_TE, chosen_TK, experts in seen:
                scores_BLE = scores_TE.reshape(*mask.shape, experts)
                indicator = torch.zeros_like(scores_BLE, dtype=torch.bool)
                indicator.scatter_(-1, chosen_TK.reshape(*mask.shape, -1), True)
                choices.append((indicator & ~padding_BL.unsqueeze(-1)).numpy())
                if chosen_TK.shape[-1] < experts:
                    worst = scores_BLE.masked_fill(~indicator, torch.inf).amin(-1)
                    next_best = scores_BLE.masked_fill(indicator, -torch.inf).amax(-1)
                    lead_BL = (worst - next_best) / scores_BLE.abs().mean().clamp(min=1e-30)
                    margin_B = margin_B.minimum(lead_BL.masked_fill(padding_BL, torch.inf).amin(1))
            embedding_BD = pool(hidden_BLD, mask, pooling)
            found.append(
                Reference(ids_BL, mask_BL, hidden_BLD.numpy(), embedding_BD.numpy(), margin_B.numpy(), tuple(choices))
            )
        return found
    finally:
        for moe, (observer, activation) in zip(mixtures, before, strict=True):
            moe.observer, moe.activation = observer, activation


@dataclass(frozen=True)
class Parity:
    """How far a graph is from PyTorch: largest absolute differences over the texts compared."""

    hidden_max_abs: float
    embedding_max_abs: float
    texts: int
    near_ties: int  # texts left out, as their routing is decided by less than rounding, or not among `only`

    @property
    def max_abs(self) -> float:
        return max(self.hidden_max_abs, self.embedding_max_abs)


def parity(run: Run, references: Sequence[Reference], only: Sequence[np.ndarray] | None = None) -> Parity:
    """Compares a graph with PyTorch on every text whose routing is no near tie, padding left out.

    `only` names the texts [B] of each batch to compare, where others are known to differ.

    A near tie is a true discontinuity of the mixture: the last bit of a score sends a token to another expert.
    ValueError if the routing of every text is one: then nothing can be compared.
    """
    hidden = embedding = 0.0
    texts = near_ties = 0
    for index, known in enumerate(references):
        hidden_BLD, embedding_BD = run(known.ids_BL, known.mask_BL)
        sure_B = known.margin_B > NEAR_TIE
        if only is not None:
            sure_B &= only[index]
        texts += int(sure_B.sum())
        near_ties += int((~sure_B).sum())
        compared_BL = sure_B[:, None] & (known.mask_BL != 0)
        hidden = _largest(hidden, np.abs(hidden_BLD - known.hidden_BLD)[compared_BL])
        embedding = _largest(embedding, np.abs(embedding_BD - known.embedding_BD)[sure_B])
    if texts == 0 and only is None:
        raise ValueError(
            "the router scores the experts alike for every text, so its choice is arbitrary and no graph can be "
            "compared with PyTorch: train the router first"
        )
    return Parity(hidden, embedding, texts, near_ties)


def _largest(before: float, differences: np.ndarray) -> float:
    """The larger of the two; NaN, once seen, stays."""
    return float(np.maximum(before, differences.max())) if differences.size else before


def same_choices(first: Sequence[Reference], second: Sequence[Reference]) -> list[np.ndarray]:
    """For each batch, the texts [B] all of whose tokens go to the same experts in both."""
    return [
        np.all([(a == b).all(axis=(1, 2)) for a, b in zip(one.choices, other.choices, strict=True)], axis=0)
        if one.choices
        else np.ones(len(one.ids_BL), dtype=bool)
        for one, other in zip(first, second, strict=True)
    ]
