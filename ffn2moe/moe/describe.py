"""Describe the mixture that a dense model becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ffn2moe.dense.locate import family_of, ffn_layers, read_ffn, stack_of
from ffn2moe.spec import FFNShape, Gate, Head, MoESpec, Pooling, Routing, Selection


def spec_of(
    model: Any,
    *,
    head: Head,
    num_experts: int,
    num_active: int,
    partition: str,
    teacher: str,
    max_length: int,
    shared_width: int = 0,
    gate: Gate = "unit",
    router_bias: bool = True,
    container: str | None = None,
    width_multiple: int = 1,
    pooling: Pooling | None = None,
    selection: Selection = "topk",
    routing: Routing = "token",
    active_per_layer: tuple[int, ...] = (),
    max_active: int | None = None,
    elastic: tuple[int, ...] = (),
) -> MoESpec:
    """The spec of the mixture that is to be made of a dense model.

    Experts are as wide as an even division needs, rounded up to `width_multiple`; ValueError where E, K or S do not
    fit the model.
    """
    shapes: list[FFNShape] = []
    for layer in range(len(ffn_layers(model))):
        path = stack_of(model, layer).layers
        if shapes and shapes[-1].layers == path:
            shapes[-1] = replace(shapes[-1], num_layers=shapes[-1].num_layers + 1)
            continue
        ffn = read_ffn(model, layer)
        each = -(-(ffn.ffn_width - shared_width) // num_experts)
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
    return MoESpec(
        family=family_of(model).name,
        model_class=type(model).__name__,
        head=head,
        stacks=tuple(shapes),
        num_experts=num_experts,
        num_active=num_active,
        gate=gate,
        router_bias=router_bias,
        container=container,
        partition=partition,
        teacher=teacher,
        pooling=pooling,
        max_length=max_length,
        selection=selection,
        routing=routing,
        active_per_layer=active_per_layer,
        max_active=max_active,
        elastic=elastic,
    )
