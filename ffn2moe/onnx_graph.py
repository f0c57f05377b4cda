"""The canonical ONNX graph of an encoder, and the tools that make and change graphs.

Every plan (`ffn2moe.onnx_plans`) comes from this graph, so that attention, norms and embeddings are the same in
all of them and a comparison of plans compares FFNs only. (`ffn2moe.onnx_decoder` makes those of the other models in
the same way.) What the exporter gives is rewritten in three ways:

- a layer that holds a mixture is one node `ffn2moe.Mixture` (`MIXTURE`) with router, experts and output bias, the
  layer's scale folded into the output matrices. No runtime knows this op: a plan says how it is computed.
- hidden states are [T, D] instead of [B, L, D] between attentions, so that each linear map is one `Gemm` with its
  bias inside and a mixture needs no reshaping.
- attention is the standard `Attention` op on [B, L, D], without transposes around it.

The file depends on the weights alone: no paths, stack traces, times or names that count across runs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from ffn2moe.dense import family_of
from ffn2moe.metrics import pool
from ffn2moe.moe import MoEFFN, moe_layers
from ffn2moe.runtime import sha256
from ffn2moe.spec import Pooling

OPSET = 23  # the first with a standard Attention op
DOMAIN, MIXTURE = "ffn2moe", "Mixture"
# The inputs of a mixture node after x [T, D] and what the router reads of each text [B, D], if it does not read x, as
# attributes of `Mixture`; those that a layer lacks are left out.
PARTS = ("router", "router_bias", "choice_bias", "margin", "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
BATCH, SEQUENCE = "batch", "sequence"
LARGEST_FILE = 2**31 - 2**24  # bytes of weights inside one file
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")


# --- out of PyTorch -------------------------------------------------------------------------------------------------


class ExportedMoE(nn.Module):
    """Stands in for a `MoEFFN` while the exporter traces: the same function, the routed experts in one node."""

    def __init__(self, moe: MoEFFN) -> None:
        super().__init__()
        self.shared = moe if moe.shared_in is not None else None
        self.texts = moe.texts
        router = moe.router
        # With all experts chosen every selection is that of all, and the gates of a prefix are 1.
        selection = "topk" if moe.num_active == moe.num_experts else router.selection
        gate = "unit" if router.selection == "prefix" else moe.gate
        self.attributes = {
            "selection": selection,
            "num_active": moe.num_active if selection == "topk" else router.max_active,
            "gate": gate,
            "activation": moe.activation,
        }
        with torch.no_grad():
            weight_ED, bias_E = router.folded()
            choice_E = router.balance_bias
            if gate == "unit":  # what shifts the choice shifts nothing else
                bias_E, choice_E = bias_E + choice_E, torch.zeros_like(choice_E)
            parts = {
                "router": weight_ED,
                "router_bias": bias_E,
                "choice_bias": choice_E if choice_E.any() else None,
                "margin": router.margin if selection == "threshold" else None,
                "w_in": moe.w_in,
                "b_in": moe.b_in,
                "w_gate": moe.w_gate,
                "b_gate": moe.b_gate,
                "w_out": moe.w_out * moe.scale,
                "b_out": moe.b_out,
            }
            for name in PARTS:
                part = parts[name]
                self.register_parameter(name, None if part is None else nn.Parameter(part.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{MIXTURE}",
            (x_TD, None if self.texts is None else self.texts.means(x), *(getattr(self, name) for name in PARTS)),
            self.attributes,
            dtype=x_TD.dtype,
            shape=x_TD.shape,
            version=1,
        )
        if self.shared is not None:
            y_TD = y_TD + self.shared.shared(x_TD)
        return y_TD.reshape(x.shape)


class _SentenceEncoder(nn.Module):
    """What is exported: token ids and their mask in, hidden states and unit embeddings out."""

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        # Models on the attention interface take a ready mask as it is; building it here saves a score of nodes.
        # Routers that read whole texts have to see which tokens are real.
        whole_texts = any(moe.texts is not None for moe in moe_layers(model))
        self.ready_mask = model.config._attn_implementation == "sdpa" and not _windows(model) and not whole_texts

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = attention_mask
        if self.ready_mask:
            B, L = attention_mask.shape
            mask = attention_mask.to(torch.bool)[:, None, None, :].expand(B, 1, L, L)
        options = rotary_positions(self.model, input_ids)
        hidden_BLD = self.model(input_ids=input_ids, attention_mask=mask, **options).last_hidden_state
        return hidden_BLD, pool(hidden_BLD, attention_mask, self.pooling)


def _windows(model: nn.Module) -> bool:
    """Whether some layers see their neighbours only, so that one mask does not do for all."""
    return getattr(model.config, "layer_types", None) is not None


def rotary_positions(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Positions of the tokens, for models that rotate by them: by default they have no batch, which the op wants."""
    if getattr(model.config, "rope_parameters", None) is None:
        return {}
    return {"position_ids": torch.arange(input_ids.shape[1]).expand(*input_ids.shape)}


