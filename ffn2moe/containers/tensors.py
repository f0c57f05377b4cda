"""Convert a mixture into the tensors and the configuration of a container."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ffn2moe.choices import GATES
from ffn2moe.containers.container import Container
from ffn2moe.containers.dense_model import DenseModel
from ffn2moe.containers.fit import require_fit
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec

# A router that is scaled down this much chooses the same experts and weighs them nearly equally, so that every
# container can hold unit gates.
NEAR_UNIT = 2.0**-10
COPIED_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_FFN_NAME = re.compile(r"model\.layers\.\d+\.mlp\.")
# Old checkpoints hold rotary frequencies; every model computes them.
_COMPUTED_NAME = re.compile(r".*\.rotary_emb\.inv_freq")


def native_config(container: Container, config: Any, spec: MoESpec) -> Any:
    """Return the container's transformers config for a decomposed model; `config` is the dense model's.

    Every layer is a mixture. ValueError if the container cannot hold the model.
    """
    import transformers

    require_fit(container, config, spec=spec)
    dense = DenseModel(config)
    values: dict[str, Any] = {key: getattr(config, key) for key in COPIED_KEYS}
    values |= {
        "architectures": [container.model_class],
        "rope_parameters": dense.rope,
        "num_experts_per_tok": spec.num_active,
        "tie_word_embeddings": config.tie_word_embeddings and container.ties,
    }
    values |= container.config_values(dense, spec, container.expert_width(spec), container.shared_width(spec))
    return getattr(transformers, container.config_class)(**values)


def layer_tensors(container: Container, spec: MoESpec, layer: int, moe: MoEFFN) -> dict[str, Tensor]:
    """Return one mixture under the container's names on disk, in float32.

    The output scale is folded into the down projections. ValueError for a layer that differs from the spec, or that
    has what the container cannot hold.
    """
    _require_layer(container, spec, layer, moe)
    M = container.expert_width(spec)
    router_ED, bias_E, scale = _router(container, spec, moe)
    up_EMD, down_EDM = _float(moe.w_in), scale * _float(moe.w_out)
    assert moe.w_gate is not None
    tensors = {container.router: router_ED}
    if container.choice_bias:
        tensors[container.choice_bias] = bias_E
    tensors |= container.experts.experts(_pad(_float(moe.w_gate), M, 1), _pad(up_EMD, M, 1), _pad(down_EDM, M, 2))
    tensors |= _shared_expert(container, spec, moe)
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _shared_expert(container: Container, spec: MoESpec, moe: MoEFFN) -> dict[str, Tensor]:
    """Return the shared expert by name: of zero neurons where the model has none and engines want one."""
    S, D = container.shared_width(spec), spec.width
    if not S or container.shared_expert is None:
        return {}
    empty_SD = torch.zeros(0, D)
    gate_SD = _pad(_float(moe.shared_gate) if moe.shared_gate is not None else empty_SD, S, 0)
    up_SD = _pad(_float(moe.shared_in) if moe.shared_in is not None else empty_SD, S, 0)
    down_DS = _pad(_float(moe.shared_out) if moe.shared_out is not None else empty_SD.T, S, 1)
    if container.shared_gate is None:
        return container.shared_expert.shared(gate_SD, up_SD, down_DS)
    # The gate multiplies the shared expert by sigmoid(z), about 1/2. llama.cpp computes the sigmoid as silu(z) / z, so
    # a weight of 0 would give 0 / 0. This weight changes the gate by z / 2, which no dtype shows, and its terms cannot
    # cancel out over a token's dimensions.
    gate_1D = torch.linspace(1, 2, D).unsqueeze(0) * 2.0**-24
    return {container.shared_gate: gate_1D} | container.shared_expert.shared(gate_SD, up_SD, 2 * down_DS)


def _router(container: Container, spec: MoESpec, moe: MoEFFN) -> tuple[Tensor, Tensor, Tensor]:
    """Return the router weight [E, D], the choice bias [E] and the factor of the down projections for a container.

    Unit gates become nearly unit: with scores s, a renormalised container weighs the chosen experts by
    ``K softmax(e s) = 1 + e (s_i - mean of the chosen s) + O(e^2)``, e = 2^-10.
    """
    weight_ED, _ = moe.router.folded()
    scale, bias_E = _float(moe.output_scale), _float(moe.router.balance_bias)
    if spec.gate == container.gate:
        return weight_ED.float(), bias_E, scale
    scale = scale * GATES[container.unit_gate or container.gate].neutral_scale(spec.num_experts, spec.num_active)
    # A choice bias is added to sigmoid(e s), which is 1/2 + e s / 4 to first order: it is scaled by e / 4.
    return NEAR_UNIT * weight_ED.float(), NEAR_UNIT / 4 * bias_E, scale


def _require_layer(container: Container, spec: MoESpec, layer: int, moe: MoEFFN) -> None:
    shape = spec.shape_of(layer)
    expected = (spec.num_experts, shape.expert_width, shape.width)
    if tuple(moe.w_in.shape) != expected or moe.num_active != spec.num_active:
        raise ValueError(
            f"layer {layer} has [E, M, D] = {list(moe.w_in.shape)} and K = {moe.num_active}, the spec {list(expected)} "
            f"and K = {spec.num_active}: a container has the same experts in every layer; pad narrow experts with zero "
            "neurons, which is exact"
        )
    if moe.w_gate is None or moe.gate != spec.gate:
        raise ValueError(f"layer {layer} is not the gated mixture with {spec.gate!r} gates that the spec describes")
    biases = (moe.b_in, moe.b_gate, moe.b_out, moe.router.bias, moe.shared_b_in, moe.shared_b_gate)
    if any(bias is not None and bool(bias.any()) for bias in biases):
        raise ValueError(f"layer {layer} has biases in its experts or its router, which {container.name} does not hold")
    if not container.choice_bias and bool(moe.router.balance_bias.any()):
        able = " or ".join(row.name for row in CONTAINERS.rows() if row.choice_bias)
        raise ValueError(
            f"layer {layer} has a balance bias, which {container.name} does not hold: use {able}, or train without one"
        )


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _pad(tensor: Tensor, width: int, dim: int) -> Tensor:
    """Return the tensor with zero neurons up to `width` along `dim`."""
    missing = list(tensor.shape)
    missing[dim] = width - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dim) if missing[dim] else tensor


def outer_tensors(
    container: Container, config: Any, source: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Yield every tensor of a dense causal model outside its FFNs, one at a time, under the container's names.

    `source` is the state dict of the dense model or of the student, or pairs as they are read from shards. Zeros stand
    in for biases that only the container has. The output matrix is written where engines cannot tie it.
    """
    adds_biases = container.zero_query_biases and not DenseModel(config).query_bias
    tied = config.tie_word_embeddings
    for name, tensor in source.items() if isinstance(source, Mapping) else source:
        if _FFN_NAME.match(name) or _COMPUTED_NAME.match(name) or (tied and name == "lm_head.weight"):
            continue
        yield {name: tensor}
        if tied and not container.ties and name == "model.embed_tokens.weight":
            yield {"lm_head.weight": tensor}
        if adds_biases and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            yield {name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[0])}
