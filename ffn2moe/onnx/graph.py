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

from ffn2moe.dense.locate import family_of
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.numerics import pool
from ffn2moe.onnx.editor import BATCH, SEQUENCE
from ffn2moe.onnx.simplify import (
    attention_without_transposes,
    finish,
    flatten_tokens,
    fold_transposed_weights,
    linear_maps_as_gemm,
    share_tied_weights,
)
from ffn2moe.runtime.files import sha256
from ffn2moe.spec import Pooling

OPSET = 23  # the first with a standard Attention op
DOMAIN, MIXTURE = "ffn2moe", "Mixture"
# The inputs of a mixture node after x [T, D] and what the router reads of each text [B, D], if it does not read x, as
# attributes of `Mixture`; those that a layer lacks are left out.
PARTS = ("router", "router_bias", "choice_bias", "margin", "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
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
        self.ready_mask = model.config._attn_implementation == "sdpa" and not sliding_windows(model) and not whole_texts

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = attention_mask
        if self.ready_mask:
            B, L = attention_mask.shape
            mask = attention_mask.to(torch.bool)[:, None, None, :].expand(B, 1, L, L)
        options = rotary_positions(self.model, input_ids)
        hidden_BLD = self.model(input_ids=input_ids, attention_mask=mask, **options).last_hidden_state
        return hidden_BLD, pool(hidden_BLD, attention_mask, self.pooling)


def sliding_windows(model: nn.Module) -> bool:
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
        fold_transposed_weights,
        attention_without_transposes,
        flatten_tokens,
        linear_maps_as_gemm,
        share_tied_weights,
    ):
        rewrite(graph)
        RemoveUnusedNodesPass()(graph)  # what a rewrite leaves behind would still count as a use
    finish(graph)
    return graph


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
