"""Native Hugging Face mixture architectures that hold a factorised model, so that engines need no code of ours.

A container fixes the gate formula, and with K < E the formula shapes what is learned: it is chosen before
distillation. Of an expert only the down projection may be rescaled (its activation is not linear), so what a formula
multiplies the chosen experts by under equal scores is divided out there. With a router of zeros the chosen experts of

    softmax        weigh 1/E: c = E, for any K        (Qwen2-MoE without renormalisation)
    softmax_topk   weigh 1/K: c = K, for that K only  (Mixtral, Qwen3-MoE, GraniteMoe)
    sigmoid        weigh 1/2: c = 2, for any K        (GLM4-MoE without renormalisation)

so that K = E is the dense model exactly. Names on disk are those that transformers' own `save_pretrained` writes,
which are also those that vLLM, SGLang and llama.cpp read. Why each rule is as it is: docs/containers.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffn2moe.checkpoint import FORMAT, SPEC_FILE, copy_assets, load_spec
from ffn2moe.dense import DenseFFN, require_representable, weight_files
from ffn2moe.experts import neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe import MoEFFN, moe_layers
from ffn2moe.partition import contiguous
from ffn2moe.router import neutral_scale
from ffn2moe.spec import FFNShape, Gate, MoESpec

SHARD_BYTES = 5 * 2**30
# A router this much smaller chooses the same experts and weighs them nearly alike: unit gates in any container.
NEAR_UNIT = 2.0**-10
_FFN_NAME = re.compile(r"model\.layers\.\d+\.mlp\.")
# Rotary frequencies that old checkpoints carry; every model computes them.
_COMPUTED_NAME = re.compile(r".*\.rotary_emb\.inv_freq")
# What containers are written in, and what safetensors calls it.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Container:
    """A mixture architecture of transformers, and how a layer of it is named on disk (under `model.layers.N.`)."""

    name: str  # config.model_type
    config_class: str
    model_class: str
    gate: Gate  # how it weighs the chosen experts, as it is written here
    shared: Literal["none", "gated", "plain"]  # gated: times sigmoid of a linear map, which is 1/2 at weight 0
    choice_bias: bool  # a bias that shifts the choice only: the balance bias
    router: str
    experts: tuple[str, ...]  # gate, up and down of expert {}; or (gate and up, down) of all experts together
    shared_expert: tuple[str, ...] = ()  # likewise
    shared_minimum: int = 0  # engines want a shared expert: where none is wanted one of zeros, this wide, is written
    ties: bool = True  # whether every engine reads tied embeddings
    router_bias: bool = False  # none has one
    width_multiple: int = 8  # of expert and shared widths: transformers' grouped_mm wants strides of 16 bytes


def _projections(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down"))


CONTAINERS: dict[str, Container] = {
    container.name: container
    for container in (
        Container(
            name="mixtral",
            config_class="MixtralConfig",
            model_class="MixtralForCausalLM",
            gate="softmax_topk",
            shared="none",
            choice_bias=False,
            router="block_sparse_moe.gate.weight",
            experts=tuple(f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2")),
        ),
        Container(
            name="qwen2_moe",
            config_class="Qwen2MoeConfig",
            model_class="Qwen2MoeForCausalLM",
            gate="softmax",
            shared="gated",
            choice_bias=False,
            router="mlp.gate.weight",
            experts=_projections("mlp.experts.{}"),
            shared_expert=_projections("mlp.shared_expert"),
            shared_minimum=8,
            ties=False,
        ),
        Container(
            name="qwen3_moe",
            config_class="Qwen3MoeConfig",
            model_class="Qwen3MoeForCausalLM",
            gate="softmax_topk",
            shared="none",
            choice_bias=False,
            router="mlp.gate.weight",
            experts=_projections("mlp.experts.{}"),
        ),
        Container(
            name="glm4_moe",
            config_class="Glm4MoeConfig",
            model_class="Glm4MoeForCausalLM",
            gate="sigmoid",
            shared="plain",
            choice_bias=True,
            router="mlp.gate.weight",
            experts=_projections("mlp.experts.{}"),
            shared_expert=_projections("mlp.shared_experts"),
            shared_minimum=8,
        ),
        Container(
            name="granitemoeshared",
            config_class="GraniteMoeSharedConfig",
            model_class="GraniteMoeSharedForCausalLM",
            gate="softmax_topk",
            shared="plain",
            choice_bias=False,
            router="block_sparse_moe.router.layer.weight",
            experts=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
            shared_expert=("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
        ),
    )
}
# Dense families that a container can hold, each with the containers in order of preference.
SOURCES: dict[str, tuple[str, ...]] = {
    "llama": ("mixtral", "glm4_moe", "granitemoeshared", "qwen2_moe"),
    "mistral": ("mixtral", "glm4_moe", "granitemoeshared", "qwen2_moe"),
    "qwen2": ("qwen2_moe", "glm4_moe"),
    "qwen3": ("qwen3_moe", "glm4_moe"),
}


def container_named(name: str) -> Container:
    """A container by its name; ValueError with the list of them for any other."""
    if name not in CONTAINERS:
        raise ValueError(f"there is no container {name!r}; there are: {', '.join(CONTAINERS)}")
    return CONTAINERS[name]


# ---------------------------------------------------------------------------------------------------------------------
# What holds what


def fits(
    container: Container, config: Any, *, shared_width: int = 0, balance: bool = False, spec: MoESpec | None = None
) -> str | None:
    """The property of a dense model that forbids this container, as the end of "it cannot, because ..."; or None.

    `config` is that of the dense model, `shared_width` the neurons of the shared expert, `balance` whether a bias may
    shift the choice. A `spec` is held against the container too, and brings its own shared width.
    """
    family = config.model_type
    if family not in SOURCES:
        return (
            f"it is a {family!r} model, and containers hold {', '.join(SOURCES)} (gated FFNs without biases): export "
            "it to ONNX, or keep it in this project's own format"
        )
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act!r}, and engines run experts with silu only"
    if getattr(config, "mlp_bias", False):
        return "its FFNs have biases (mlp_bias), which experts do not"
    rope = _rope_obstacle(config)
    if rope:
        return rope
    windows = _windows(config)
    if any(windows):
        if container.name in ("glm4_moe", "granitemoeshared"):
            return f"it has a sliding window ({max(windows)} tokens)"
        if container.name != "qwen2_moe" and len(set(windows)) > 1:
            return "only some of its layers have a sliding window"
    qkv_bias, o_bias = _attention_biases(config)
    if o_bias and container.name not in ("granitemoeshared", "qwen3_moe"):
        return "its attention has biases, on the output projection too (attention_bias)"
    if qkv_bias and not o_bias and container.name in ("mixtral", "granitemoeshared"):
        return "its attention has biases on queries, keys and values"
    if (family == "qwen3") != (container.name == "qwen3_moe") and container.name != "glm4_moe":
        return "it normalises queries and keys" if family == "qwen3" else "it does not normalise queries and keys"
    if container.name in ("qwen2_moe", "granitemoeshared") and _head_dim(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        return f"its heads are {_head_dim(config)} wide, not hidden_size / num_attention_heads"
    shared_width = spec.shared_width if spec and len(spec.stacks) == 1 else shared_width
    if shared_width and container.shared == "none":
        return f"a shared expert ({shared_width} neurons) is wanted, and it has none"
    if balance and not container.choice_bias:
        return "a balance bias is wanted, and its router has no bias for the choice"
    return _spec_obstacle(container, spec) if spec else None


def _spec_obstacle(container: Container, spec: MoESpec) -> str | None:
    if spec.head != "causal":
        return f"the head is {spec.head!r}, and containers are causal language models"
    if len(spec.stacks) != 1:
        return f"the model has {len(spec.stacks)} stacks of layers, and a container has one"
    if not spec.gated or spec.activation != "silu":
        return f"its experts are {'' if spec.gated else 'not '}gated with {spec.activation}, not gated with silu"
    if spec.router_bias:
        return "the router has a trained bias, and containers have none: factorise with router_bias off"
    if spec.gate not in ("unit", container.gate):
        return f"the gate is {spec.gate!r}, and it weighs experts by {container.gate!r}"
    return None


def _rope_obstacle(config: Any) -> str | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if kind is None:
        return "its rotary embedding differs from layer to layer"
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        return f"its rotary embedding is of kind {kind!r}, not one of default, {', '.join(ROPE_INIT_FUNCTIONS)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"it rotates a part of each head only (partial_rotary_factor {rope['partial_rotary_factor']})"
    return None


def _windows(config: Any) -> list[int]:
    """Sliding window of each layer in tokens, 0 for none."""
    window = getattr(config, "sliding_window", None) or 0
    if config.model_type in ("llama", "mistral"):
        return [window if config.model_type == "mistral" else 0] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in config.layer_types]


def _attention_biases(config: Any) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output projection has one."""
    if config.model_type == "qwen2":
        return True, False
    both = bool(getattr(config, "attention_bias", False))
    return both, both


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def choose(config: Any, *, shared_width: int = 0, balance: bool = False) -> tuple[Container, str]:
    """The container for a dense model, and a sentence that says why.

    ValueError, naming what forbids each, if none can hold it.
    """
    order = [CONTAINERS[name] for name in SOURCES.get(config.model_type, tuple(CONTAINERS))]
    if shared_width:
        order.sort(key=lambda container: container.shared != "plain")
    obstacles: list[tuple[Container, str]] = []
    for container in order:
        reason = fits(container, config, shared_width=shared_width, balance=balance)
        if reason is None:
            why = f"{container.name}, as the model is a {config.model_type}"
            wanted = [f"a shared expert of {shared_width} neurons"] * bool(shared_width) + ["a balance bias"] * balance
            if wanted:
                why += f" and {' and '.join(wanted)} is wanted"
            passed = [f"{other.name} cannot, because {what}" for other, what in obstacles]
            return container, "; ".join([f"{why}: it weighs experts by {container.gate}", *passed])
        obstacles.append((container, reason))
    reasons = list(dict.fromkeys(reason for _, reason in obstacles))
    if len(reasons) == 1:
        raise ValueError(f"no container can hold this model, because {reasons[0]}")
    each = "; ".join(f"{container.name} cannot, because {reason}" for container, reason in obstacles)
    raise ValueError(f"no container can hold this model: {each}")


