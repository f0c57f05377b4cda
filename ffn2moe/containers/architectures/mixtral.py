"""Mixtral: the first choice for Llama and Mistral models without a shared expert."""

from __future__ import annotations

from typing import Any

from ffn2moe.containers.container import Container, Names
from ffn2moe.containers.dense_model import DenseModel
from ffn2moe.spec import MoESpec


def config_values(dense: DenseModel, spec: MoESpec, M: int, S: int) -> dict[str, Any]:
    """Return the config keys of Mixtral."""
    return {
        "head_dim": dense.head_width,
        "intermediate_size": M,
        "num_local_experts": spec.num_experts,
        "sliding_window": max(dense.windows) or None,
    }


ROW = Container(
    name="mixtral",
    config_class="MixtralConfig",
    model_class="MixtralForCausalLM",
    families={"llama": 0, "mistral": 0},
    gate="softmax_topk",
    windows="one",
    router="block_sparse_moe.gate.weight",
    experts=Names(*(f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2"))),
    config_values=config_values,
    llama3_rope=True,
)
