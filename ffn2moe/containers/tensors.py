"""Lay a mixture out as the tensors and configuration of a container."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ffn2moe.containers.fit import (
    attention_biases,
    expert_width,
    head_dim_of,
    require_fit,
    shared_width,
    sliding_windows,
)
from ffn2moe.containers.table import Container
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.moe.router import neutral_scale
from ffn2moe.spec import Gate, MoESpec

# A router this much smaller chooses the same experts and weighs them nearly alike: unit gates in any container.
NEAR_UNIT = 2.0**-10
_FFN_NAME = re.compile(r"model\.layers\.\d+\.mlp\.")
# Rotary frequencies that old checkpoints carry; every model computes them.
_COMPUTED_NAME = re.compile(r".*\.rotary_emb\.inv_freq")


def native_config(container: Container, config: Any, spec: MoESpec) -> Any:
    """The container's transformers config for a factorised model whose dense config this is.

    Every layer is a mixture. ValueError if the container cannot hold the model.
    """
    import transformers

    require_fit(container, config, spec=spec)
    copied = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout"),
        *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    )
    values: dict[str, Any] = {key: getattr(config, key) for key in copied}
    values |= {
        "architectures": [container.model_class],
        "rope_parameters": deepcopy(config.rope_parameters),
        "num_experts_per_tok": spec.num_active,
        "tie_word_embeddings": config.tie_word_embeddings and container.ties,
    }
    if container.name != "granitemoeshared":  # engines know heads of D / H only there, and it has no such key
        values["head_dim"] = head_dim_of(config)
    M, S, E = expert_width(container, spec), shared_width(container, spec), spec.num_experts
    windows = sliding_windows(config)
    sparse = {"moe_intermediate_size": M, "intermediate_size": spec.ffn_width}
    every_layer = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    match container.name:
        case "mixtral":
            values |= {"intermediate_size": M, "num_local_experts": E, "sliding_window": max(windows) or None}
        case "qwen2_moe":
            values |= sparse | every_layer | {"num_experts": E, "norm_topk_prob": False, "qkv_bias": True}
            values |= {"shared_expert_intermediate_size": S}
            values |= {"use_sliding_window": any(windows), "sliding_window": max(windows), "max_window_layers": 0}
            values |= {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}
        case "qwen3_moe":
            values |= sparse | every_layer | {"num_experts": E, "norm_topk_prob": True}
            values |= {"attention_bias": any(attention_biases(config))}
            values |= {"use_sliding_window": any(windows), "sliding_window": max(windows) or None}
        case "glm4_moe":
            values |= sparse | {"n_routed_experts": E, "n_shared_experts": S // M, "n_group": 1, "topk_group": 1}
            values |= {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "routed_scaling_factor": 1.0}
            values |= {"attention_bias": any(attention_biases(config)), "use_qk_norm": config.model_type == "qwen3"}
            values |= {"norm_topk_prob": spec.gate == "unit"}
            values["rope_parameters"]["partial_rotary_factor"] = 1.0  # its default is 0.5
        case "granitemoeshared":
            values |= {"intermediate_size": M, "num_local_experts": E, "shared_intermediate_size": S}
            values |= {"attention_bias": any(attention_biases(config))}
            values |= {"attention_multiplier": head_dim_of(config) ** -0.5, "embedding_multiplier": 1.0}
            values |= {"residual_multiplier": 1.0, "logits_scaling": 1.0}
    return getattr(transformers, container.config_class)(**values)


def layer_tensors(container: Container, spec: MoESpec, layer: int, moe: MoEFFN) -> dict[str, Tensor]:
    """One mixture under the container's names on disk, float32, the output scale folded into the down projections.

    ValueError for a layer that is not as the spec says, or that has what the container cannot hold.
    """
    _require_layer(container, spec, layer, moe)
    M, S, D = expert_width(container, spec), shared_width(container, spec), spec.width
    router_ED, bias_E, scale = _router(container, spec, moe)
    up_EMD, down_EDM = _float(moe.w_in), scale * _float(moe.w_out)
    assert moe.w_gate is not None
    gate_EMD = _float(moe.w_gate)
    tensors = {container.router: router_ED}
    if container.choice_bias:
        tensors["mlp.gate.e_score_correction_bias"] = bias_E
    gate_EMD, up_EMD, down_EDM = _pad(gate_EMD, M, 1), _pad(up_EMD, M, 1), _pad(down_EDM, M, 2)
    if len(container.experts) == 2:
        values: tuple[Tensor, ...] = (torch.cat([gate_EMD, up_EMD], dim=1), down_EDM)
        tensors |= dict(zip(container.experts, values, strict=True))
    else:
        for expert in range(spec.num_experts):
            values = (gate_EMD[expert], up_EMD[expert], down_EDM[expert])
            tensors |= {name.format(expert): value for name, value in zip(container.experts, values, strict=True)}
    if S:
        empty = torch.zeros(0, D)
        gate_SD = _pad(_float(moe.shared_gate) if moe.shared_gate is not None else empty, S, 0)
        up_SD = _pad(_float(moe.shared_in) if moe.shared_in is not None else empty, S, 0)
        down_DS = _pad(_float(moe.shared_out) if moe.shared_out is not None else empty.T, S, 1)
        if container.shared == "gated":
            down_DS = 2 * down_DS
            # llama.cpp computes the sigmoid as silu(z) / z: a weight of 0 would give 0 / 0. This one is exact enough
            # (z changes the gate by z / 2), in every dtype, and cannot cancel out over a token's dimensions.
            tensors["mlp.shared_expert_gate.weight"] = torch.linspace(1, 2, D).unsqueeze(0) * 2.0**-24
        values = (torch.cat([gate_SD, up_SD]), down_DS)
        if len(container.shared_expert) == 3:
            values = (gate_SD, up_SD, down_DS)
        tensors |= dict(zip(container.shared_expert, values, strict=True))
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _router(container: Container, spec: MoESpec, moe: MoEFFN) -> tuple[Tensor, Tensor, Tensor]:
    """Router weight [E, D], choice bias [E] and the factor of the down projections, as the container needs them.

    Unit gates become nearly unit: with scores s the chosen of a renormalised container weigh
    ``K softmax(e s) = 1 + e (s_i - mean of the chosen s) + O(e^2)``, e = 2^-10.
    """
    weight_ED, _ = moe.router.folded()
    scale, bias_E = _float(moe.output_scale), _float(moe.router.balance_bias)
    if spec.gate == container.gate:
        return weight_ED.float(), bias_E, scale
    # GLM4-MoE renormalises here (norm_topk_prob), as every engine does so in the same way. sigmoid(e s) is
    # 1/2 + e s / 4 to first order, so a bias on s is a quarter as much there.
    formula: Gate = "softmax" if container.gate == "softmax" else "softmax_topk"
    scale = scale * neutral_scale(formula, spec.num_experts, spec.num_active)
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
        raise ValueError(
            f"layer {layer} has a balance bias, which {container.name} does not hold: glm4_moe does, or train without"
        )


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _pad(tensor: Tensor, width: int, dim: int) -> Tensor:
    """The tensor with zero neurons up to `width` along `dim`."""
    missing = list(tensor.shape)
    missing[dim] = width - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dim) if missing[dim] else tensor


def outer_tensors(
    container: Container, config: Any, source: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Everything of a dense causal model that is not an FFN, a tensor at a time, under the container's names.

    `source` is the state dict of the dense model or of the student, or pairs as they are read from shards. Biases that
    the container always has are added as zeros; an output matrix that engines cannot tie is written out.
    """
    qkv_bias, _ = attention_biases(config)
    wants_qkv = container.name == "qwen2_moe" or qkv_bias
    tied = config.tie_word_embeddings
    for name, tensor in source.items() if isinstance(source, Mapping) else source:
        if _FFN_NAME.match(name) or _COMPUTED_NAME.match(name) or (tied and name == "lm_head.weight"):
            continue
        yield {name: tensor}
        if tied and not container.ties and name == "model.embed_tokens.weight":
            yield {"lm_head.weight": tensor}
        is_qkv = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        if is_qkv and wants_qkv and not qkv_bias:
            yield {name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[0])}
