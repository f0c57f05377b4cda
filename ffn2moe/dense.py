"""Where a model family keeps its FFNs, and how to read and replace them.

A family is data: adding one is adding a row to `FAMILIES` (`register_family`). For a model type that has no row,
`ffn2moe.probe` looks for the FFNs and proves what it found.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.spec import Activation, Head, Pooling

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
# Names that transformers' configs use for the activations above (transformers.activations.ACT2FN).
_ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


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

    `ffn2moe.probe.prove(model, family)` tells whether a row is right.
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


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one dense FFN, float32.

    Plain: ``y = w_out act(w_in x + b_in) + b_out``.
    Gated: ``y = w_out (act(w_gate x + b_gate) * (w_in x + b_in)) + b_out``.
    """

    w_in_FD: Tensor
    w_out_DF: Tensor
    activation: Activation
    b_in_F: Tensor | None = None
    b_out_D: Tensor | None = None
    w_gate_FD: Tensor | None = None
    b_gate_F: Tensor | None = None

    @property
    def gated(self) -> bool:
        return self.w_gate_FD is not None

    @property
    def ffn_width(self) -> int:
        return self.w_in_FD.shape[0]

    def narrow(self, neurons_S: Tensor) -> DenseFFN:
        """The part of the FFN that these neurons are, without the output bias."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[neurons_S]

        return replace(
            self,
            w_in_FD=self.w_in_FD[neurons_S],
            w_out_DF=self.w_out_DF[:, neurons_S].contiguous(),
            b_in_F=rows(self.b_in_F),
            b_out_D=None,
            w_gate_FD=rows(self.w_gate_FD),
            b_gate_F=rows(self.b_gate_F),
        )

    def neurons(self, x_TD: Tensor) -> Tensor:
        """Activations of the neurons, [T, F]: what multiplies the columns of `w_out`."""
        act = ACTIVATIONS[self.activation]
        h_TF = F.linear(x_TD, self.w_in_FD, self.b_in_F)
        if self.w_gate_FD is None:
            return act(h_TF)
        return act(F.linear(x_TD, self.w_gate_FD, self.b_gate_F)) * h_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Output of the FFN, [T, D]."""
        return F.linear(self.neurons(x_TD), self.w_out_DF, self.b_out_D)


def supported() -> str:
    """The model types that have a row, for messages."""
    return ", ".join(sorted(FAMILIES))


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model.

    For a model type without a row the FFNs are looked for, once, while the model is still dense, and what is found
    counts when K = E proves it; the model then carries its row. ValueError, with the reason and the known types, for
    any other model.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if not isinstance(getattr(model, "probed_family", None), Family):
        from ffn2moe.probe import probe

        try:
            model.probed_family = probe(model)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"models of type {model_type!r} are not supported, and no FFNs were found in this one that could be "
                f"proven: {error}. Supported are: {supported()}; a row is added with ffn2moe.dense.register_family"
            ) from error
    return model.probed_family


def stacks_of(model: nn.Module, family: Family | None = None) -> list[tuple[Stack, nn.ModuleList]]:
    """The stacks of layers that this model has, each with its layers, in the order of its family's row."""
    family = family or family_of(model)
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


def ffn_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers that hold the FFNs: all stacks, in order."""
    return [layer for _, layers in stacks_of(model) for layer in layers]


def stack_of(model: nn.Module, layer: int) -> Stack:
    """The stack that a layer belongs to, counted over all stacks in order."""
    for stack, layers in stacks_of(model):
        if layer < len(layers):
            return stack
        layer -= len(layers)
    raise IndexError(f"there are only {len(ffn_layers(model))} layers")


def activation_of(model: nn.Module, layer: int = 0) -> Activation:
    """The activation of a layer's FFN; ValueError for one that the experts do not implement."""
    return activation_in(model.config, stack_of(model, layer))


