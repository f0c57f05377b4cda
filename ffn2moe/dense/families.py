"""Where a model family keeps its FFNs, and how to read and replace them.

A family is data: adding one is adding a row to `FAMILIES` (`register_family`). For a model type that has no row,
`ffn2moe.dense.probe` looks for the FFNs and proves what it found.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ffn2moe.spec import Head


@dataclass(frozen=True)
class Stack:
    """Where one stack of equal layers keeps its FFNs; paths but `layers` are relative to a layer."""

    layers: str  # the ModuleList of layers, relative to `model.base_model`
    w_in: str  # the linear map D -> F (for a gated FFN: the one without the activation)
    w_out: str  # the linear map F -> D
    install: str  # the module that the mixture takes the place of ...
    bypass: tuple[str, ...] = ()  # ... and those that then have nothing left to do
    w_gate: str | None = None  # gated FFNs: the linear map D -> F under the activation
    fused: bool = False  # gated FFNs whose `w_in` is one matrix [2F, D]: first the rows of the gate, then the others
    config: str = ""  # the sub-config with the activation, where the model has one
    activation: str = "hidden_act"  # the config's key; or the activation itself, where no key names it
    where: tuple[str, object] | None = None  # only for models whose config has this value under this key

    @property
    def gated(self) -> bool:
        return self.fused or self.w_gate is not None


@dataclass(frozen=True)
class Family:
    """Where the models of one type keep their FFNs, what they give, and what they read.

    A model without one of the stacks (a T5 encoder alone, one tower of CLIP) has only the others.
    """

    name: str  # config.model_type
    stacks: tuple[Stack, ...]
    heads: tuple[Head, ...]  # what models of this type give; the first where config.json does not say
    reads: Literal["text", "images", "speech", "text and images"] = "text"
    options: tuple[tuple[str, object], ...] = ()  # constructor arguments of the model without a head: no pooler
    positions: str | None = "max_position_embeddings"  # the config's key; None = no longest text
    positions_after_padding: bool = False  # positions are counted from the padding token's index + 1 (RoBERTa)

    def options_for(self, head: Head) -> dict[str, Any]:
        """Constructor arguments of the transformers class with this head."""
        return dict(self.options) if head in ("embedding", "features") else {}


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a row to `FAMILIES`, or replace one; every function of the package then takes models of that type.

    For a model type `my_llama` that is built like LLaMA and keeps its layers in `decoder.layers`::

        mlp = Stack("decoder.layers", w_in="mlp.up_proj", w_gate="mlp.gate_proj", w_out="mlp.down_proj", install="mlp")
        register_family(Family("my_llama", (mlp,), heads=("causal",)))

    `ffn2moe.dense.probe.prove(model, family)` tells whether a row is right.
    """
    if not family.stacks or not family.heads:
        raise ValueError(f"the family {family.name!r} needs at least one stack of layers and one head")
    FAMILIES[family.name] = family
    return family


_POOLER = (("add_pooling_layer", False),)  # which embeddings do not use


def _plain(layers: str, w_in: str, w_out: str, *, inside: str, **more: Any) -> Stack:
    """An FFN that is a module of its own: the mixture takes that module's place."""
    return Stack(layers, f"{inside}.{w_in}", f"{inside}.{w_out}", inside, **more)


def _inline(layers: str, **more: Any) -> Stack:
    """An FFN written out in the layer's forward, as BART did: the mixture takes the place of its first step."""
    return Stack(
        layers, "fc1", "fc2", "fc1", bypass=("activation_fn", "fc2"), **({"activation": "activation_function"} | more)
    )


def _gated(layers: str = "layers", **more: Any) -> Stack:
    """LLaMA's FFN."""
    return Stack(layers, "mlp.up_proj", "mlp.down_proj", "mlp", w_gate="mlp.gate_proj", **more)


