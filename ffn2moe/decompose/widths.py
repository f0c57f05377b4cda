"""Give each layer a width by what its neurons are worth to the whole model.

The cost of a width is the error that elimination leaves (`errors_by_width`), weighed by the Fisher information of the
FFN's output (`ffn2moe.decompose.gradients`): then the errors of all layers are in one unit, the divergence of the
model's output. The widths with the least sum follow by dynamic programming (docs/decisions/0028-width-per-layer.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ffn2moe.decompose.budget import allocate
from ffn2moe.decompose.jobs import widths_job
from ffn2moe.decompose.layer_map import LayerMap, here
from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.decompose.width_costs import COST_TOKENS, step_of
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.literals import Widths
from ffn2moe.progress import Track, untracked
from ffn2moe.spec import FFNShape, MoESpec


def experts_are_chosen(spec: MoESpec) -> bool:
    """Return whether experts are filled with the neurons that their tokens need most, and lack others."""
    return not spec.is_dense and PARTITIONS[spec.partition].refilled


def neurons_are_chosen(spec: MoESpec) -> bool:
    """Return whether some neurons are chosen and others left out, of experts or of whole FFNs."""
    return experts_are_chosen(spec) or any(shape.teacher_ffn_width for shape in spec.stacks)


def chosen_by_need(wanted: Widths, spec: MoESpec) -> bool:
    """Return whether each layer of a student gets a width of its own; `auto` says so where that loses less for nothing.

    ValueError where the spec cannot hold what is wanted.
    """
    filled = experts_are_chosen(spec)
    if wanted == "auto":
        return filled and spec.container is None
    if wanted == "same":
        return False
    if spec.container is not None:
        raise ValueError(
            f"a width for each layer is asked for, and the container {spec.container} has one width for all: use "
            "container none, or one width"
        )
    if spec.is_dense and not any(shape.teacher_ffn_width for shape in spec.stacks):
        raise ValueError("a width for each layer is asked for, and every FFN keeps its full width: set ffn_width")
    if not (spec.is_dense or filled):
        raise ValueError(
            f"a width for each layer is asked for, and the experts of the partition {spec.partition} hold all neurons "
            "of a layer together: use the partition token_clusters, or active_per_layer"
        )
    return True


def by_need(
    spec: MoESpec,
    ffns: Sequence[DenseFFN],
    inputs: Sequence[Tensor],
    fishers: Sequence[Tensor],
    *,
    do: LayerMap = here,
    track: Track = untracked,
) -> MoESpec:
    """Return the spec with a width for each layer.

    `ffns` are those that are made narrower or into experts, with their inputs on calibration tokens, [T, D] each, and
    the Fisher information of their outputs, [D, D] each (`ffn2moe.decompose.gradients`).
    """
    jobs = [
        widths_job(ffn, x_TD[:COST_TOKENS], fisher_DD, layer)
        for layer, (ffn, x_TD, fisher_DD) in enumerate(zip(ffns, inputs, fishers, strict=True))
    ]
    costs_LN: dict[int, Tensor] = {}
    for done in track(do(jobs), len(jobs), "weighing neurons"):
        costs_LN[done.layer] = done.tensors["costs_N"]
    return with_widths(spec, [costs_LN[layer] for layer in range(len(jobs))])


def active_widths(spec: MoESpec) -> list[int]:
    """Return how many neurons a token uses in each layer."""
    shapes = [spec.shape_of(layer) for layer in range(spec.num_layers)]
    return [shape.shared_width + spec.active_of(layer) * shape.expert_width for layer, shape in enumerate(shapes)]


def widths_for(spec: MoESpec, layer: int) -> tuple[int, int] | None:
    """Return M and S of one layer, where layers differ; None where all are alike."""
    shape = spec.shape_of(layer)
    return (shape.expert_width, shape.shared_width) if any(one.varied for one in spec.stacks) else None


def with_widths(spec: MoESpec, costs_LN: Sequence[Tensor]) -> MoESpec:
    """Return the spec with a width for each layer, by the cost of each of `widths_of`.

    The mean over a stack is at most what the spec has, and a multiple of the step a layer; a shared expert keeps its
    share.
    """
    stacks, first = [], 0
    for shape in spec.stacks:
        costs_SN = torch.stack(list(costs_LN[first : first + shape.num_layers]))
        stacks.append(_allocated(spec, shape, costs_SN))
        first += shape.num_layers
    return replace(spec, stacks=tuple(stacks))


def _allocated(spec: MoESpec, shape: FFNShape, costs_SN: Tensor) -> FFNShape:
    full = shape.dense_ffn_width if spec.is_dense else shape.ffn_width
    active, step = shape.shared_width + shape.expert_width, step_of(full)  # a token uses one expert
    total = max(shape.num_layers, active * shape.num_layers // step)
    widths = tuple(min(full, parts * step) for parts in allocate(costs_SN, total))
    if spec.is_dense:
        return replace(shape, ffn_width=max(widths), expert_width=max(widths), ffn_widths=widths)
    shared = tuple(_shared(width, shape.shared_width / active, step) for width in widths)
    own = tuple(width - part for width, part in zip(widths, shared, strict=True))
    return replace(
        shape,
        expert_width=max(own),
        expert_widths=own,
        shared_width=max(shared),
        shared_widths=shared if shape.shared_width else (),
    )


def _shared(width: int, share: float, step: int) -> int:
    """Return the part of a width that the shared expert gets, so that the others keep a step at least."""
    return max(0, min(width - step, round(width * share / step) * step))
