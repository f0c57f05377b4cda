"""Locate the FFNs of a model: by the row of its family, or by a probe."""

from __future__ import annotations

from torch import nn

from ffn2moe.dense.blocks import activation_in, install_in_block, read_block, stacks_in
from ffn2moe.dense.families import FAMILIES, Family, Stack
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.probe import probe
from ffn2moe.literals import Activation


def family_of(model: nn.Module) -> Family:
    """Return the family of a transformers model.

    For a model type without a row, a probe searches the FFNs once, while the model is still dense; a find counts when
    K = E proves it, and the model then carries its row. ValueError, with the reason and the known types, for any other
    model.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if not isinstance(getattr(model, "probed_family", None), Family):
        try:
            model.probed_family = probe(model)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"models of type {model_type!r} are not supported, and no FFNs were found in this one that could be "
                f"proven: {error}. Supported are: {', '.join(FAMILIES)}; add a row with "
                "ffn2moe.dense.families.register_family (docs/extend/family.md)"
            ) from error
    return model.probed_family


def stacks_of(model: nn.Module) -> list[tuple[Stack, nn.ModuleList]]:
    """Return the stacks that this model has, each with its layers, in the order of its family's row."""
    return stacks_in(model, family_of(model))


def ffn_layers(model: nn.Module) -> list[nn.Module]:
    """Return the transformer layers that hold the FFNs: all stacks, in order."""
    return [layer for _, layers in stacks_of(model) for layer in layers]


def stack_of(model: nn.Module, layer: int) -> Stack:
    """Return the stack that a layer belongs to, counted over all stacks in order."""
    for stack, layers in stacks_of(model):
        if layer < len(layers):
            return stack
        layer -= len(layers)
    raise IndexError(f"there are only {len(ffn_layers(model))} layers")


def activation_of(model: nn.Module, layer: int = 0) -> Activation:
    """Return the activation of a layer's FFN; ValueError for one that the experts do not implement."""
    return activation_in(model.config, stack_of(model, layer))


def ffn_modules(model: nn.Module) -> list[nn.Module]:
    """Return the module of each layer that takes the FFN's input [..., D]: a mixture would be installed there.

    Its output is the FFN's only where the FFN is a module of its own.
    """
    return [layer.get_submodule(stack.install) for stack, layers in stacks_of(model) for layer in layers]


def ffn_paths(model: nn.Module) -> list[str]:
    """Return the full path in `model` of the place of each layer's mixture, e.g. "model.layers.0.mlp"."""
    name_of = {id(module): name for name, module in model.named_modules()}
    prefix = name_of[id(model.base_model)]
    start = f"{prefix}." if prefix else ""
    return [
        f"{start}{stack.layers}.{index}.{stack.install}"
        for stack, layers in stacks_of(model)
        for index in range(len(layers))
    ]


def read_ffn(model: nn.Module, layer: int) -> DenseFFN:
    """Return the weights of the FFN of one layer, as float32 copies."""
    return read_block(ffn_layers(model)[layer], stack_of(model, layer), activation_of(model, layer))


def linear_maps(model: nn.Module, layer: int) -> list[nn.Module]:
    """Return the linear maps of the FFN of one layer of a dense model."""
    stack, block = stack_of(model, layer), ffn_layers(model)[layer]
    return [block.get_submodule(path) for path in (stack.w_in, stack.w_out, stack.w_gate) if path]


def install(model: nn.Module, layer: int, ffn: nn.Module) -> None:
    """Put `ffn` ([..., D] -> [..., D]) in the place of the FFN of one layer; norms stay."""
    install_in_block(ffn_layers(model)[layer], stack_of(model, layer), ffn)


def require_untied(model: nn.Module) -> None:
    """Raise ValueError if a weight of an FFN has a second place in the model: a mixture here would change it there."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer, block in enumerate(ffn_layers(model)):
        stack = stack_of(model, layer)
        for path in (stack.w_in, stack.w_out, stack.w_gate):
            for parameter in block.get_submodule(path).parameters() if path else ():
                places = names[id(parameter)]
                if len(places) > 1:
                    raise ValueError(
                        f"{places[0]} and {places[1]} are one tensor (tied weights): FFNs that share weights cannot be "
                        "decomposed apart; untie them by saving the model with a copy in each place"
                    )