def require_fit(
    container: Container, config: Any, *, shared_width: int = 0, balance: bool = False, spec: MoESpec | None = None
) -> None:
    """ValueError, with the property that forbids it and the containers that can hold it, if it does not fit."""
    reason = fits(container, config, shared_width=shared_width, balance=balance, spec=spec)
    if reason is None:
        return
    able = [
        name
        for name, other in CONTAINERS.items()
        if fits(other, config, shared_width=shared_width, balance=balance, spec=spec) is None
    ]
    others = f"{' or '.join(able)} can" if able else "no container can"
    raise ValueError(f"{container.name} cannot hold this model, because {reason}; {others}")


def engine_notes(container: Container, config: Any) -> list[str]:
    """What engines other than transformers are known to do differently with this container of this model.

    From their sources (docs/containers.md says which); empty where nothing is known.
    """
    notes = []
    if any(_windows(config)):
        engines = "llama.cpp and vLLM read" if container.name == "qwen2_moe" else "llama.cpp reads"
        notes.append(f"{engines} no sliding window here: answers differ once the context is longer than the window")
    if config.rope_parameters["rope_type"] == "llama3" and container.name not in ("mixtral", "granitemoeshared"):
        notes.append("llama.cpp keeps the llama3 rotary scaling of mixtral and granitemoeshared only")
    if container.name == "granitemoeshared" and any(_attention_biases(config)):
        notes.append("vLLM's granitemoeshared has no attention biases and refuses the file")
    if container.name == "glm4_moe":
        notes.append("llama.cpp converts glm4_moe with a GLM tokenizer only")
        notes.append(
            "SGLang's fused router renormalises sigmoid gates whatever the config says, where E is a power of two up "
            "to 32: take another E, or unit gates"
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Config and tensors


def _padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def expert_width(container: Container, spec: MoESpec) -> int:
    """M on disk: that of the spec, rounded up to what kernels want."""
    return _padded(spec.expert_width, container.width_multiple)


def shared_width(container: Container, spec: MoESpec) -> int:
    """S on disk. GLM4-MoE counts shared experts as wide as the routed ones, so S is a multiple of M there."""
    multiple = expert_width(container, spec) if container.name == "glm4_moe" else container.width_multiple
    return _padded(max(spec.shared_width, container.shared_minimum), multiple)


def native_config(container: Container, config: Any, spec: MoESpec) -> Any:
    """The container's transformers config for a factorised model whose dense config this is.

    Every layer is a mixture. ValueError if the container cannot hold the model.
    """
    import transformers

    require_fit(container, config, spec=spec)
    copied = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout"),
        *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    )
    values: dict[str, Any] = {key: getattr(config, key) for key in copied}
    values |= {
        "architectures": [container.model_class],
        "rope_parameters": deepcopy(config.rope_parameters),
        "num_experts_per_tok": spec.num_active,
        "tie_word_embeddings": config.tie_word_embeddings and container.ties,
    }
    if container.name != "granitemoeshared":  # engines know heads of D / H only there, and it has no such key
        values["head_dim"] = _head_dim(config)
    M, S, E = expert_width(container, spec), shared_width(container, spec), spec.num_experts
    windows = _windows(config)
    sparse = {"moe_intermediate_size": M, "intermediate_size": spec.ffn_width}
    every_layer = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    match container.name:
        case "mixtral":
            values |= {"intermediate_size": M, "num_local_experts": E, "sliding_window": max(windows) or None}
        case "qwen2_moe":
            values |= sparse | every_layer | {"num_experts": E, "norm_topk_prob": False, "qkv_bias": True}
            values |= {"shared_expert_intermediate_size": S}
            values |= {"use_sliding_window": any(windows), "sliding_window": max(windows), "max_window_layers": 0}
            values |= {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}
        case "qwen3_moe":
            values |= sparse | every_layer | {"num_experts": E, "norm_topk_prob": True}
            values |= {"attention_bias": any(_attention_biases(config))}
            values |= {"use_sliding_window": any(windows), "sliding_window": max(windows) or None}
        case "glm4_moe":
            values |= sparse | {"n_routed_experts": E, "n_shared_experts": S // M, "n_group": 1, "topk_group": 1}
            values |= {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "routed_scaling_factor": 1.0}
            values |= {"attention_bias": any(_attention_biases(config)), "use_qk_norm": config.model_type == "qwen3"}
            values |= {"norm_topk_prob": spec.gate == "unit"}
            values["rope_parameters"]["partial_rotary_factor"] = 1.0  # its default is 0.5
        case "granitemoeshared":
            values |= {"intermediate_size": M, "num_local_experts": E, "shared_intermediate_size": S}
            values |= {"attention_bias": any(_attention_biases(config))}
            values |= {"attention_multiplier": _head_dim(config) ** -0.5, "embedding_multiplier": 1.0}
            values |= {"residual_multiplier": 1.0, "logits_scaling": 1.0}
    return getattr(transformers, container.config_class)(**values)


def layer_tensors(container: Container, spec: MoESpec, layer: int, moe: MoEFFN) -> dict[str, Tensor]:
    """One mixture under the container's names on disk, float32, the output scale folded into the down projections.

    ValueError for a layer that is not as the spec says, or that has what the container cannot hold.
    """
    _require_layer(container, spec, layer, moe)
    M, S, D = expert_width(container, spec), shared_width(container, spec), spec.width
    router_ED, bias_E, scale = _router(container, spec, moe)
    up_EMD, down_EDM = _float(moe.w_in), scale * _float(moe.w_out)
    assert moe.w_gate is not None
    gate_EMD = _float(moe.w_gate)
    tensors = {container.router: router_ED}
    if container.choice_bias:
        tensors["mlp.gate.e_score_correction_bias"] = bias_E
    gate_EMD, up_EMD, down_EDM = _pad(gate_EMD, M, 1), _pad(up_EMD, M, 1), _pad(down_EDM, M, 2)
    if len(container.experts) == 2:
        values: tuple[Tensor, ...] = (torch.cat([gate_EMD, up_EMD], dim=1), down_EDM)
        tensors |= dict(zip(container.experts, values, strict=True))
    else:
        for expert in range(spec.num_experts):
            values = (gate_EMD[expert], up_EMD[expert], down_EDM[expert])
            tensors |= {name.format(expert): value for name, value in zip(container.experts, values, strict=True)}
    if S:
        empty = torch.zeros(0, D)
        gate_SD = _pad(_float(moe.shared_gate) if moe.shared_gate is not None else empty, S, 0)
        up_SD = _pad(_float(moe.shared_in) if moe.shared_in is not None else empty, S, 0)
        down_DS = _pad(_float(moe.shared_out) if moe.shared_out is not None else empty.T, S, 1)
        if container.shared == "gated":
            down_DS = 2 * down_DS
            # llama.cpp computes the sigmoid as silu(z) / z: a weight of 0 would give 0 / 0. This one is exact enough
            # (z changes the gate by z / 2), in every dtype, and cannot cancel out over a token's dimensions.
            tensors["mlp.shared_expert_gate.weight"] = torch.linspace(1, 2, D).unsqueeze(0) * 2.0**-24
        values = (torch.cat([gate_SD, up_SD]), down_DS)
        if len(container.shared_expert) == 3:
            values = (gate_SD, up_SD, down_DS)
        tensors |= dict(zip(container.shared_expert, values, strict=True))
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _router(container: Container, spec: MoESpec, moe: MoEFFN) -> tuple[Tensor, Tensor, Tensor]:
    """Router weight [E, D], choice bias [E] and the factor of the down projections, as the container needs them.

    Unit gates become nearly unit: with scores s the chosen of a renormalised container weigh
    ``K softmax(e s) = 1 + e (s_i - mean of the chosen s) + O(e^2)``, e = 2^-10.
    """
    weight_ED, _ = moe.router.folded()
    scale, bias_E = _float(moe.output_scale), _float(moe.router.balance_bias)
    if spec.gate == container.gate:
        return weight_ED.float(), bias_E, scale
    # GLM4-MoE renormalises here (norm_topk_prob), as every engine does so in the same way. sigmoid(e s) is
    # 1/2 + e s / 4 to first order, so a bias on s is a quarter as much there.
    formula: Gate = "softmax" if container.gate == "softmax" else "softmax_topk"
    scale = scale * neutral_scale(formula, spec.num_experts, spec.num_active)
    return NEAR_UNIT * weight_ED.float(), NEAR_UNIT / 4 * bias_E, scale


def _require_layer(container: Container, spec: MoESpec, layer: int, moe: MoEFFN) -> None:
    shape = spec.shape_of(layer)
    expected = (spec.num_experts, shape.expert_width, shape.width)
    if tuple(moe.w_in.shape) != expected or moe.num_active != spec.num_active:
        raise ValueError(
            f"layer {layer} has [E, M, D] = {list(moe.w_in.shape)} and K = {moe.num_active}, the spec {list(expected)} "
            f"and K = {spec.num_active}: a container has the same experts in every layer; pad narrow experts with zero "
            "neurons, which is exact"
        )
    if moe.w_gate is None or moe.gate != spec.gate:
        raise ValueError(f"layer {layer} is not the gated mixture with {spec.gate!r} gates that the spec describes")
    biases = (moe.b_in, moe.b_gate, moe.b_out, moe.router.bias, moe.shared_b_in, moe.shared_b_gate)
    if any(bias is not None and bool(bias.any()) for bias in biases):
        raise ValueError(f"layer {layer} has biases in its experts or its router, which {container.name} does not hold")
    if not container.choice_bias and bool(moe.router.balance_bias.any()):
        raise ValueError(
            f"layer {layer} has a balance bias, which {container.name} does not hold: glm4_moe does, or train without"
        )


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _pad(tensor: Tensor, width: int, dim: int) -> Tensor:
    """The tensor with zero neurons up to `width` along `dim`."""
    missing = list(tensor.shape)
    missing[dim] = width - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dim) if missing[dim] else tensor


