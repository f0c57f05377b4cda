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

from dataclasses import dataclass
from typing import Literal

import torch

from ffn2moe.spec import Gate

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
