"""The canonical ONNX graph of an encoder, and the tools that make and change graphs.

Every plan (`ffn2moe.onnx.lower`) comes from this graph, so that attention, norms and embeddings are the same in
all of them and a comparison of plans compares FFNs only. (`ffn2moe.onnx.decoder` makes those of the other models in
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
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    RemoveUnusedNodesPass,
)
from torch import Tensor, nn

from ffn2moe.choices import GATES
from ffn2moe.dense.locate import family_of
from ffn2moe.dense.sentence import modules_of
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.onnx.editor import BATCH, SEQUENCE
from ffn2moe.onnx.names import DOMAIN, MIXTURE, PARTS
from ffn2moe.onnx.simplify import (
    attention_without_transposes,
    finish,
    flatten_tokens,
    fold_transposed_weights,
    linear_maps_as_gemm,
    share_tied_weights,
)
from ffn2moe.runtime.files import sha256

OPSET = 23  # the first with a standard Attention op
LARGEST_FILE = 2**31 - 2**24  # bytes of weights inside one file
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
# What a layer calls a part of its shared expert.
SHARED_PARTS = {
    "w_in": "shared_in",
    "b_in": "shared_b_in",
    "w_gate": "shared_gate",
    "b_gate": "shared_b_gate",
    "w_out": "shared_out",
}


# --- out of PyTorch -------------------------------------------------------------------------------------------------


class ExportedMoE(nn.Module):
    """Stand in for a `MoEFFN` while the exporter traces: the same function, the routed experts in one node.

    Where every token runs one expert at a gate of 1, each expert holds the shared one's neurons, too: the file is
    larger, and a token reads the same weights in half as many products.
    """

    def __init__(self, moe: MoEFFN) -> None:
        super().__init__()
        router = moe.router
        alone = moe.num_active == 1 and router.selection == "topk" and GATES[moe.gate].constant != "never"
        joins = alone and moe.shared_in is not None
        self.shared = moe if moe.shared_in is not None and not joins else None
        # A selection, routing or gate without a form in ONNX is refused by `ffn2moe.onnx.mixture`, by its name.
        self.attributes = {
            "selection": "topk" if moe.num_active == moe.num_experts else router.selection,
            "routing": moe.routing,
            "num_active": moe.num_active,
            "gate": moe.gate,
            "activation": moe.activation,
        }
        with torch.no_grad():
            weight_ED, bias_E = router.folded()
            choice_E = router.balance_bias
            if moe.gate == "unit":  # the shift of the choice shifts nothing else
                bias_E, choice_E = bias_E + choice_E, torch.zeros_like(choice_E)
            parts = {
                "router": weight_ED,
                "router_bias": bias_E,
                "choice_bias": choice_E if choice_E.any() else None,
                "w_in": moe.w_in,
                "b_in": moe.b_in,
                "w_gate": moe.w_gate,
                "b_gate": moe.b_gate,
                "w_out": moe.w_out * moe.scale,
                "b_out": moe.b_out,
            }
            if joins:
                for name in ("w_in", "b_in", "w_gate", "b_gate", "w_out"):
                    parts[name] = _joined(parts[name], getattr(moe, SHARED_PARTS[name]), -1 if name == "w_out" else 1)
            for name in PARTS:
                part = parts[name]
                self.register_parameter(name, None if part is None else nn.Parameter(part.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{MIXTURE}",
            (x_TD, *(getattr(self, name) for name in PARTS)),
            self.attributes,
            dtype=x_TD.dtype,
            shape=x_TD.shape,
            version=1,
        )
        if self.shared is not None:
            y_TD = y_TD + self.shared.shared(x_TD)
        return y_TD.reshape(x.shape)


def _joined(stack: Tensor | None, shared: Tensor | None, dim: int) -> Tensor | None:
    """Return the neurons of each expert, [E, ...], with those of the shared expert behind them."""
    if stack is None or shared is None:
        return stack
    return torch.cat([stack, shared.expand(len(stack), *shared.shape)], dim)


class _SentenceEncoder(nn.Module):
    """Take token ids and their mask; return hidden states and embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # Models on the attention interface take a ready mask as it is; building it here saves a score of nodes.
        self.options = {"use_cache": False} if decodes(model) else {}
        reads_all = not (decodes(model) or sliding_windows(model))
        self.ready_mask = model.config._attn_implementation == "sdpa" and reads_all

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = attention_mask
        if self.ready_mask:
            B, L = attention_mask.shape
            mask = attention_mask.to(torch.bool)[:, None, None, :].expand(B, 1, L, L)
        options = rotary_positions(self.model, input_ids) | self.options
        hidden_BLD = self.model(input_ids=input_ids, attention_mask=mask, **options).last_hidden_state
        return hidden_BLD, self.model.sentence(hidden_BLD, attention_mask)


