"""Where a model family keeps its FFNs, and how to read and replace them.

A family is data: adding one is adding a row to `FAMILIES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.spec import Activation, Pooling

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# Names that transformers' configs use for the four activations above (transformers.activations.ACT2FN).
_ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Family:
    """Where one model type keeps its FFNs; module paths are relative to `model.base_model` or to a layer."""

    name: str  # config.model_type
    layers: str  # the ModuleList of layers
    w_in: str  # the linear map D -> F (for a gated FFN: the one without the activation)
    w_out: str  # the linear map F -> D
    install: str  # the module that the mixture takes the place of ...
    bypass: tuple[str, ...] = ()  # ... and those that then have nothing left to do
    w_gate: str | None = None  # gated FFNs: the linear map D -> F under the activation
    activation: str = "hidden_act"  # the config's key
    encoder: bool = True  # makes embeddings of text, so the whole pipeline takes it
    options: tuple[tuple[str, object], ...] = ()  # constructor arguments: no pooler, which embeddings do not use


def _bert_like(name: str) -> Family:
    return Family(
        name=name,
        layers="encoder.layer",
        w_in="intermediate.dense",
        w_out="output.dense",
        install="intermediate",
        bypass=("output.dense",),
        options=() if name == "electra" else (("add_pooling_layer", False),),
    )


def _llama_like(name: str) -> Family:
    return Family(
        name=name,
        layers="layers",
        w_in="mlp.up_proj",
        w_gate="mlp.gate_proj",
        w_out="mlp.down_proj",
        install="mlp",
        encoder=False,
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(_bert_like(name) for name in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet")),
        Family(
            name="distilbert",
            layers="transformer.layer",
            w_in="ffn.lin1",
            w_out="ffn.lin2",
            install="ffn",
            activation="activation",
        ),
        *(_llama_like(name) for name in ("llama", "mistral", "qwen2", "qwen3")),
    )
}


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


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model; ValueError, with the list of known ones, for any other."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise ValueError(
            f"models of type {model_type!r} are not supported; supported are: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def activation_of(model: nn.Module) -> Activation:
    """The activation of the model's FFNs; ValueError for one that the experts do not implement."""
    name = getattr(model.config, family_of(model).activation)
    if name not in _ACTIVATION_NAMES:
        raise ValueError(f"the FFN activation {name!r} is not supported; supported are: {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[name]


def ffn_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers that hold the FFNs, in order."""
    return list(model.base_model.get_submodule(family_of(model).layers))


def ffn_modules(model: nn.Module) -> list[nn.Module]:
    """The module of each layer that takes the FFN's input [B, L, D]: where a mixture would be installed."""
    return [layer.get_submodule(family_of(model).install) for layer in ffn_layers(model)]


def read_ffn(model: nn.Module, layer: int) -> DenseFFN:
    """The weights of the FFN of one layer, as float32 copies."""
    family = family_of(model)
    block = ffn_layers(model)[layer]

    def weight(path: str) -> tuple[Tensor, Tensor | None]:
        linear = block.get_submodule(path)
        bias = None if linear.bias is None else linear.bias.detach().float().clone()
        return linear.weight.detach().float().clone(), bias

    w_in_FD, b_in_F = weight(family.w_in)
    w_out_DF, b_out_D = weight(family.w_out)
    w_gate_FD, b_gate_F = weight(family.w_gate) if family.w_gate else (None, None)
    return DenseFFN(w_in_FD, w_out_DF, activation_of(model), b_in_F, b_out_D, w_gate_FD, b_gate_F)


def install(model: nn.Module, layer: int, ffn: nn.Module) -> None:
    """Put `ffn` ([..., D] -> [..., D]) in the place of the FFN of one layer; dropout and norms stay."""
    family = family_of(model)
    block = ffn_layers(model)[layer]
    for path in family.bypass:
        block.set_submodule(path, nn.Identity())
    block.set_submodule(family.install, ffn)


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


def load_dense(source: str, revision: str | None = None) -> tuple[Any, Any]:
    """A dense teacher and its tokenizer, float32 and in eval mode, from any source of `resolve_source`.

    Only safetensors weights are read and no remote code is run. Raises ValueError for an unsupported
    architecture or non-finite weights, FileNotFoundError for a source that cannot be found.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    kind, folder = resolve_source(source)
    where = str(folder) if folder else source
    options: dict[str, Any] = {"trust_remote_code": False}
    if kind == "hub":
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(where, **options)
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"the teacher {source} is a {config.model_type!r} model, which is not supported; "
                f"supported are: {', '.join(sorted(FAMILIES))}"
            )
        family = FAMILIES[config.model_type]
        auto = AutoModel if family.encoder else AutoModelForCausalLM
        model, report = auto.from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **dict(family.options),
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"the teacher {source} cannot be read ({reason}): it must be a Hugging Face folder with config.json, "
            "model.safetensors and a tokenizer, or the name of one that can be reached"
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"the teacher {source} lacks weights ({', '.join(sorted(report['missing_keys'])[:3])}, ...), which would "
            "be random: the file is incomplete, or config.json belongs to another model"
        )
    require_finite(model, f"the teacher {source}")
    return model.eval(), tokenizer


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
