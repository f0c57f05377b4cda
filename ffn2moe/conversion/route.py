"""Decompose and route every layer of the dense model, from its shards or in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffn2moe.conversion.data import Data
from ffn2moe.decompose.gradients import fisher
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer, output_of, require_identity
from ffn2moe.decompose.narrow import with_narrow_ffns
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.decompose.source import NotStreamable, skeleton
from ffn2moe.decompose.stream import HELD_OUT_SHARE, StreamSettings, decompose
from ffn2moe.decompose.stream_weights import weigh
from ffn2moe.decompose.widths import active_widths, by_need, experts_are_chosen, widths_for
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.reduction import with_layers
from ffn2moe.moe import checkpoint
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec

if TYPE_CHECKING:
    from ffn2moe.conversion.task import Task

STEPS, BATCH_TOKENS = 200, 1024  # of a router's fit


def route(task: Task, data: Data) -> None:
    """Make the checkpoint `task.routed`: every FFN a mixture whose router alone is trained. Keep one that is there."""
    if task.routed.is_dir():
        return
    settings = task.settings
    router = RouterSettings(
        steps=STEPS, batch_tokens=BATCH_TOKENS, seed=settings.seed, objective=settings.router_objective
    )
    try:
        rows = _streamed(task, data, router)
    except NotStreamable:
        rows = _in_memory(task, data, router)
    if not rows:
        return task.say("a student without experts has no router: it starts from the dense model's own weights")
    recall = sum(row["router_recall"] for row in rows) / len(rows)
    error = sum(row["router_error"] for row in rows) / len(rows)
    task.say(
        f"{len(rows)} layers: the routers find {100 * recall:.0f} % of the experts that the oracle chooses; the "
        f"relative error is {error:.2f}"
    )


def _streamed(task: Task, data: Data, router: RouterSettings) -> list[dict[str, Any]]:
    dense = task.dense
    if dense.family is None or dense.reads != "text":
        raise NotStreamable("the model reads images, or its family is unknown")
    if task.case.whole_only is not None:
        raise NotStreamable(task.case.whole_only)
    spec = task.spec(skeleton(dense.folder, dense.head))
    widths, fishers = spec, None
    if experts_are_chosen(spec):
        widths, fishers = _weighed(task, data, spec)
    settings = StreamSettings(spec, router, torch.float32, widths, fishers)
    return decompose(dense.folder, task.routed, data.calibration, settings, track=task.track)


def _weighed(task: Task, data: Data, spec: MoESpec) -> tuple[MoESpec, Path]:
    """Return the spec with the width of each layer, and the folder of the weights that neurons are chosen under.

    What a stopped conversion found stays.
    """
    weights, kept = task.work / "fishers", task.work / "widths.json"
    if not (kept.is_file() and weights.is_dir()):
        shutil.rmtree(weights, ignore_errors=True)
        by_need = task.case.chooses_widths(spec)
        found = weigh(
            task.dense.folder,
            spec,
            data.calibration,
            weights,
            by_need=by_need,
            seed=task.settings.seed,
            track=task.track,
        )
        fresh = kept.with_suffix(".fresh")
        fresh.write_text(json.dumps(found.to_dict()))
        os.replace(fresh, kept)
        if by_need:
            _say_widths(task, found)
    return MoESpec.from_dict(json.loads(kept.read_text())), weights


def _say_widths(task: Task, spec: MoESpec) -> None:
    task.say(f"neurons that a token uses, layer by layer: {', '.join(map(str, active_widths(spec)))}")


def _in_memory(task: Task, data: Data, router: RouterSettings) -> list[dict[str, Any]]:
    spec = task.spec(task.dense.model)
    student, spec, inputs = _start(task, data, spec)
    rows: list[dict[str, Any]] = []
    if not spec.is_dense:
        rows, spec = _mixtures(task, data, router, spec, student, inputs)
    partial = task.routed.with_name("routed.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.save(student, None, spec, partial)
    os.replace(partial, task.routed)
    return rows


def _start(task: Task, data: Data, spec: MoESpec) -> tuple[Any, MoESpec, list[Tensor]]:
    """Return the dense model that the student is made of, apart from the teacher, and the inputs of its FFNs.

    The spec is returned with the width of each FFN of a student without experts. A student that only has fewer layers
    needs no inputs.
    """
    teacher, shape, head = task.dense.model, spec.stacks[0], spec.head
    if shape.layers_kept:
        model = with_layers(teacher, shape.layers_kept, head, data.calibration[0].inputs)
    else:
        model, _ = load_dense(str(task.dense.folder), head=head)
    if spec.is_dense and shape.teacher_ffn_width is None:
        return model, spec, []  # its layers are the teacher's own
    inputs = layer_inputs(
        model, data.calibration, max_tokens=task.case.calibration_tokens, device=task.device, track=task.track
    )
    model.to("cpu")
    if shape.teacher_ffn_width is not None:
        fishers = _fishers(task, data, model, head)
        if spec.is_dense and task.case.chooses_widths(spec):
            spec = _by_need(task, spec, model, inputs, fishers)
        widths = [spec.shape_of(layer).ffn_width for layer in range(spec.num_layers)]
        model, errors = with_narrow_ffns(model, inputs, widths, head, task.track, fishers)
        task.say(
            f"{spec.stacks[0].describe_neurons()}: the relative error of the FFNs is {sum(errors) / len(errors):.2f}"
        )
    return model, spec, inputs


def _fishers(task: Task, data: Data, model: Any, head: str) -> list[Tensor]:
    """Return the weights that the neurons of each FFN are chosen under, [D, D] each."""
    found = fisher(model, data.calibration, head=head, seed=task.settings.seed, device=task.device, track=task.track)
    model.to("cpu")
    return found


def _by_need(task: Task, spec: MoESpec, model: Any, inputs: Sequence[Tensor], fishers: Sequence[Tensor]) -> MoESpec:
    """Return the spec with a width for each layer of the dense model; say the widths."""
    ffns = [read_ffn(model, index) for index in range(len(inputs))]
    found = by_need(spec, ffns, inputs, fishers, track=task.track)
    _say_widths(task, found)
    return found


def _mixtures(
    task: Task, data: Data, router: RouterSettings, spec: MoESpec, student: Any, inputs: list[Tensor]
) -> tuple[list[dict[str, Any]], MoESpec]:
    """Put routed mixtures in the place of the student's FFNs; return a row for each layer, and the spec."""
    filled, fishers = spec, None
    if experts_are_chosen(spec):
        fishers = _fishers(task, data, student, spec.head)
        if task.case.chooses_widths(spec):
            filled = _by_need(task, spec, student, inputs, fishers)
    layers = [
        decompose_layer(read_ffn(student, index), x_TD, spec, index, seed=task.settings.seed)
        for index, x_TD in task.track(enumerate(inputs), len(inputs), "decomposing layers")
    ]
    _install(student, layers, data, spec)
    rows = []
    for index, moe in task.track(list(enumerate(layers)), len(layers), "routing layers"):
        kept = max(1, len(inputs[index]) - len(inputs[index]) // HELD_OUT_SHARE)
        x_TD, held_out_TD = inputs[index][:kept], inputs[index][kept:]
        found = route_layer(
            moe,
            x_TD,
            router.for_layer(index),
            partition=spec.partition,
            held_out_TD=held_out_TD if len(held_out_TD) else None,
            widths=widths_for(filled, index),
            fisher_DD=fishers[index] if fishers else None,
        )
        rows.append({"layer": index, **found.row})
    return rows, filled


@torch.no_grad()
def _install(student: Any, layers: list[MoEFFN], data: Data, spec: MoESpec) -> None:
    """Install the mixtures; ValueError unless the model with all experts computes what it computed before."""
    batch = data.calibration[0]
    dense = output_of(student, batch)
    install_moe(student, layers)
    require_identity(layers, dense, lambda: output_of(student, batch), name=spec.teacher, family=spec.family)