def outer_tensors(
    container: Container, config: Any, source: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Everything of a dense causal model that is not an FFN, a tensor at a time, under the container's names.

    `source` is the state dict of the dense model or of the student, or pairs as they are read from shards. Biases that
    the container always has are added as zeros; an output matrix that engines cannot tie is written out.
    """
    qkv_bias, _ = _attention_biases(config)
    wants_qkv = container.name == "qwen2_moe" or qkv_bias
    tied = config.tie_word_embeddings
    for name, tensor in source.items() if isinstance(source, Mapping) else source:
        if _FFN_NAME.match(name) or _COMPUTED_NAME.match(name) or (tied and name == "lm_head.weight"):
            continue
        yield {name: tensor}
        if tied and not container.ties and name == "model.embed_tokens.weight":
            yield {"lm_head.weight": tensor}
        is_qkv = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        if is_qkv and wants_qkv and not qkv_bias:
            yield {name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[0])}


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


class Shards(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by name, each read from its safetensors shard when it is asked for.

    FileNotFoundError for a shard that is missing, ValueError for one that is damaged, for a name that two shards hold
    and for one that an index promises in vain.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import SafetensorError

        try:
            self._file_of = weight_files(folder)
        except SafetensorError as error:
            raise ValueError(f"a shard of {folder} cannot be read ({error}): fetch it again") from error
        self._layouts: dict[str, tuple[tuple[int, ...], str]] = {}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        # Opened anew each time: a file that stays mapped stays in memory, page by page as it is read.
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def layout(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, from the header of its shard."""
        from safetensors import safe_open

        if name not in self._layouts:
            with safe_open(self._file_of[name], framework="pt") as file:
                for held in file.keys():  # noqa: SIM118
                    view = file.get_slice(held)
                    self._layouts[held] = tuple(view.get_shape()), view.get_dtype()
        return self._layouts[name]


class _ShardWriter:
    """Tensors into numbered shards, no more than one of which is in memory."""

    def __init__(self, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total_bytes = self.shards = 0
        self.shard_of: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.shard_of or name in self.held:
            raise ValueError(f"{name} is written twice: the source holds it twice, or a layer was given twice")
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else self.dtype
        tensor = tensor.detach().cpu()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has NaN or infinite values: the weights are damaged")
        require_representable(tensor, dtype, name)
        # A copy: two names may stand for one tensor, and a view would keep its whole storage in memory.
        tensor = tensor.to(dtype, copy=True).contiguous()
        if self.held and self.held_bytes + tensor.nbytes > self.shard_bytes:
            self.flush()
        self.held[name] = tensor
        self.held_bytes += tensor.nbytes

    def flush(self) -> None:
        from safetensors.torch import save_file

        self.shards += 1
        path = self.folder / f"model-{self.shards:05d}.safetensors"
        save_file(self.held, path, metadata={"format": "pt"})
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        self.shard_of |= dict.fromkeys(self.held, self.shards)
        self.total_bytes += self.held_bytes
        self.held, self.held_bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, give the shards their names and, where there are several, an index."""
        if self.held:
            self.flush()
        names = {
            shard: "model.safetensors" if self.shards == 1 else f"model-{shard:05d}-of-{self.shards:05d}.safetensors"
            for shard in range(1, self.shards + 1)
        }
        for shard, name in names.items():
            os.replace(self.folder / f"model-{shard:05d}.safetensors", self.folder / name)
        if self.shards > 1:
            weight_map = {name: names[shard] for name, shard in sorted(self.shard_of.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write(
    folder: str | Path,
    container: Container,
    spec: MoESpec,
    config: Any,
    pieces: Iterable[Mapping[str, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    assets: str | Path | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a container from tensors that arrive piece by piece; memory is bounded by a shard and a piece.

    `config` is that of the dense model; `pieces` are what `layer_tensors` and `outer_tensors` give, in any order.
    `assets` is the dense model's folder, from which tokenizer, chat template, generation config and licence are
    copied; without it a `tokenizer` saves itself. Everything is written to a hidden folder beside `folder`, audited,
    and renamed at the end: a folder of that name is whole. ValueError if the container cannot hold the model, the
    folder is taken, a tensor overflows the dtype, or the audit fails.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"containers are written in float32, bfloat16 or float16, not in {dtype}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: remove it, or name another")
    native = native_config(container, config, spec)
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards = _ShardWriter(partial, dtype, shard_bytes)
        for piece in pieces:
            for name, tensor in piece.items():
                shards.add(name, tensor)
        shards.finish()
        _write_config(partial, container, native, dtype)
        _write_assets(partial, native, assets, tokenizer)
        described = {"format": FORMAT, "container": container.name, "spec": spec.to_dict()}
        (partial / SPEC_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        audit(partial)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def save(
    model: nn.Module,
    spec: MoESpec,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    assets: str | Path | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a student, a causal model whose FFNs are mixtures, as the container that its spec names."""
    container = _container_of(spec)
    layers = moe_layers(model)
    if len(layers) != spec.num_layers:
        raise ValueError(f"the model has {len(layers)} mixtures, its spec {spec.num_layers}")
    pieces = chain(
        outer_tensors(container, model.config, model.state_dict()),
        (layer_tensors(container, spec, layer, moe) for layer, moe in enumerate(layers)),
    )
    options: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes, "assets": assets, "tokenizer": tokenizer}
    return write(folder, container, spec, model.config, pieces, **options)


def save_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint of this project as the container that its spec names, one layer in memory at a time."""
    from transformers import AutoConfig

    spec = load_spec(checkpoint)
    container = _container_of(spec)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if config.model_type in CONTAINERS:
        raise ValueError(f"{checkpoint} is a {config.model_type} container already: copy it")
    source = Shards(checkpoint)

    def mixtures() -> Iterator[dict[str, Tensor]]:
        for layer in range(spec.num_layers):
            prefix = f"model.layers.{layer}.mlp."
            held = {name.removeprefix(prefix): source[name] for name in source if name.startswith(prefix)}
            moe = MoEFFN(spec, layer, b_in="b_in" in held, b_out="b_out" in held, b_gate="b_gate" in held)
            moe.load_state_dict(held)
            yield layer_tensors(container, spec, layer, moe)

    pieces = chain(outer_tensors(container, config, source), mixtures())
    return write(folder, container, spec, config, pieces, dtype=dtype, shard_bytes=shard_bytes, assets=checkpoint)


def _container_of(spec: MoESpec) -> Container:
    if spec.container is None:
        raise ValueError("the spec names no container: it is chosen before distillation, as it fixes the gate formula")
    return container_named(spec.container)


def _write_config(folder: Path, container: Container, native: Any, dtype: torch.dtype) -> None:
    native.dtype = dtype
    native.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    # transformers 4, which engines still build on, looks for these under their old names, and would silently take
    # its own defaults (theta 10,000 or 1,000,000) for what it does not find. transformers 5 reads both.
    rope = values["rope_parameters"]
    values |= {"rope_theta": rope["rope_theta"], "torch_dtype": values["dtype"]}
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        values["rope_scaling"] = rope
    if container.name == "qwen3_moe":
        values["num_experts"] = values["num_local_experts"]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_assets(folder: Path, native: Any, assets: str | Path | None, tokenizer: Any) -> None:
    from transformers import GenerationConfig

    if assets is not None:
        copy_assets(assets, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(native).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Proofs


def audit(folder: str | Path) -> None:
    """ValueError unless the folder's files hold every tensor that the transformers class expects, and nothing else.

    Both ways, with shapes and dtypes, from the headers of the shards and from the class on the meta device: no weight
    is read. The expected names are those that transformers itself would write.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text())
    if values.get("model_type") not in CONTAINERS:
        raise ValueError(f"{folder} is not a container: its model_type is {values.get('model_type')!r}")
    if "auto_map" in values:
        raise ValueError(f"{folder}/config.json asks for code of its own (auto_map), which no container needs")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    expected = dict(model.state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    expected = revert_weight_conversion(model, expected)
    shards = Shards(folder)
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(shards))]
    problems += [f"{name} is not of this class" for name in sorted(set(shards) - set(expected))]
    for name in sorted(set(expected) & set(shards)):
        wanted = (tuple(expected[name].shape), DTYPES[expected[name].dtype])
        if shards.layout(name) != wanted:
            problems.append("{} is {} {}, not {} {}".format(name, *shards.layout(name), *wanted))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = set(json.loads(index.read_text())["weight_map"])
        problems += [f"{name} is not in {index.name}" for name in sorted(set(shards) - listed)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder} is not a whole {config.model_type} model: {'; '.join(problems[:3])}{more}")


