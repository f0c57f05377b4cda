"""Qwen3-MoE: the first choice for Qwen3 models without a shared expert."""

from __future__ import annotations

from typing import Any

from ffn2moe.containers.container import Container, Names
from ffn2moe.containers.dense_model import DenseModel
from ffn2moe.spec import MoESpec


def config_values(dense: DenseModel, spec: MoESpec, M: int, S: int) -> dict[str, Any]:
    """Return the config keys of Qwen3-MoE. llama.cpp always renormalises its gates, so `norm_topk_prob` is true."""
    windows = dense.windows
    return {
        "head_dim": dense.head_width,
        "moe_intermediate_size": M,
        "intermediate_size": spec.ffn_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": spec.num_experts,
        "norm_topk_prob": True,
        "attention_bias": dense.query_bias,
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
    }


ROW = Container(
    name="qwen3_moe",
    config_class="Qwen3MoeConfig",
    model_class="Qwen3MoeForCausalLM",
    families={"qwen3": 0},
    gate="softmax_topk",
    windows="one",
    attention_biases="all",
    query_norm="always",
    router="mlp.gate.weight",
    experts=Names.projections("mlp.experts.{}"),
    config_values=config_values,
    old_keys={"num_experts": "num_local_experts"},
)