_BERT_STACK = Stack("encoder.layer", "intermediate.dense", "output.dense", "intermediate", bypass=("output.dense",))
_TEXT_ENCODER: tuple[Head, ...] = ("embedding", "classification")
_LANGUAGE_MODEL: tuple[Head, ...] = ("causal", "classification")
_OPTIONAL_POOLER = ("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "ernie", "mpnet")


def _t5_stack(side: str, layer: int, *, gated: bool) -> Stack:
    inside = f"layer.{layer}.DenseReluDense"
    more: dict[str, Any] = {"inside": inside, "activation": "dense_act_fn", "where": ("is_gated_act", gated)}
    if gated:
        return _plain(f"{side}.block", "wi_1", "wo", w_gate=f"{inside}.wi_0", **more)
    return _plain(f"{side}.block", "wi", "wo", **more)


def _towers(name: str) -> Iterator[Family]:
    """CLIP and its kin: two towers, each of which is also a model of its own."""
    tower = _plain("encoder.layers", "fc1", "fc2", inside="mlp")
    yield Family(f"{name}_text_model", (tower,), ("features",))
    yield Family(f"{name}_vision_model", (tower,), ("features", "classification"), reads="images")
    both = tuple(
        _plain(f"{side}_model.encoder.layers", "fc1", "fc2", inside="mlp", config=f"{side}_config")
        for side in ("text", "vision")
    )
    yield Family(name, both, ("features", "classification"), reads="text and images")


_FAMILIES: tuple[Family, ...] = (
    # Encoders of text
    *(
        Family(
            name,
            (_BERT_STACK,),
            _TEXT_ENCODER,
            options=_POOLER if name in _OPTIONAL_POOLER else (),
            positions_after_padding=name in ("roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet"),
        )
        for name in (*_OPTIONAL_POOLER, "electra", "deberta", "deberta-v2")
    ),
    Family(
        "distilbert",
        (_plain("transformer.layer", "lin1", "lin2", inside="ffn", activation="activation"),),
        _TEXT_ENCODER,
    ),
    Family(
        "modernbert",
        (_plain("layers", "Wi", "Wo", inside="mlp", fused=True, activation="hidden_activation"),),
        _TEXT_ENCODER,
    ),
    # Language models
    *(
        Family(name, (_gated(),), _LANGUAGE_MODEL)
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo", "olmo2", "smollm3", "stablelm")
    ),
    *(Family(name, (_gated(activation="hidden_activation"),), _LANGUAGE_MODEL) for name in ("gemma2", "gemma3_text")),
    *(
        Family(name, (_plain("layers", "gate_up_proj", "down_proj", inside="mlp", fused=True),), _LANGUAGE_MODEL)
        for name in ("phi3", "glm", "glm4")
    ),
    Family("phi", (_plain("layers", "fc1", "fc2", inside="mlp"),), _LANGUAGE_MODEL),
    Family("starcoder2", (_plain("layers", "c_fc", "c_proj", inside="mlp"),), _LANGUAGE_MODEL),
    *(
        Family(name, (_plain("h", "c_fc", "c_proj", inside="mlp", activation="activation_function"),), _LANGUAGE_MODEL)
        for name in ("gpt2", "gpt_neo", "gpt_bigcode")
    ),
    Family("gptj", (_plain("h", "fc_in", "fc_out", inside="mlp", activation="activation_function"),), _LANGUAGE_MODEL),
    Family("gpt_neox", (_plain("layers", "dense_h_to_4h", "dense_4h_to_h", inside="mlp"),), _LANGUAGE_MODEL),
    Family(
        "falcon",
        (_plain("h", "dense_h_to_4h", "dense_4h_to_h", inside="mlp", activation="activation"),),
        _LANGUAGE_MODEL,
    ),
    Family(
        "bloom",
        (
            Stack(
                "h",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
                "mlp.dense_h_to_4h",
                bypass=("mlp.gelu_impl", "mlp.dense_4h_to_h"),
                activation="gelu_tanh",
            ),
        ),
        _LANGUAGE_MODEL,
        positions=None,
    ),
    Family("opt", (_inline("decoder.layers"),), _LANGUAGE_MODEL),
    # Encoders with a decoder
    *(
        Family(
            name,
            tuple(
                _t5_stack(side, layer, gated=gated)
                for gated in (False, True)
                for side, layer in (("encoder", 1), ("decoder", 2))
            ),
            ("seq2seq", "embedding", "classification"),
            positions=None,
        )
        for name in ("t5", "mt5", "umt5")
    ),
    *(
        Family(name, (_inline("encoder.layers"), _inline("decoder.layers")), ("seq2seq", "classification"))
        for name in ("bart", "mbart")
    ),
    *(
        Family(name, (_inline("encoder.layers"), _inline("decoder.layers")), ("seq2seq",))
        for name in ("marian", "pegasus", "m2m_100")
    ),
    Family(
        "whisper",
        (_inline("encoder.layers"), _inline("decoder.layers")),
        ("seq2seq", "classification"),
        reads="speech",
        positions="max_target_positions",
    ),
    # Encoders of images
    *(
        Family(
            name,
            (_plain("layers", "fc1", "fc2", inside="mlp"),),
            ("features", "classification"),
            reads="images",
            options=_POOLER,
            positions=None,
        )
        for name in ("vit", "deit")
    ),
    Family(
        "dinov2",
        (
            _plain("encoder.layer", "fc1", "fc2", inside="mlp", where=("use_swiglu_ffn", False)),
            _gated("encoder.layer", activation="silu", where=("use_swiglu_ffn", True)),
        ),
        ("features", "classification"),
        reads="images",
        positions=None,
    ),
    *_towers("clip"),
    *_towers("siglip"),
)
for _family in _FAMILIES:
    register_family(_family)


def supported() -> str:
    """The model types that have a row, for messages."""
    return ", ".join(sorted(FAMILIES))


# What a checkpoint's class gives, by the end of its name in config.json.
_HEAD_OF_CLASS: tuple[tuple[str, Head], ...] = (
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "classification"),
    ("ForAudioClassification", "classification"),
    ("ForConditionalGeneration", "seq2seq"),
    ("ForSpeechSeq2Seq", "seq2seq"),
    ("MTModel", "seq2seq"),  # MarianMTModel
    ("EncoderModel", "embedding"),  # T5EncoderModel
)