def decodes(model: nn.Module) -> bool:
    """Return whether each token of a model sees those before it alone."""
    return "causal" in family_of(model).heads


def sliding_windows(model: nn.Module) -> bool:
    """Return whether some layers see only their neighbours, so that one mask does not fit all layers."""
    return getattr(model.config, "layer_types", None) is not None


def rotary_positions(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Return positions [B, L] for models that rotate by them: the op wants a batch, which the default lacks."""
    if getattr(model.config, "rope_parameters", None) is None:
        return {}
    return {"position_ids": torch.arange(input_ids.shape[1]).expand(*input_ids.shape)}


@contextmanager
def _exportable(model: nn.Module) -> Iterator[None]:
    """Replace the mixtures of `model` by modules that the exporter understands, and put them back at the end."""
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
    """Silence the exporter's reports on optional packages and its own deprecations: no user can act on them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def canonical_graph(model: nn.Module) -> ir.Model:
    """Return the graph of an encoder, dense or a mixture, as described at the top of this file.

    Inputs `input_ids` and `attention_mask`, int64 [B, L], any B and L from 1 up to the model's positions
    allow; outputs `last_hidden_state` [B, L, D] and `sentence_embedding` [B, D'], float32.
    Raises ValueError for a model that makes no embeddings.
    """
    if modules_of(model) is None:
        raise ValueError(
            f"this {family_of(model).name} model makes no sentence embeddings: export it with the head it has, or "
            "attach modules that make them (ffn2moe.dense.sentence.attach)"
        )
    example = torch.full((2, 7), 1, dtype=torch.int64)
    axes = {0: BATCH, 1: SEQUENCE}
    return traced(
        model,
        _SentenceEncoder(model),
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
    """Return the canonical graph of `wrapped`, a module around `model`; leave the model as it was.

    `arguments` are examples of its arguments, `inputs` and `outputs` the names of their tensors.
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
        fold_transposed_weights,
        attention_without_transposes,
        flatten_tokens,
        linear_maps_as_gemm,
        share_tied_weights,
    ):
        rewrite(graph)
        RemoveUnusedNodesPass()(graph)  # a replaced node would still count as a use
    finish(graph)
    return graph


def save_graph(model: ir.Model, path: str | Path) -> dict[str, str]:
    """Write the graph and return the sha256 of each file written, by its name.

    A graph of more than `LARGEST_FILE` bytes keeps its weights in a second file beside the first, `PATH.data`: one
    message of the format holds 2 GB at most.
    """
    path = Path(path)
    if _size(model) <= LARGEST_FILE:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return {path.name: sha256(path)}
    data = path.with_name(f"{path.name}.data")
    graph = model.clone()  # unloading takes weights out of the graph
    ir.external_data.unload_from_model(graph, path.parent, data.name, size_threshold_bytes=1024)
    path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    return {file.name: sha256(file) for file in (path, data)}


def _size(model: ir.Model) -> int:
    """Return the bytes of the weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
