"""Make the canonical ONNX graphs of models other than sentence encoders: language models, seq2seq, classifiers, images.

| graph | inputs | outputs |
|---|---|---|
| `causal` | `input_ids` [B, L], `attention_mask` [B, P + L], past, `logits_at` [n] | `logits` [B, n, V], present |
| `seq2seq`: decoder | `input_ids`, `encoder_attention_mask` [B, S] (of texts), cross, past | `logits`, present |
| its encoder | `input_ids` and `attention_mask` [B, S], or `input_features` | `last_hidden_state`, cross |
| `classification` | `input_ids` and `attention_mask` [B, L], or `pixel_values` | `logits` [B, classes] |
| `token_classification` | `input_ids` and `attention_mask` [B, L] | `logits` [B, L, classes] |
| `features` | as of `classification` | `last_hidden_state` [B, L, D] |

past: `past_key_values.N.key` and `.value` [B, H, P, d] of each layer N; present: `present.N.key` and `.value`, longer
by L; cross: `cross.N.key` and `.value` [B, H, S, d]; pixels are [B, channels, H, W] and sounds [B, mel bins, frames].
A classifier that tells the texts of a pair apart (BERT) has the input `token_type_ids` [B, L], too.

`logits_at` has the places of the n tokens, of the L new ones, whose logits are computed (`ffn2moe.onnx.last_logits`).
Reading a prompt and decoding are one graph: P may be 0, and L any number of new tokens. Positions are counted from the
mask, so that a batch of prompts is padded on the left. The keys and values that a decoder reads of its encoder are
computed once, by the encoder's graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ffn2moe.choices import HEADS
from ffn2moe.dense.config import takes_token_types
from ffn2moe.dense.locate import family_of
from ffn2moe.onnx.editor import BATCH, SEQUENCE
from ffn2moe.onnx.graph import canonical_graph, decodes, rotary_positions, traced
from ffn2moe.onnx.last_logits import logits_of_chosen_tokens
from ffn2moe.onnx.parity import input_shape
from ffn2moe.runtime.at_once import TOKEN_TYPES
from ffn2moe.spec import Head

ATTENTION = "onnx_attention"  # its name in transformers' registry
SOURCE = "source"  # length of what an encoder read, where a decoder looks at it
# Rotary positions that change once a text has grown: a graph would hold one of the forms.
_GROWING_POSITIONS = ("dynamic", "longrope")


def canonical_graphs(model: Any, head: Head) -> dict[str, ir.Model]:
    """Return the graphs of a model with this head, dense or a mixture: `main`, and `encoder` for a seq2seq model.

    `ffn2moe.onnx.graph` describes them; the table above has their inputs and outputs.
    Raises ValueError for a model that cannot be exported, with the reason.
    """
    if head == "embedding":
        with onnx_attention(model) if decodes(model) else nullcontext():
            return {"main": canonical_graph(model)}
    if head == "causal":
        return {"main": _causal(model)}
    if head == "seq2seq":
        return {"main": _seq2seq_decoder(model), "encoder": _seq2seq_encoder(model)}
    return {"main": _at_once(model, head)}


@contextmanager
def onnx_attention(model: Any) -> Iterator[None]:
    """Trace the model's attention as the standard ONNX op, with grouped heads and soft caps inside.

    A model that writes its attention out and does not use the registry keeps it.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    if not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention [B, L, H, d] of heads [B, H, L, d], as transformers calls it."""
    if position_bias is not None:
        nothing = torch.finfo(query.dtype).min
        attention_mask = (
            position_bias if attention_mask is None else torch.where(attention_mask, position_bias, nothing)
        )
    out, *_rest = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scaling, softcap=softcap or 0.0)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """Return the mask as booleans, always: a graph cannot leave it out for the batches that need none."""
    from transformers.masking_utils import sdpa_mask

    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **options)


def _cache(tensors: Sequence[Tensor]) -> Any:
    """Return keys and values of each layer in transformers' cache, to their full length."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(list(zip(tensors[0::2], tensors[1::2], strict=True)))


def _tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _names(prefix: str, tensors: Sequence[Tensor]) -> list[str]:
    return [f"{prefix}.{index // 2}.{('key', 'value')[index % 2]}" for index in range(len(tensors))]


# --- language models ------------------------------------------------------------------------------------------------


class _LanguageModel(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        position_BL = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_BL,
            past_key_values=_cache(past),
            use_cache=True,
        )
        return (found.logits, *_tensors(found.past_key_values))


def _causal(model: Any) -> ir.Model:
    _require_fixed_positions(model)
    ids = torch.ones((2, 5), dtype=torch.int64)
    with torch.no_grad():  # shows how the model keeps keys and values
        past = [torch.zeros_like(tensor)[:, :, :3] for tensor in _tensors(model(ids, use_cache=True).past_key_values)]
    past_axes = [{0: BATCH, 2: "past"}] * len(past)
    with onnx_attention(model):
        graph = traced(
            model,
            _LanguageModel(model),
            (ids, torch.ones((2, 8), dtype=torch.int64), past),
            ["input_ids", "attention_mask", *_names("past_key_values", past)],
            ["logits", *_names("present", past)],
            {"input_ids": {0: BATCH, 1: SEQUENCE}, "attention_mask": {0: BATCH, 1: "total"}, "past": past_axes},
            name="decoder",
        )
    logits_of_chosen_tokens(graph)
    return graph