@dataclass(frozen=True)
class Agreement:
    """How far the logits of two models are apart. The relative difference is that of each position, of its largest
    logit: ``max |a - b| / max |b|``."""

    largest: float  # of the relative differences
    mean: float
    top1: float  # share of positions with the same most probable token
    positions: int


def compare(logits_BLV: Tensor, reference_BLV: Tensor) -> Agreement:
    """The agreement of two models' logits on the same tokens."""
    difference = (logits_BLV - reference_BLV).abs().amax(-1) / reference_BLV.abs().amax(-1)
    same = logits_BLV.argmax(-1) == reference_BLV.argmax(-1)
    return Agreement(difference.max().item(), difference.mean().item(), same.float().mean().item(), same.numel())


def open_native(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A container in plain transformers, in eval mode. ValueError if a tensor is missing, left over or misshapen."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{folder} was loaded with {kind.replace('_', ' ')}: {sorted(report[kind])[:3]}")
    return model.eval()


@torch.no_grad()
def same_logits(student: nn.Module, folder: str | Path, ids_BL: Tensor) -> Agreement:
    """How a container's logits in plain transformers agree with those of the student it was written from, float32.

    Where two scores tie within rounding, the two may choose different experts and both are right: a position that
    differs, and those after it, says so in `largest` but hardly in `mean`.
    """
    return compare(open_native(folder)(ids_BL).logits, student.eval()(ids_BL).logits.float())


