"""List the tensors of a GGUF file, each with the function that makes its numbers from the shards of a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ffn2moe.containers.container import Container, JoinedNames, Names, padded
from ffn2moe.containers.gguf.architectures import Architecture, Widths
from ffn2moe.containers.gguf.types import WeightType
from ffn2moe.containers.shards import Shards
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.dense.weights import require_representable

_COMPUTED_NAME = re.compile(r".*\.rotary_emb\.inv_freq")
_DENSE_FFN = Names.projections("mlp")
_ROLES = ("gate", "up", "down")
# Matrices that llama.cpp wants as float32, by the end of their name.
_FLOATS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
_VOCABULARY = ("token_embd.weight", "output.weight")
_VALUES = ".attn_v.weight"  # of the attention, by the end of their name


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its name, shape and type, and what makes it."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """The size in the file."""
        return prod(gguf.quants.quant_shape_to_byte_shape(self.shape, self.kind))

    def array(self) -> np.ndarray:
        """Make the numbers as the file stores them. ValueError for a number that the type cannot hold."""
        tensor = self.make()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.name} has NaN or infinite values: the weights are damaged")
        if self.kind is gguf.GGMLQuantizationType.F16:
            require_representable(tensor, torch.float16, self.name)
        return np.ascontiguousarray(gguf.quants.quantize(tensor.float().numpy(), self.kind))


def widths_of(architecture: Architecture, config: Any, shards: Shards, weight_type: WeightType) -> Widths:
    """Return the widths of the FFNs in the file: padded with zero neurons to whole blocks, which changes no result."""
    block, layers = weight_type.block, range(config.num_hidden_layers)
    if architecture.experts is None:
        own = [shards.layout(f"model.layers.{layer}.{_DENSE_FFN.up}")[0][0] for layer in layers]
        return Widths(tuple(padded(width, block) for width in own), 0)
    width, shared = getattr(config, architecture.width), architecture.shared(config)
    expert = padded(width, block)
    shared = shared // width * expert if architecture.shared_in_experts else padded(shared, block)
    return Widths((expert,) * len(layers), shared)


def tensors_of(
    architecture: Architecture, config: Any, shards: Shards, weight_type: WeightType, widths: Widths
) -> list[Stored]:
    """Return every tensor of the file. ValueError for one that llama.cpp does not read, or whose rows do not fit."""
    names = gguf.get_tensor_name_map(_architecture_number(architecture.name), config.num_hidden_layers)
    found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
    used: set[str] = set()
    for layer in range(config.num_hidden_layers):
        for name, shape, make, read in _ffn(architecture, config, shards, layer, widths):
            found[name] = shape, make
            used.update(read)
    for name in shards:
        if name in used or _COMPUTED_NAME.match(name) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        target = names.get_name(name.replace("_correction_bias", "_correction.bias"), (".weight", ".bias"))
        if target is None or not _read(architecture, target):
            raise ValueError(
                f"it holds {name}, which llama.cpp does not read in a {architecture.name}: serve the folder with "
                "transformers or vLLM"
            )
        found[target] = _outer(architecture, config, shards, name)
    return [Stored(name, shape, _kind(name, shape, weight_type), make) for name, (shape, make) in found.items()]


def _architecture_number(name: str) -> gguf.MODEL_ARCH:
    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _read(architecture: Architecture, target: str) -> bool:
    return architecture.output_bias or not target.endswith("attn_output.bias")


def _outer(
    architecture: Architecture, config: Any, shards: Shards, name: str
) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
    """Return shape and maker of a tensor outside the experts."""
    shape, _ = shards.layout(name)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = next((heads[key] for key in heads if f".{key}." in name), None)
    if part is not None and architecture.interleaved:
        return shape, lambda: interleaved(shards[name], part)
    if CONTAINERS.get(config.model_type) and name.endswith(f".{CONTAINERS[config.model_type].shared_gate}"):
        return shape[-1:], lambda: shards[name][0]  # a vector
    return shape, lambda: shards[name]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of queries or keys in llama.cpp's order: the two numbers that are rotated stand together."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _ffn(
    architecture: Architecture, config: Any, shards: Shards, layer: int, widths: Widths
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor], list[str]]]:
    """Yield the matrices of one FFN: name, shape, what makes it, and the names that it reads."""
    D, M, before = config.hidden_size, widths.layers[layer], f"model.layers.{layer}."
    if architecture.experts is None:
        yield from _matrices(shards, before, _DENSE_FFN, 0, f"blk.{layer}.ffn_{{}}.weight", (M, D))
        return
    container: Container = CONTAINERS[config.model_type]
    E = getattr(config, architecture.experts)
    yield from _matrices(shards, before, container.experts, E, f"blk.{layer}.ffn_{{}}_exps.weight", (M, D))
    if container.shared_expert is not None and widths.shared:
        target = f"blk.{layer}.ffn_{{}}_shexp.weight"
        yield from _matrices(shards, before, container.shared_expert, 0, target, (widths.shared, D))


def _matrices(
    shards: Shards, before: str, names: Names | JoinedNames, experts: int, target: str, width: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor], list[str]]]:
    """Yield gate, up and down of a dense FFN, or those of all experts as one tensor each."""
    M, D = width
    for role in _ROLES:
        shape = (D, M) if role == "down" else (M, D)
        own = [f"{before}{one}" for one in names.on_disk(role, experts)]

        def make(role: str = role, own: list[str] = own) -> Tensor:
            parts = [names.part(role, shards[one]) for one in own]
            stacked = torch.stack(parts) if isinstance(names, Names) and experts else parts[0]
            return _padded(stacked, M, -1 if role == "down" else -2)

        yield target.format(role), (experts, *shape) if experts else shape, make, own


def _padded(tensor: Tensor, width: int, dim: int) -> Tensor:
    """Return the tensor with zeros up to `width` along `dim`."""
    missing = list(tensor.shape)
    missing[dim] = width - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dim) if missing[dim] else tensor


def _kind(name: str, shape: tuple[int, ...], weight_type: WeightType) -> gguf.GGMLQuantizationType:
    """Return the type of a tensor. ValueError, with the remedy, for rows that the blocks do not divide."""
    if len(shape) < 2 or name.endswith(_FLOATS):
        return gguf.GGMLQuantizationType.F32
    if shape[-1] % weight_type.block:
        raise ValueError(
            f"{weight_type.name} stores rows in blocks of {weight_type.block} numbers, and those of {name} have "
            f"{shape[-1]}: write --type f16 or bf16"
        )
    sensitive = name in _VOCABULARY or name.endswith(_VALUES)
    return gguf.GGMLQuantizationType[weight_type.sensitive if sensitive else weight_type.matrices]
