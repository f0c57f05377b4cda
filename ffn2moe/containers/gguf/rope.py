"""Carry the kinds of rotary embedding that llama.cpp computes as transformers does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ffn2moe.table import Table


@dataclass(frozen=True)
class Rope:
    """What a file says of a rotary embedding: metadata under "ARCHITECTURE.rope.", and tensors of factors."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what llama.cpp does differently


ROPES: Table[Callable[[Any, dict[str, Any]], Rope]] = Table("kind of rotary embedding")


def rope_of(config: Any, model_type: str, *, reads_factors: bool) -> Rope:
    """Return the rotary embedding of a transformers config. ValueError for a kind that llama.cpp cannot compute.

    `reads_factors` says whether llama.cpp reads factors of single frequencies for models of this type.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if kind not in ROPES:
        raise ValueError(
            f"its rotary embedding is of the kind {kind!r}, which llama.cpp does not compute: GGUF holds "
            f"{', '.join(ROPES.names())}; serve the folder with transformers or vLLM"
        )
    found = ROPES[kind](config, rope)
    if found.tensors and not reads_factors:
        raise ValueError(
            f"its rotary embedding is of the kind {kind!r}, whose factors llama.cpp does not read in a "
            f"{model_type}: convert to the container mixtral or granitemoeshared, or serve the folder with "
            "transformers or vLLM"
        )
    return Rope({"freq_base": float(rope["rope_theta"]), **found.metadata}, found.tensors, found.notes)


def _default(config: Any, rope: dict[str, Any]) -> Rope:
    return Rope()


def _linear(config: Any, rope: dict[str, Any]) -> Rope:
    return Rope({"scaling.type": "linear", "scaling.factor": float(rope["factor"])})


def _yarn(config: Any, rope: dict[str, Any]) -> Rope:
    """YaRN: llama.cpp takes the default slopes and rounds the corrected range to whole dimensions."""
    own = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
    changed = [f"{key} {rope[key]}" for key, value in own.items() if rope.get(key, value) not in (value, None)]
    if changed:
        raise ValueError(
            f"its rotary embedding is of the kind 'yarn' with {', '.join(changed)}, which llama.cpp does not read: "
            "serve the folder with transformers or vLLM"
        )
    factor = float(rope["factor"])
    metadata = {
        "scaling.type": "yarn",
        "scaling.factor": factor,
        "scaling.original_context_length": _original(config, rope),
    }
    if rope.get("attention_factor") is not None:  # llama.cpp multiplies its own by this
        metadata["scaling.attn_factor"] = float(rope["attention_factor"]) / (0.1 * math.log(factor) + 1)
    return Rope(metadata)


def _llama3(config: Any, rope: dict[str, Any]) -> Rope:
    """LLaMA 3: GGUF holds the factors by which the frequencies are divided."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dimensions = 2 * len(scaled)
    plain = float(rope["rope_theta"]) ** -(np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    return Rope(tensors={"rope_freqs.weight": (plain / scaled.double().numpy()).astype(np.float32)})


def _longrope(config: Any, rope: dict[str, Any]) -> Rope:
    """LongRoPE: llama.cpp takes the long factors where its context is longer than the original one."""
    original = _original(config, rope)
    attention = rope.get("attention_factor")
    if attention is None:
        factor = rope.get("factor") or config.max_position_embeddings / original
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        {
            "scaling.type": "longrope",
            "scaling.original_context_length": original,
            "scaling.attn_factor": float(attention),
        },
        {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], dtype=np.float32)
            for name in ("long", "short")
        },
        (f"with a context of more than {original} tokens llama.cpp takes the long factors for short texts, too",),
    )


def _original(config: Any, rope: dict[str, Any]) -> int:
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


for _name, _kind in (
    ("default", _default),
    ("linear", _linear),
    ("llama3", _llama3),
    ("longrope", _longrope),
    ("yarn", _yarn),
):
    ROPES.register(_name, _kind)
