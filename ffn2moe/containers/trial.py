"""Try a container on the first layers of a dense model before the whole model is decomposed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn2moe.containers.checks import Agreement, compare, open_native
from ffn2moe.containers.container import Container, padded
from ffn2moe.containers.fit import require_fit
from ffn2moe.containers.tensors import layer_tensors, outer_tensors
from ffn2moe.containers.write import write
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.experts import neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import FFNShape, MoESpec


@torch.no_grad()
def preflight(
    container: Container,
    config: Any,
    source: Mapping[str, Tensor],
    *,
    num_experts: int = 4,
    shared_width: int = 0,
    layers: int = 2,
    tokens: int = 64,
    vocabulary: int = 1024,
    seed: int = 0,
) -> Agreement:
    """Compare the container of a dense model with the dense model itself: with K = E and a router of zeros they agree.

    `source` holds the dense model's tensors by name (a state dict, or `Shards` of its folder). Its first `layers`
    layers and `vocabulary` tokens are written as a container to a temporary folder and opened in plain transformers,
    so memory holds only them. A sliding window is narrowed to half of `tokens`, so that it has an effect. ValueError
    if the container cannot hold the model or a tensor is missing.
    """
    require_fit(container, config, shared_width=shared_width)
    dense = _first_layers(config, source, layers=layers, tokens=tokens, vocabulary=vocabulary)
    spec = _spec(container, dense, num_experts=num_experts, shared_width=shared_width, max_length=tokens)
    ids_BL = torch.randint(dense.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary) / "container", container, spec, dense.config, _pieces(container, spec, dense))
        return compare(open_native(folder)(ids_BL).logits, dense(ids_BL).logits)


def _first_layers(config: Any, source: Mapping[str, Tensor], *, layers: int, tokens: int, vocabulary: int) -> Any:
    """Return a dense model of the first layers and tokens, in float32."""
    import transformers

    small = deepcopy(config)
    small.num_hidden_layers = min(layers, config.num_hidden_layers)
    small.vocab_size = min(vocabulary, config.vocab_size)
    small.pad_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    if getattr(small, "sliding_window", None):
        small.sliding_window = min(small.sliding_window, tokens // 2)
    dense = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    per_token = ("model.embed_tokens.weight", "lm_head.weight")
    wanted = [name for name in dense.state_dict() if name in source]
    lost = set(dense.state_dict()) - set(wanted) - ({"lm_head.weight"} if small.tie_word_embeddings else set())
    if lost:
        raise ValueError(f"the source lacks {sorted(lost)[0]}: it is incomplete, or config.json is another model's")
    dense.load_state_dict(
        {name: source[name][: small.vocab_size] if name in per_token else source[name] for name in wanted}, strict=False
    )
    return dense


def _spec(container: Container, dense: Any, *, num_experts: int, shared_width: int, max_length: int) -> MoESpec:
    config = dense.config
    even_width = padded(config.intermediate_size - shared_width, num_experts) // num_experts
    shape = FFNShape(
        layers="layers",
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        ffn_width=config.intermediate_size,
        expert_width=padded(even_width, container.width_multiple),
        shared_width=shared_width,
        gated=True,
        activation="silu",
    )
    return MoESpec(
        family=config.model_type,
        model_class=type(dense).__name__,
        head="causal",
        stacks=(shape,),
        num_experts=num_experts,
        num_active=num_experts,
        gate=container.gate,
        router_bias=False,
        container=container.name,
        partition="contiguous",
        teacher="preflight",
        sentence=None,
        max_length=max_length,
    )


def _pieces(container: Container, spec: MoESpec, dense: Any) -> Iterator[Mapping[str, Tensor]]:
    """Yield the container's tensors: the first neurons are shared, the others are dealt to the experts in order."""
    routed = spec.ffn_width - spec.shared_width
    expert_of_neuron_F = torch.full((spec.ffn_width,), -1)
    expert_of_neuron_F[spec.shared_width :] = torch.arange(routed) * spec.num_experts // routed
    neurons_EM = neurons_by_expert(expert_of_neuron_F, spec.num_experts, container.width_multiple)
    shared_S = shared_neurons(expert_of_neuron_F)
    yield from outer_tensors(container, dense.config, dense.state_dict())
    for layer, block in enumerate(dense.model.layers):
        mlp = block.mlp
        ffn = DenseFFN(mlp.up_proj.weight, mlp.down_proj.weight, "silu", w_gate_FD=mlp.gate_proj.weight)
        experts = slice_experts(ffn, neurons_EM, shared_S)
        yield layer_tensors(container, spec, layer, MoEFFN.from_experts(spec, experts, neurons_EM, shared_S=shared_S))
