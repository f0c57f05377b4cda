"""GLM4-MoE: for models without windows that want a shared expert or a balance bias."""

from __future__ import annotations

from typing import Any

from ffn2moe.containers.container import Container, Names
from ffn2moe.containers.dense_model import DenseModel
from ffn2moe.spec import MoESpec


def config_values(dense: DenseModel, spec: MoESpec, M: int, S: int) -> dict[str, Any]:
    """Return the config keys of GLM4-MoE.

    Unit gates are renormalised (`norm_topk_prob`), because every engine renormalises in the same way.
    `partial_rotary_factor` must be written: its default is 0.5.
    """
    return {
        "head_dim": dense.head_width,
        "moe_intermediate_size": M,
        "intermediate_size": spec.ffn_width,
        "n_routed_experts": spec.num_experts,
        "n_shared_experts": S // M,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 1.0,
        "attention_bias": dense.query_bias,
        "use_qk_norm": dense.query_norm,
        "norm_topk_prob": spec.gate == "unit",
        "rope_parameters": {**dense.rope, "partial_rotary_factor": 1.0},
    }


def engine_notes(dense: DenseModel) -> list[str]:
    """Return what llama.cpp and SGLang do differently with GLM4-MoE."""
    return [
        "llama.cpp's own converter takes glm4_moe with a GLM tokenizer only: use `ffn2moe gguf`",
        "SGLang's fused router renormalises sigmoid gates whatever the config says, where E is a power of two up to "
        "32: use another E, or unit gates",
    ]


ROW = Container(
    name="glm4_moe",
    config_class="Glm4MoeConfig",
    model_class="Glm4MoeForCausalLM",
    families={"llama": 2, "mistral": 2, "qwen2": 1, "qwen3": 1},
    gate="sigmoid",
    unit_gate="softmax_topk",
    choice_bias="mlp.gate.e_score_correction_bias",
    attention_biases="queries",
    query_norm="optional",
    router="mlp.gate.weight",
    experts=Names.projections("mlp.experts.{}"),
    shared_expert=Names.projections("mlp.shared_experts"),
    shared_minimum=8,
    shared_in_experts=True,
    config_values=config_values,
    engine_notes=engine_notes,
)
