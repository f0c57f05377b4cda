"""GraniteMoeShared: for Llama and Mistral models that want a shared expert of any width, or have attention biases."""

from __future__ import annotations

from typing import Any

from ffn2moe.containers.container import Container, JoinedNames
from ffn2moe.containers.dense_model import DenseModel
from ffn2moe.spec import MoESpec


def config_values(dense: DenseModel, spec: MoESpec, M: int, S: int) -> dict[str, Any]:
    """Return the config keys of GraniteMoeShared. Its multipliers are set to do nothing; it has no `head_dim`."""
    return {
        "intermediate_size": M,
        "num_local_experts": spec.num_experts,
        "shared_intermediate_size": S,
        "attention_bias": dense.query_bias,
        "attention_multiplier": dense.head_width**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def engine_notes(dense: DenseModel) -> list[str]:
    """Return what vLLM does differently with attention biases."""
    return ["vLLM's granitemoeshared has no attention biases and refuses the file"] if dense.query_bias else []


ROW = Container(
    name="granitemoeshared",
    config_class="GraniteMoeSharedConfig",
    model_class="GraniteMoeSharedForCausalLM",
    families={"llama": 1, "mistral": 1},
    gate="softmax_topk",
    attention_biases="all",
    plain_heads=True,
    router="block_sparse_moe.router.layer.weight",
    experts=JoinedNames("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    shared_expert=JoinedNames("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
    config_values=config_values,
    llama3_rope=True,
    engine_notes=engine_notes,
)
