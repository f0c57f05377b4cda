"""Choose the container for a dense model, and explain why another cannot hold it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ffn2moe.containers.container import Container
from ffn2moe.containers.dense_model import DenseModel
from ffn2moe.containers.table import CONTAINERS, by_preference, dense_families
from ffn2moe.spec import MoESpec


def obstacle(container: Container, config: Any, *, shared_width: int = 0, spec: MoESpec | None = None) -> str | None:
    """Return the property of a dense model that forbids a container, as the end of "because ..."; None if it fits.

    `config` is the dense model's. `shared_width` is the number of neurons of the shared expert. A `spec` is checked
    too, and its own shared width is used.
    """
    dense = DenseModel(config)
    reason = _model_obstacle(dense) or container.obstacle(dense)
    if reason:
        return reason
    shared_width = spec.shared_width if spec and len(spec.stacks) == 1 else shared_width
    if shared_width and container.shared_expert is None:
        return f"a shared expert ({shared_width} neurons) is wanted, and it has none"
    return next(_spec_obstacles(container, spec), None) if spec else None


def choose(config: Any, *, shared_width: int = 0) -> tuple[Container, str]:
    """Return the container for a dense model, and a sentence that gives the reason.

    ValueError, with the obstacle of each container, if none can hold the model.
    """
    dense = DenseModel(config)
    general = _model_obstacle(dense)
    if general:
        raise ValueError(f"no container can hold this model, because {general}")
    order = by_preference(dense.family)
    if shared_width:
        order.sort(key=lambda container: not container.prefers_shared)
    rejected: list[str] = []
    for container in order:
        reason = obstacle(container, config, shared_width=shared_width)
        if reason is None:
            why = f"{container.name}, because the model is a {dense.family}"
            why += f" and a shared expert of {shared_width} neurons is wanted" if shared_width else ""
            return container, "; ".join([f"{why}: it weighs experts by {container.gate}", *rejected])
        rejected.append(f"{container.name} cannot, because {reason}")
    raise ValueError(f"no container can hold this model: {'; '.join(rejected)}")


def require_fit(container: Container, config: Any, *, shared_width: int = 0, spec: MoESpec | None = None) -> None:
    """ValueError, with the obstacle and the containers that can hold the model, if this container cannot."""
    reason = obstacle(container, config, shared_width=shared_width, spec=spec)
    if reason is None:
        return
    able = [
        other.name
        for other in by_preference(config.model_type)
        if obstacle(other, config, shared_width=shared_width, spec=spec) is None
    ]
    others = f"{' or '.join(able)} can" if able else "no container can"
    raise ValueError(f"{container.name} cannot hold this model, because {reason}; {others}")


def engine_notes(container: Container, config: Any) -> list[str]:
    """Return how engines other than transformers are known to differ with this container of this model.

    The notes come from the engines' sources (docs/containers.md names them); the list is empty where nothing is known.
    """
    dense = DenseModel(config)
    notes = []
    if any(dense.windows):
        *others, last = container.engines_without_windows
        engines = f"{' and '.join((*others, last))} read" + ("" if others else "s")
        notes.append(f"{engines} no sliding window here: answers differ once the context is longer than the window")
    if dense.rope["rope_type"] == "llama3" and not container.llama3_rope:
        able = " and ".join(row.name for row in CONTAINERS.rows() if row.llama3_rope)
        notes.append(f"llama.cpp keeps the llama3 rotary scaling of {able} only")
    return notes + container.engine_notes(dense)


def _model_obstacle(dense: DenseModel) -> str | None:
    """Return the property of a dense model that forbids every container."""
    if dense.family not in dense_families():
        return (
            f"it is a {dense.family!r} model, and containers hold {', '.join(dense_families())} (gated FFNs without "
            "biases): export it to ONNX, or keep it in this project's own format"
        )
    if dense.config.hidden_act not in ("silu", "swish"):
        return f"its activation is {dense.config.hidden_act!r}, and engines run experts with silu only"
    if getattr(dense.config, "mlp_bias", False):
        return "its FFNs have biases (mlp_bias), which experts do not"
    return _rope_obstacle(dense.rope)


def _rope_obstacle(rope: dict[str, Any]) -> str | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope.get("rope_type")
    if kind is None:
        return "its rotary embedding differs from layer to layer"
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        return f"its rotary embedding is of kind {kind!r}, not one of default, {', '.join(ROPE_INIT_FUNCTIONS)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"it rotates a part of each head only (partial_rotary_factor {rope['partial_rotary_factor']})"
    return None


def _spec_obstacles(container: Container, spec: MoESpec) -> Iterator[str]:
    if spec.head != "causal":
        yield f"the head is {spec.head!r}, and containers are causal language models"
    if len(spec.stacks) != 1:
        yield f"the model has {len(spec.stacks)} stacks of layers, and a container has one"
    if any(shape.varied for shape in spec.stacks):
        yield "its layers have different widths, and a container has one width"
    if not spec.gated or spec.activation != "silu":
        yield f"its experts are {'' if spec.gated else 'not '}gated with {spec.activation}, not gated with silu"
    if spec.router_bias:
        yield "the router has a trained bias, and containers have none: decompose with router_bias off"
    if spec.gate not in ("unit", container.gate):
        yield f"the gate is {spec.gate!r}, and it weighs experts by {container.gate!r}"
