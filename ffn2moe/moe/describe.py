"""Describe the mixture that a dense model becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ffn2moe.choices import HEADS, problem_of
from ffn2moe.dense.locate import family_of, ffn_layers, read_ffn, stack_of
from ffn2moe.dense.reduction import Reduction
from ffn2moe.dense.sentence import modules_of
from ffn2moe.spec import FFNShape, MoESpec

_DEFAULTS: dict[str, Any] = {"gate": "unit", "router_bias": True, "container": None}


def spec_of(
    model: Any,
    *,
    num_experts: int,
    shared_width: int = 0,
    expert_width: int = 0,
    width_multiple: int = 1,
    reduction: Reduction | None = None,
    **settings: Any,
) -> MoESpec:
    """Return the spec of the mixture that a dense model is to become; with a `reduction`, a part of it.

    Experts are `expert_width` neurons wide, or as wide as an even partition needs (0), rounded up to `width_multiple`.
    `settings` are the fields of `MoESpec` that the model does not determine, such as head, num_active, partition,
    teacher and max_length; by default the gate is unit, the router has a bias, there is no container, and embeddings
    are made by the modules attached to the model, if any. ValueError where E, K or S do not fit the model.
    """
    problem = problem_of(model.config) if HEADS[settings["head"]].classifies else None
    return MoESpec(
        family=family_of(model).name,
        model_class=type(model).__name__,
        stacks=tuple(_shapes(model, num_experts, shared_width, expert_width, width_multiple, reduction)),
        num_experts=num_experts,
        **(_DEFAULTS | {"problem": problem, "sentence": modules_of(model)} | settings),
    )


def _shapes(
    model: Any,
    num_experts: int,
    shared_width: int,
    expert_width: int,
    width_multiple: int,
    reduction: Reduction | None,
) -> list[FFNShape]:
    shapes: list[FFNShape] = []
    for layer in range(len(ffn_layers(model))):
        path = stack_of(model, layer).layers
        if shapes and shapes[-1].layers == path:
            shapes[-1] = replace(shapes[-1], num_layers=shapes[-1].num_layers + 1)
            continue
        ffn = read_ffn(model, layer)
        F = reduction.ffn_width if reduction else ffn.ffn_width
        each = expert_width or -(-(F - shared_width) // num_experts)
        shapes.append(
            FFNShape(
                layers=path,
                num_layers=1,
                width=ffn.w_in_FD.shape[1],
                ffn_width=F,
                expert_width=-(-each // width_multiple) * width_multiple,
                shared_width=shared_width,
                gated=ffn.gated,
                activation=ffn.activation,
            )
        )
    return [_reduced(shape, reduction) for shape in shapes] if reduction else shapes


def _reduced(shape: FFNShape, reduction: Reduction) -> FFNShape:
    """Return a shape with the layers that are kept, and with what the teacher has more of."""
    if reduction.drops_layers:
        kept, of_layers = reduction.layers, reduction.of_layers
        shape = replace(shape, num_layers=len(kept), layers_kept=kept, teacher_layers=of_layers)
    return replace(shape, teacher_ffn_width=reduction.of_ffn_width if reduction.drops_neurons else None)