@contextmanager
def _exportable(model: nn.Module) -> Iterator[None]:
    """Replaces the mixtures of `model` by what the exporter understands, and puts them back."""
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}
    try:
        for name, moe in mixtures.items():
            model.set_submodule(name, ExportedMoE(moe))
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
        raise ValueError(f"{family.name} models make no sentence embeddings: export them with the head they have")
    example = torch.full((2, 7), 1, dtype=torch.int64)
    axes = {0: BATCH, 1: SEQUENCE}
    return traced(
        model,
        _SentenceEncoder(model, pooling),
        (example, torch.ones_like(example)),
        INPUTS,
        OUTPUTS,
        dict.fromkeys(INPUTS, axes),
        name="encoder",
    )


def traced(
    model: nn.Module,
    wrapped: nn.Module,
    arguments: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: dict[str, Any],
    *,
    name: str,
) -> ir.Model:
    """The canonical graph of `wrapped`, a module around `model`; the model is left as it was.

    `arguments` are examples of what it takes, `inputs` and `outputs` the names of their tensors.
    """
    was_training = model.training
    wrapped.eval()
    try:
        with _exportable(model), _quiet(), torch.no_grad():
            program = torch.onnx.export(
                wrapped,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    finally:
        model.train(was_training)
    assert program is not None
    graph = program.model
    graph.graph.name = name
    for rewrite in (
        _fold_transposed_weights,
        _attention_without_transposes,
        _flatten_tokens,
        _linear_maps_as_gemm,
        _share_tied_weights,
    ):
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
            value = ir.val(name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
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
    if old.is_graph_output():
        new.name, old.name = old.name, None
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
    taken.clear()
    for position, node in enumerate(graph):
        if not node.name or node.name.startswith("node_") or node.name in taken:
            node.name = f"{node.op_type}_{position}"
        taken.add(node.name)
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"t{position}" if len(node.outputs) == 1 else f"t{position}_{index}"


# --- rewriting what the exporter gives ------------------------------------------------------------------------------


_TRANSPOSED = ".transposed"


def _fold_transposed_weights(model: ir.Model) -> None:
    """``x @ weight.T`` with a weight so large that the exporter leaves the transposition to every run."""
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        weight = constant_of(node.inputs[0])
        if weight is not None and weight.ndim == 2:
            replace(node.outputs[0], editor.constant(f"{node.inputs[0].name}{_TRANSPOSED}", weight.T))


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
    (
        *("Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "MatMul"),
        *("LayerNormalization", "RMSNormalization"),
    )
)


def _flatten_tokens(model: ir.Model) -> None:
    """Hidden states [B, L, n] become [T, n] wherever tokens do not see each other."""
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
    return shape[0] == BATCH and (shape[1] == SEQUENCE or isinstance(shape[1], int)) and isinstance(shape[2], int)


def _is_tokens(value: ir.Value, width: int) -> bool:
    """Whether the value is [anything, width]."""
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


def _share_tied_weights(model: ir.Model) -> None:
    """A map onto the vocabulary whose weight is the embedding table reads that table: it is in the file once."""
    editor = Editor(model)
    for node in [node for node in model.graph if node.op_type in ("Gemm", "MatMul")]:
        weight = node.inputs[1]
        name = (weight.name or "").removesuffix(_TRANSPOSED)
        table = model.graph.initializers.get(name)
        if name == weight.name or table is None or not list(table.uses()) or len(node.inputs[0].shape or ()) != 2:
            continue
        editor.at = node
        replace(node.outputs[0], editor.node("Gemm", node.inputs[0], table, *node.inputs[2:], transB=1))


def save_graph(model: ir.Model, path: str | Path, largest: int = LARGEST_FILE) -> dict[str, str]:
    """Writes the graph and gives the sha256 of each file written, by its name.

    A graph of more than `largest` bytes keeps its weights in a second file beside the first, `PATH.data`: one
    message of the format holds 2 GB at most.
    """
    path = Path(path)
    if _size(model) <= largest:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return {path.name: sha256(path)}
    data = path.with_name(f"{path.name}.data")
    graph = model.clone()  # what is unloaded is gone from the graph
    ir.external_data.unload_from_model(graph, path.parent, data.name, size_threshold_bytes=1024)
    path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    return {file.name: sha256(file) for file in (path, data)}


def _size(model: ir.Model) -> int:
    """Bytes of the weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
