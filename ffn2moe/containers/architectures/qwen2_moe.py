"""Qwen2-MoE: for Qwen2 models, and for Llama and Mistral models with both windows and a shared expert."""

from __future__ import annotations

from typing import Any

from ffn2moe.containers.container import Container, Names
from ffn2moe.containers.dense_model import DenseModel
from ffn2moe.spec import MoESpec


def config_values(dense: DenseModel, spec: MoESpec, M: int, S: int) -> dict[str, Any]:
    """Return the config keys of Qwen2-MoE. llama.cpp never renormalises its gates, so `norm_topk_prob` is false."""
    windows = dense.windows
    return {
        "head_dim": dense.head_width,
        "moe_intermediate_size": M,
        "intermediate_size": spec.ffn_width,
        "shared_expert_intermediate_size": S,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": spec.num_experts,
        "norm_topk_prob": False,
        "qkv_bias": True,
        "use_sliding_window": any(windows),
        "sliding_window": max(windows),
        "max_window_layers": 0,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


ROW = Container(
    name="qwen2_moe",
    config_class="Qwen2MoeConfig",
    model_class="Qwen2MoeForCausalLM",
    families={"qwen2": 0, "llama": 3, "mistral": 3},
    gate="softmax",
    windows="per layer",
    attention_biases="queries",
    zero_query_biases=True,
    plain_heads=True,
    ties=False,
    router="mlp.gate.weight",
    experts=Names.projections("mlp.experts.{}"),
    shared_expert=Names.projections("mlp.shared_expert"),
    shared_gate="mlp.shared_expert_gate.weight",
    shared_minimum=8,
    config_values=config_values,
    engines_without_windows=("llama.cpp", "vLLM"),
)