def head_of_class(name: str) -> Head | None:
    """What a transformers class gives, by its name; None where the name does not say."""
    return next((head for ending, head in _HEAD_OF_CLASS if name.endswith(ending)), None)


def head_of(config: Any) -> Head:
    """What the checkpoint of this config gives: by the class that wrote it, else the first head of its family."""
    family = FAMILIES.get(config.model_type)
    for name in config.architectures or ():
        head = head_of_class(name)
        if head is not None and (family is None or head in family.heads):
            return head
    if family is not None:
        return family.heads[0]
    return "embedding" if hasattr(config, "vocab_size") else "features"


def positions(config: Any) -> int | None:
    """The longest text, in tokens, that a model of this config takes; None where nothing limits it.

    For an encoder with a decoder that reads no text (Whisper) it is the longest output.
    """
    family = FAMILIES.get(config.model_type)
    key = family.positions if family else "max_position_embeddings"
    text = config.get_text_config(decoder=True)
    limit = getattr(text, key, None) if key else None
    if not isinstance(limit, int) or limit < 1:
        return None
    return limit - text.pad_token_id - 1 if family and family.positions_after_padding else limit


def constructor_options(config: Any, head: Head) -> dict[str, Any]:
    """Arguments of the constructor of a config's transformers class with this head: no pooler, which nothing reads."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type].options_for(head)
    from transformers import MODEL_MAPPING

    if head not in ("embedding", "features") or type(config) not in MODEL_MAPPING:
        return {}
    known = inspect.signature(MODEL_MAPPING[type(config)]).parameters
    return dict(_POOLER) if "add_pooling_layer" in known else {}


def stacks_in(model: nn.Module, family: Family) -> list[tuple[Stack, nn.ModuleList]]:
    """The stacks of layers that this model has, each with its layers, in the order of this row."""
    found = []
    for stack in family.stacks:
        if stack.where is not None and getattr(model.config, stack.where[0], None) != stack.where[1]:
            continue
        try:
            found.append((stack, model.base_model.get_submodule(stack.layers)))
        except AttributeError:  # one tower alone, or an encoder without its decoder
            continue
    if not found:
        paths = " or ".join(sorted({stack.layers for stack in family.stacks}))
        raise ValueError(
            f"a {type(model).__name__} has no layers at {paths}, where {family.name} models keep their FFNs"
        )
    return found