def activation_in(config: Any, stack: Stack) -> Activation:
    """The activation of a stack's FFNs by the model's config; ValueError for one that the experts do not implement."""
    if stack.activation in ACTIVATIONS:
        return stack.activation
    part = getattr(config, stack.config, config) if stack.config else config
    name = getattr(part, stack.activation, None)
    if name not in _ACTIVATION_NAMES:
        raise ValueError(f"the FFN activation {name!r} is not supported; supported are: {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[name]


def ffn_modules(model: nn.Module) -> list[nn.Module]:
    """The module of each layer that takes the FFN's input [..., D]: where a mixture would be installed.

    Its output is the FFN's only where the FFN is a module of its own.
    """
    return [layer.get_submodule(stack.install) for stack, layers in stacks_of(model) for layer in layers]


def ffn_paths(model: nn.Module) -> list[str]:
    """The full path in `model` of where each layer's mixture is installed, e.g. "model.layers.0.mlp"."""
    name_of = {id(module): name for name, module in model.named_modules()}
    prefix = name_of[id(model.base_model)]
    start = f"{prefix}." if prefix else ""
    return [
        f"{start}{stack.layers}.{index}.{stack.install}"
        for stack, layers in stacks_of(model)
        for index in range(len(layers))
    ]


def read_ffn(model: nn.Module, layer: int) -> DenseFFN:
    """The weights of the FFN of one layer, as float32 copies."""
    return read_block(ffn_layers(model)[layer], stack_of(model, layer), activation_of(model, layer))


def read_block(block: nn.Module, stack: Stack, activation: Activation) -> DenseFFN:
    """The weights of the FFN of one transformer layer, as float32 copies."""
    from transformers.pytorch_utils import Conv1D

    def weight(path: str) -> tuple[Tensor, Tensor | None]:
        linear = block.get_submodule(path)
        matrix = linear.weight.T if isinstance(linear, Conv1D) else linear.weight  # GPT-2 keeps [in, out]
        bias = getattr(linear, "bias", None)
        return _copy(matrix), None if bias is None else _copy(bias)

    w_in_FD, b_in_F = weight(stack.w_in)
    w_out_DF, b_out_D = weight(stack.w_out)
    w_gate_FD, b_gate_F = weight(stack.w_gate) if stack.w_gate else (None, None)
    if stack.fused:
        w_gate_FD, w_in_FD = (half.clone() for half in w_in_FD.chunk(2))
        b_gate_F, b_in_F = (None, None) if b_in_F is None else (half.clone() for half in b_in_F.chunk(2))
    return DenseFFN(w_in_FD, w_out_DF, activation, b_in_F, b_out_D, w_gate_FD, b_gate_F)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def install(model: nn.Module, layer: int, ffn: nn.Module) -> None:
    """Put `ffn` ([..., D] -> [..., D]) in the place of the FFN of one layer; norms stay."""
    install_in_block(ffn_layers(model)[layer], stack_of(model, layer), ffn)


def install_in_block(block: nn.Module, stack: Stack, ffn: nn.Module) -> None:
    """Put `ffn` ([..., D] -> [..., D]) in the place of the FFN of this layer of a stack."""
    for path in stack.bypass:
        block.set_submodule(path, nn.Identity())
    block.set_submodule(stack.install, ffn)
    ffn.takes_ffns_place = True


def installed_ffns(model: nn.Module) -> list[nn.Module]:
    """What `install` has put in the place of FFNs, in the order of the layers: mixtures, or anything else."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()  # parts of one that is found already
    for module in model.modules():
        if getattr(module, "takes_ffns_place", False) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def require_untied(model: nn.Module) -> None:
    """ValueError if a weight of an FFN has a second place in the model: a mixture in one would be lost on the other."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer, block in enumerate(ffn_layers(model)):
        stack = stack_of(model, layer)
        for path in (stack.w_in, stack.w_out, stack.w_gate):
            for parameter in block.get_submodule(path).parameters() if path else ():
                places = names[id(parameter)]
                if len(places) > 1:
                    raise ValueError(
                        f"{places[0]} and {places[1]} are one tensor (tied weights): FFNs that share weights cannot be "
                        "factorised apart; untie them by saving the model with a copy in each place"
                    )


def resolve_source(source: str) -> tuple[str, Path | None]:
    """Kind of a teacher source ("package", "folder" or "hub") and its folder (None for a hub name).

    `package:NAME` is a model whose folder travels inside an installed Python package; a path that exists is a
    local folder; any other text is taken as a model hub's name. FileNotFoundError says what to do.
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        return "package", _packaged_model(name)
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(f"the teacher folder {source} has no config.json: name a Hugging Face folder")
        return "folder", Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise FileNotFoundError(
            f"the teacher {source} does not exist: name a local Hugging Face folder, a hub name (owner/model) "
            "or a packaged model (package:NAME)"
        )
    return "hub", None


def _packaged_model(distribution: str) -> Path:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the teacher package {distribution!r} is not installed: pip install {distribution}"
        ) from None
    roots = sorted({file.parts[0] for file in files if file.name == "__init__.py"})
    for root in roots:
        spec = util.find_spec(root)
        for location in (spec.submodule_search_locations or []) if spec else []:
            configs = sorted(Path(location).rglob("config.json"), key=lambda path: (len(path.parts), str(path)))
            for config in configs:
                if any(config.parent.glob("*.safetensors")):
                    return config.parent
    raise FileNotFoundError(f"the package {distribution!r} holds no model folder (config.json beside *.safetensors)")


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


def auto_class(head: Head, reads: str, family: Family | None) -> str:
    if head == "causal":
        return "AutoModelForCausalLM"
    if head == "seq2seq":
        return "AutoModelForSpeechSeq2Seq" if reads == "speech" else "AutoModelForSeq2SeqLM"
    if head == "classification":
        kind = {"text": "Sequence", "speech": "Audio"}.get(reads, "Image")
        return f"AutoModelFor{kind}Classification"
    if head == "embedding" and family is not None and "seq2seq" in family.heads:
        return "AutoModelForTextEncoding"  # the encoder alone
    return "AutoModel"


_AUTO_READER = {"text": "AutoTokenizer", "images": "AutoImageProcessor"}  # else AutoProcessor


def load_dense(source: str, revision: str | None = None, *, head: Head | None = None) -> tuple[Any, Any]:
    """A dense teacher, float32 and in eval mode, and what prepares its input, from any source of `resolve_source`.

    The second is a tokenizer, or the processor of a model that reads images or speech. Without `head` the
    checkpoint's config says what the model gives (`head_of`). Only safetensors weights are read and no remote code
    is run. Raises ValueError for an unsupported architecture, incomplete or non-finite weights, FileNotFoundError
    for a source that cannot be found.
    """
    import transformers
    from safetensors import SafetensorError

    kind, folder = resolve_source(source)
    where = str(folder) if folder else source
    options: dict[str, Any] = {"trust_remote_code": False}
    if kind == "hub":
        options["revision"] = revision
    try:
        config = _read_config(source, where, options)
        family = FAMILIES.get(config.model_type)
        head = head or head_of(config)
        if family is not None and head not in family.heads:
            raise ValueError(
                f"the teacher {source} is a {family.name} model, from which this package makes "
                f"{' or '.join(family.heads)}, not {head}"
            )
        reads = family.reads if family else "text" if hasattr(config, "vocab_size") else "images"
        if folder is not None:
            weight_files(folder)
        model, report = getattr(transformers, auto_class(head, reads, family)).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **constructor_options(config, head),
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise _unreadable(source, error, "model.safetensors") from error
    try:
        reader = getattr(transformers, _AUTO_READER.get(reads, "AutoProcessor")).from_pretrained(where, **options)
    except OSError as error:
        raise _unreadable(source, error, "a tokenizer" if reads == "text" else "preprocessor_config.json") from error
    if report["missing_keys"]:
        raise ValueError(
            f"the teacher {source} lacks weights ({', '.join(sorted(report['missing_keys'])[:3])}, ...), which would "
            "be random: the file is incomplete, or config.json belongs to another model"
        )
    require_finite(model, f"the teacher {source}")
    family_of(model)
    require_untied(model)
    return model.eval(), reader


def _unreadable(source: str, error: Exception, what: str) -> FileNotFoundError:
    reason = str(error).strip().splitlines()[0]
    return FileNotFoundError(
        f"the teacher {source} cannot be read ({reason}): it must be a Hugging Face folder with config.json, "
        f"model.safetensors and {what}, or the name of one that can be reached"
    )


def _read_config(source: str, where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    written, _ = PreTrainedConfig.get_config_dict(where, **options)
    model_type = written.get("model_type")
    if model_type not in CONFIG_MAPPING:
        code = "; the code that travels with it is never run" if "auto_map" in written else ""
        raise ValueError(
            f"the teacher {source} is a {model_type!r} model, which is not supported; supported are: {supported()} "
            f"(transformers itself does not know it{code})"
        )
    return AutoConfig.from_pretrained(where, **options)


def weight_files(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor of a Hugging Face folder, by the tensor's name; only the files' headers are read.

    FileNotFoundError for a missing file. ValueError for a tensor that the index promises and its file lacks, and for
    one that stands in two files, of which one copy would be lost without a word.
    """
    from safetensors import safe_open

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        promised: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(promised.values()))
    else:
        promised, shards = {}, ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        named = f", which {index.name} names," if promised else ""
        raise FileNotFoundError(
            f"{', '.join(missing[:3])}{named} is not in {folder} ({len(missing)} of {len(shards)} files are missing)"
        )
    found: dict[str, Path] = {}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            if name in found:
                raise ValueError(
                    f"the tensor {name} stands in two files of {folder}, {found[name].name} and {shard}: one of them "
                    "belongs to another checkpoint; fetch the folder again"
                )
            found[name] = folder / shard
    lost = [name for name, shard in promised.items() if name not in found or found[name].name != shard]
    if lost:
        raise ValueError(
            f"{promised[lost[0]]} in {folder} lacks {', '.join(lost[:3])}, which {index.name} says it holds "
            f"({len(lost)} tensors in all): fetch the folder again"
        )
    return found


def pooling_of(folder: str | Path) -> Pooling:
    """How a teacher's authors pool its tokens: what a sentence-transformers folder says, else the mean.

    ValueError for a pooling that is neither the mean nor the first token.
    """
    path = Path(folder) / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    modes = sorted(key for key, on in json.loads(path.read_text()).items() if key.startswith("pooling_mode") and on)
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(
            f"{path} asks for {modes}, which is not supported; supported are {sorted(known)}, one at a time"
        )
    return known[modes[0]]


def require_finite(model: nn.Module, what: str) -> None:
    """ValueError naming the first tensor of `model` that holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{what} has NaN or infinite values in {name}: the weights are damaged, fetch them again")


def require_representable(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    """ValueError if a value of the tensor called `what` is beyond the range of `dtype`, in which it is to be kept."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{what} holds {largest:.3g}, more than the {torch.finfo(dtype).max:.3g} that {dtype} can: "
            "keep the model in bfloat16 or float32"
        )