def _require_fixed_positions(model: Any) -> None:
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for kind in kinds:
        if kind.get("rope_type") in _GROWING_POSITIONS:
            raise ValueError(
                f"{model.config.model_type} with rope_type {kind['rope_type']!r} cannot be one ONNX graph: its "
                "positions are computed anew once a text has grown. Export a model with another rope_type"
            )


# --- an encoder with a decoder --------------------------------------------------------------------------------------


def _example_source(model: Any) -> dict[str, Tensor]:
    if family_of(model).reads == "speech":
        return {"input_features": torch.zeros(2, *input_shape(model))}
    ids = torch.ones((2, 7), dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _SourceEncoder(nn.Module):
    """Run the encoder, and make the keys and values of its output for every layer of the decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *source: Tensor) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        mask = source[1] if len(source) > 1 else None
        options = {} if mask is None else {"attention_mask": mask}
        hidden_BSD = self.model.get_encoder()(source[0], **options).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model.get_decoder()(
            input_ids=torch.zeros((hidden_BSD.shape[0], 1), dtype=torch.int64),
            encoder_hidden_states=hidden_BSD,
            past_key_values=cache,
            use_cache=True,
        )
        return (hidden_BSD, *_tensors(cache.cross_attention_cache))


class _TargetDecoder(nn.Module):
    """Run the decoder on given keys and values of the source."""

    def __init__(self, model: Any, *, masked: bool) -> None:
        super().__init__()
        self.model = model
        self.masked = masked

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, cross: list[Tensor], past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers.cache_utils import EncoderDecoderCache

        cache = EncoderDecoderCache(_cache(past), _cache(cross))
        cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
        B, _, S, _ = cross[0].shape
        # Only the length of the encoder's output is still read.
        hidden_BSD = cross[0].new_zeros((B, S, self.model.config.get_text_config(decoder=True).hidden_size))
        options = {"attention_mask": mask} if self.masked else {}
        found = self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=(hidden_BSD,),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        return (found.logits, *_tensors(cache.self_attention_cache))


def _seq2seq_encoder(model: Any) -> ir.Model:
    source = _example_source(model)
    masked = "attention_mask" in source
    with onnx_attention(model):
        with torch.no_grad():
            cross = _SourceEncoder(model)(*source.values())[1:]
        return traced(
            model,
            _SourceEncoder(model),
            tuple(source.values()),
            list(source),
            ["last_hidden_state", *_names("cross", cross)],
            {"source": tuple({0: BATCH, 1: SEQUENCE} if masked else {0: BATCH} for _ in source)},
            name="encoder",
        )


def _seq2seq_decoder(model: Any) -> ir.Model:
    source = _example_source(model)
    masked = "attention_mask" in source
    with onnx_attention(model):
        with torch.no_grad():
            cross = [torch.zeros_like(tensor) for tensor in _SourceEncoder(model)(*source.values())[1:]]
            ids = torch.ones((2, 5), dtype=torch.int64)
            made = model(
                decoder_input_ids=ids, encoder_outputs=(torch.zeros(2, 7, model.config.hidden_size),), use_cache=True
            ).past_key_values
        past = [torch.zeros_like(tensor)[:, :, :3] for tensor in _tensors(made.self_attention_cache)]
        mask = torch.ones((2, cross[0].shape[2]), dtype=torch.int64) if masked else None
        return traced(
            model,
            _TargetDecoder(model, masked=masked),
            (ids, mask, cross, past),
            [
                "input_ids",
                *(["encoder_attention_mask"] if masked else []),
                *_names("cross", cross),
                *_names("past_key_values", past),
            ],
            ["logits", *_names("present", past)],
            {
                "input_ids": {0: BATCH, 1: SEQUENCE},
                "mask": {0: BATCH, 1: SOURCE} if masked else None,
                "cross": [{0: BATCH, 2: SOURCE} if masked else {0: BATCH}] * len(cross),
                "past": [{0: BATCH, 2: "past"}] * len(past),
            },
            name="decoder",
        )


# --- models that read all at once -----------------------------------------------------------------------------------


class _AtOnce(nn.Module):
    def __init__(self, model: Any, inputs: Sequence[str], output: str) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.output = output
        # A language model with a classifier on top keeps nothing for later.
        self.options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.inputs, inputs, strict=True))
        found: Tensor = getattr(
            self.model(**named, **rotary_positions(self.model, inputs[0]), **self.options), self.output
        )
        return found


def _at_once(model: Any, head: Head) -> ir.Model:
    reads = family_of(model).reads
    name = model.main_input_name
    if reads == "text and images" and head == "features":
        raise ValueError(
            f"a {model.config.model_type} model of both towers gives no hidden states of its own: export a tower, "
            f"for example by its class {type(model).__name__.removesuffix('Model')}VisionModel"
        )
    if name == "input_ids":
        ids = torch.ones((2, 7), dtype=torch.int64)
        examples = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if HEADS[head].classifies and takes_token_types(model):
            examples[TOKEN_TYPES] = torch.zeros_like(ids)
        axes = {0: BATCH, 1: SEQUENCE}
    else:
        examples = {name: torch.zeros(2, *input_shape(model))}
        axes = {0: BATCH}
    with onnx_attention(model):
        return traced(
            model,
            _AtOnce(model, list(examples), HEADS[head].output),
            tuple(examples.values()),
            list(examples),
            [HEADS[head].output],
            {"inputs": tuple(axes for _ in examples)},
            name="encoder",
        )
