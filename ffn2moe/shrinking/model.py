"""Leave every layer of a mixture with the experts that a task uses most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ffn2moe.choices import ROUTINGS, SELECTIONS
from ffn2moe.dense.locate import install
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.progress import Track, untracked
from ffn2moe.shrinking import SHRINK_METHODS, Layer, ShrinkMethod
from ffn2moe.shrinking.fit import imitate
from ffn2moe.shrinking.usage import Tokens, chunks, most_used, usage
from ffn2moe.spec import FFNShape, MoESpec


@dataclass(frozen=True)
class LayerReport:
    """The report of one layer. Errors are relative, ``||y - y'|| / ||y'||``, on the held-out tokens."""

    layer: int
    use: tuple[float, ...]  # of every expert before: the sum of its gates over the task's tokens
    kept: tuple[int, ...]  # of the experts before
    covered: float  # share of the use that the kept experts had
    error_before: float  # of the layer, against the sum of all its experts
    error_after: float  # of what it is now, against the same
    change: float  # of what it is now, against what it was


def require_shrinkable(spec: MoESpec, keep: int, method: str) -> None:
    """Raise ValueError, with cause and remedy, if the method cannot leave the mixture with `keep` experts."""
    SHRINK_METHODS.require(method)
    if len(spec.stacks) != 1:
        raise ValueError(
            f"a {spec.family} model has {len(spec.stacks)} stacks of layers, and experts are counted in one: models "
            "with an encoder and a decoder, or two towers, stay as they are"
        )
    if keep >= spec.num_experts:
        raise ValueError(
            f"keep = {keep} leaves nothing to take away, as the model has {spec.num_experts} experts: keep fewer"
        )
    most = max((spec.num_active, *spec.active_per_layer))
    if keep < most:
        raise ValueError(
            f"keep = {keep} is fewer than the {most} experts that a token uses: keep at least {most}, or convert with "
            "fewer active experts"
        )
    if not ROUTINGS[spec.routing].own_input:
        raise ValueError(
            f"with routing {spec.routing} routers read something else than their layers' inputs, by which experts are "
            "counted and fitted here: shrink a model with routing token"
        )
    if SELECTIONS[spec.selection].ordered and not SHRINK_METHODS[method].keeps_order:
        raise ValueError(
            f"with selection {spec.selection} experts are blocks in order of importance, and {method} would mix the "
            "order: use drop, which takes the last blocks away"
        )


@torch.no_grad()
def shrink_model(
    model: Any,
    spec: MoESpec,
    task: Tokens,
    held_out: Tokens,
    *,
    keep: int,
    method: str,
    track: Track = untracked,
) -> tuple[MoESpec, list[LayerReport]]:
    """Leave every layer of a mixture, in place, with `keep` of its experts; return its new spec and a report a layer.

    `task` is the input of the layers on the task's texts, `held_out` that on texts to judge by, both from the model as
    it is. ValueError where that is not possible (`require_shrinkable`).
    """
    require_shrinkable(spec, keep, method)
    layers, row = moe_layers(model), SHRINK_METHODS[method]
    smaller = replace(
        spec,
        num_experts=keep,
        stacks=(_shape(spec.stacks[0], row, layers, keep),),
        max_active=None if spec.max_active is None else min(spec.max_active, keep),
        elastic=tuple(active for active in spec.elastic if active <= keep),
        container=None,  # no native container is written
        shrunk=method,
    )
    reports = []
    for index, moe in enumerate(track(layers, len(layers), "shrinking layers")):
        x_TD = task.inputs[index]
        use_E = usage(moe, x_TD)
        kept_K = torch.arange(keep) if SELECTIONS[spec.selection].ordered else most_used(use_E, keep)
        made = row.make(Layer(moe, smaller, index, kept_K, use_E, x_TD)).eval()
        imitate(made, moe, x_TD)
        errors = _errors(moe, made, held_out.inputs[index])
        covered = (use_E[kept_K].sum() / use_E.sum()).item()
        reports.append(LayerReport(index, tuple(use_E.tolist()), tuple(kept_K.tolist()), covered, *errors))
        install(model, index, made)
    return smaller, reports


def _shape(shape: FFNShape, row: ShrinkMethod, layers: Sequence[MoEFFN], keep: int) -> FFNShape:
    """Return the sizes of the layers; a method that makes experts of other widths makes all layers' alike."""
    return replace(shape, expert_width=row.width(layers, keep), expert_widths=()) if row.width else shape


@torch.no_grad()
def _errors(moe: MoEFFN, made: MoEFFN, x_TD: Tensor) -> tuple[float, float, float]:
    """Return the errors before and after against the sum of all experts, and that of after against before."""
    pieces = []
    for x in chunks(moe, x_TD):
        whole, before, after = moe.all_experts(x), moe(x), made(x)
        differences = (whole, before - whole, after - whole, before, after - before)
        pieces.append(torch.stack([one.double().square().sum() for one in differences]))
    whole, was, now, before, change = torch.stack(pieces).sum(0).sqrt().tolist()
    return was / whole, now / whole, change / before
