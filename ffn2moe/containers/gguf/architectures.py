"""List the architectures of llama.cpp that hold our models, by the transformers model they are made of.

What llama.cpp reads of each is from its sources, `src/models/NAME.cpp`, as they come with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ffn2moe.table import Table

SIGMOID = 2  # llama.cpp's number of this gate formula


@dataclass(frozen=True)
class Widths:
    """Neurons of the FFNs in the file: of each layer's experts, or of its dense FFN, and of the shared expert."""

    layers: tuple[int, ...]
    shared: int

    @property
    def varied(self) -> bool:
        """Whether layers differ."""
        return len(set(self.layers)) > 1

    @property
    def expert(self) -> int:
        """The widest layer's: that of all layers, where they do not differ."""
        return max(self.layers)


def _no_metadata(config: Any, widths: Widths) -> dict[str, Any]:
    return {}


def _none(config: Any) -> int:
    return 0


def _one_window(config: Any) -> int:
    return config.sliding_window or 0


def _window_of_layers(config: Any) -> int:
    return config.sliding_window or 0 if "sliding_attention" in (config.layer_types or ()) else 0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp reads a transformers model."""

    model_type: str  # of transformers
    name: str  # of llama.cpp, in metadata
    varied: str | None = None  # llama.cpp's name of the same with a width for each dense FFN; None: it has one width
    interleaved: bool = False  # rotates neighbouring numbers: rows of queries and keys are in another order
    rope_factors: bool = False  # reads factors of single rotary frequencies
    plain_heads: bool = False  # takes the width of a head as hidden_size / num_attention_heads
    output_bias: bool = False  # reads a bias of the attention's output projection
    experts: str | None = None  # config key with their number; None: its FFNs are dense
    width: str = "intermediate_size"  # config key with the neurons of an expert, or of the FFN
    shared: Callable[[Any], int] = _none  # neurons of the shared expert
    shared_in_experts: bool = False  # whether the shared width is counted in experts
    metadata: Callable[[Any, Widths], dict[str, Any]] = _no_metadata  # more keys, without "NAME."
    window: Callable[[Any], int] = _none  # tokens of the sliding window, which llama.cpp does not read


def _granite(config: Any, widths: Widths) -> dict[str, Any]:
    shared = {"expert_shared_feed_forward_length": widths.shared} if widths.shared else {}
    return shared | {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _qwen2_moe(config: Any, widths: Widths) -> dict[str, Any]:
    if config.norm_topk_prob:
        raise ValueError("it renormalises its gates (norm_topk_prob), which llama.cpp never does in a qwen2_moe")
    return {
        "expert_feed_forward_length": widths.expert,
        "expert_shared_feed_forward_length": widths.shared,
    }


def _qwen3_moe(config: Any, widths: Widths) -> dict[str, Any]:
    if not config.norm_topk_prob:
        raise ValueError("it does not renormalise its gates (norm_topk_prob), which llama.cpp always does in qwen3_moe")
    return {"expert_feed_forward_length": widths.expert}


def _glm4_moe(config: Any, widths: Widths) -> dict[str, Any]:
    return {
        "expert_feed_forward_length": widths.expert,
        "expert_shared_count": config.n_shared_experts,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "leading_dense_block_count": config.first_k_dense_replace,
    }


ARCHITECTURES: Table[Architecture] = Table("model type")
_LLAMA: dict[str, Any] = {"name": "llama", "interleaved": True, "rope_factors": True, "output_bias": True}
for _row in (
    Architecture(model_type="llama", varied="deci", **_LLAMA),
    Architecture(model_type="mistral", varied="deci", window=_one_window, **_LLAMA),
    Architecture(model_type="qwen2", name="qwen2", plain_heads=True, window=_window_of_layers),
    Architecture(model_type="qwen3", name="qwen3", window=_window_of_layers),
    Architecture(model_type="mixtral", experts="num_local_experts", window=_one_window, **_LLAMA),
    Architecture(
        model_type="granitemoeshared",
        experts="num_local_experts",
        shared=lambda config: config.shared_intermediate_size,
        metadata=_granite,
        **_LLAMA | {"name": "granitemoe"},
    ),
    Architecture(
        model_type="qwen2_moe",
        name="qwen2moe",
        plain_heads=True,
        experts="num_experts",
        width="moe_intermediate_size",
        shared=lambda config: config.shared_expert_intermediate_size,
        metadata=_qwen2_moe,
        window=_window_of_layers,
    ),
    Architecture(
        model_type="qwen3_moe",
        name="qwen3moe",
        experts="num_experts",
        width="moe_intermediate_size",
        metadata=_qwen3_moe,
        window=lambda config: (config.sliding_window or 0) if config.use_sliding_window else 0,
    ),
    Architecture(
        model_type="glm4_moe",
        name="glm4moe",
        experts="n_routed_experts",
        width="moe_intermediate_size",
        shared=lambda config: config.n_shared_experts * config.moe_intermediate_size,
        shared_in_experts=True,
        metadata=_glm4_moe,
    ),
):
    ARCHITECTURES.register(_row.model_type, _row)