@torch.no_grad()
def preflight(
    container: Container,
    config: Any,
    source: Mapping[str, Tensor],
    *,
    num_experts: int = 4,
    shared_width: int = 0,
    layers: int = 2,
    tokens: int = 64,
    vocabulary: int = 1024,
    seed: int = 0,
) -> Agreement:
    """Prove that a container can hold a dense model: K = E with a router of zeros gives the dense logits.

    `source` holds the dense model's tensors by name (a state dict, or `Shards` of its folder). The first `layers`
    layers and `vocabulary` tokens of it are written as a container in a temporary folder and opened in plain
    transformers, so memory is bounded by them; a sliding window is narrowed so that `tokens` tokens feel it.
    """
    import transformers

    require_fit(container, config, shared_width=shared_width)
    small = deepcopy(config)
    small.num_hidden_layers = min(layers, config.num_hidden_layers)
    small.vocab_size = min(vocabulary, config.vocab_size)
    small.pad_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    if getattr(small, "sliding_window", None):
        small.sliding_window = min(small.sliding_window, tokens // 2)
    dense = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    wanted = [name for name in dense.state_dict() if name in source]
    lost = set(dense.state_dict()) - set(wanted) - ({"lm_head.weight"} if small.tie_word_embeddings else set())
    if lost:
        raise ValueError(f"the source lacks {sorted(lost)[0]}: it is incomplete, or config.json is another model's")
    dense.load_state_dict(
        {name: source[name][: small.vocab_size] if name in cut else source[name] for name in wanted}, strict=False
    )
    spec = MoESpec(
        family=config.model_type,
        model_class=type(dense).__name__,
        head="causal",
        stacks=(
            FFNShape(
                layers="layers",
                num_layers=small.num_hidden_layers,
                width=small.hidden_size,
                ffn_width=small.intermediate_size,
                expert_width=_padded(
                    _padded(small.intermediate_size - shared_width, num_experts) // num_experts,
                    container.width_multiple,
                ),
                shared_width=shared_width,
                gated=True,
                activation="silu",
            ),
        ),
        num_experts=num_experts,
        num_active=num_experts,
        gate=container.gate,
        router_bias=False,
        container=container.name,
        partition="contiguous",
        teacher="preflight",
        pooling=None,
        max_length=tokens,
    )
    expert_of_neuron_F = torch.full((spec.ffn_width,), -1)
    expert_of_neuron_F[shared_width:] = contiguous(spec.ffn_width - shared_width, num_experts)
    neurons_EM = neurons_by_expert(expert_of_neuron_F, num_experts, container.width_multiple)
    shared_S = shared_neurons(expert_of_neuron_F)

    def pieces() -> Iterator[Mapping[str, Tensor]]:
        yield from outer_tensors(container, small, dense.state_dict())
        for layer, block in enumerate(dense.model.layers):
            mlp = block.mlp
            ffn = DenseFFN(mlp.up_proj.weight, mlp.down_proj.weight, "silu", w_gate_FD=mlp.gate_proj.weight)
            experts = slice_experts(ffn, neurons_EM, shared_S)
            yield layer_tensors(
                container, spec, layer, MoEFFN.from_experts(spec, experts, neurons_EM, shared_S=shared_S)
            )

    ids_BL = torch.randint(small.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary) / "container", container, spec, small, pieces())
        return compare(open_native(folder)(ids_BL).logits, dense(ids_BL).logits)
