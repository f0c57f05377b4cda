"""Describe the mixture that a dense model becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ffn2moe.choices import HEADS, problem_of
from ffn2moe.dense.locate import family_of, ffn_layers, read_ffn, stack_of
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
    **settings: Any,
) -> MoESpec:
    """Return the spec of the mixture that a dense model is to become.

    Experts are `expert_width` neurons wide, or as wide as an even partition needs (0), rounded up to `width_multiple`.
    `settings` are the fields of `MoESpec` that the model does not determine, such as head, num_active, partition,
    teacher and max_length; by default the gate is unit, the router has a bias, there is no container, and embeddings
    are made by the modules attached to the model, if any. ValueError where E, K or S do not fit the model.
    """
    problem = problem_of(model.config) if HEADS[settings["head"]].classifies else None
    return MoESpec(
        family=family_of(model).name,
        model_class=type(model).__name__,
        stacks=tuple(_shapes(model, num_experts, shared_width, expert_width, width_multiple)),
        num_experts=num_experts,
        **(_DEFAULTS | {"problem": problem, "sentence": modules_of(model)} | settings),
    )


def _shapes(model: Any, num_experts: int, shared_width: int, expert_width: int, width_multiple: int) -> list[FFNShape]:
    shapes: list[FFNShape] = []
    for layer in range(len(ffn_layers(model))):
        path = stack_of(model, layer).layers
        if shapes and shapes[-1].layers == path:
            shapes[-1] = replace(shapes[-1], num_layers=shapes[-1].num_layers + 1)
            continue
        ffn = read_ffn(model, layer)
        each = expert_width or -(-(ffn.ffn_width - shared_width) // num_experts)
        shapes.append(
            FFNShape(
                layers=path,
                num_layers=1,
                width=ffn.w_in_FD.shape[1],
                ffn_width=ffn.ffn_width,
                expert_width=-(-each // width_multiple) * width_multiple,
                shared_width=shared_width,
                gated=ffn.gated,
                activation=ffn.activation,
            )
        )
    return shapes
