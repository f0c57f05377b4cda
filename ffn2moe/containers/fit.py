"""Tell which container holds a model, and why another does not."""

from __future__ import annotations

from typing import Any

from ffn2moe.containers.table import CONTAINERS, SOURCES, Container
from ffn2moe.spec import MoESpec

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
    windows = sliding_windows(config)
    if any(windows):
        if container.name in ("glm4_moe", "granitemoeshared"):
            return f"it has a sliding window ({max(windows)} tokens)"
        if container.name != "qwen2_moe" and len(set(windows)) > 1:
            return "only some of its layers have a sliding window"
    qkv_bias, o_bias = attention_biases(config)
    if o_bias and container.name not in ("granitemoeshared", "qwen3_moe"):
        return "its attention has biases, on the output projection too (attention_bias)"
    if qkv_bias and not o_bias and container.name in ("mixtral", "granitemoeshared"):
        return "its attention has biases on queries, keys and values"
    if (family == "qwen3") != (container.name == "qwen3_moe") and container.name != "glm4_moe":
        return "it normalises queries and keys" if family == "qwen3" else "it does not normalise queries and keys"
    if container.name in ("qwen2_moe", "granitemoeshared") and head_dim_of(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        return f"its heads are {head_dim_of(config)} wide, not hidden_size / num_attention_heads"
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


def sliding_windows(config: Any) -> list[int]:
    """Sliding window of each layer in tokens, 0 for none."""
    window = getattr(config, "sliding_window", None) or 0
    if config.model_type in ("llama", "mistral"):
        return [window if config.model_type == "mistral" else 0] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in config.layer_types]


def attention_biases(config: Any) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output projection has one."""
    if config.model_type == "qwen2":
        return True, False
    both = bool(getattr(config, "attention_bias", False))
    return both, both


def head_dim_of(config: Any) -> int:
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
    if any(sliding_windows(config)):
        engines = "llama.cpp and vLLM read" if container.name == "qwen2_moe" else "llama.cpp reads"
        notes.append(f"{engines} no sliding window here: answers differ once the context is longer than the window")
    if config.rope_parameters["rope_type"] == "llama3" and container.name not in ("mixtral", "granitemoeshared"):
        notes.append("llama.cpp keeps the llama3 rotary scaling of mixtral and granitemoeshared only")
    if container.name == "granitemoeshared" and any(attention_biases(config)):
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


def padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def expert_width(container: Container, spec: MoESpec) -> int:
    """M on disk: that of the spec, rounded up to what kernels want."""
    return padded(spec.expert_width, container.width_multiple)


def shared_width(container: Container, spec: MoESpec) -> int:
    """S on disk. GLM4-MoE counts shared experts as wide as the routed ones, so S is a multiple of M there."""
    multiple = expert_width(container, spec) if container.name == "glm4_moe" else container.width_multiple
    return padded(max(spec.shared_width, container.shared_minimum), multiple)
