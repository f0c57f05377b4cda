"""Stitched layers (m2mKD, arXiv 2402.16918): each layer learns in the teacher, in the place of its FFN.

It learns what the teacher's output asks of it, with the teacher as the meta model of m2mKD. That method puts one module
after another into a small model of its own, with linear stitches around it because widths differ, and throws the
stitches away. Here the widths agree, and the layers around the module are those that it will stand among, so no stitch
is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.grid import Cell
from benchmarks.ablation.method import Method, add
from benchmarks.ablation.recipes import RECIPES, Made, Recipe, end_to_end, exhaust, steps_apart, training
from ffn2moe.choices import ROUTINGS
from ffn2moe.data.batches import BatchSource
from ffn2moe.dense.blocks import install_in_block
from ffn2moe.dense.locate import ffn_layers, read_ffn, stack_of
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.layerwise import LayerCurve, modules_for_ffns
from ffn2moe.distill.objectives import Objective
from ffn2moe.moe.layer import moe_layers


def distil_stitched(
    teacher: Any,
    student: Any,
    batches: BatchSource,
    objective: Objective,
    training: Training,
    *,
    stitch: bool = False,
) -> Iterator[LayerCurve]:
    """Train each layer of the student in the teacher, by `objective`; yield each layer's losses when it is done.

    Whole models run, which keep all threads busy, so the layers come one after another. With `stitch`, a linear map
    behind the module starts as the identity, learns with it, and is thrown away. ValueError if the student has not one
    module for each FFN, or if its routers read whole texts; FloatingPointError if a loss is not finite.
    """
    ffns = modules_for_ffns(teacher, student)
    if any(not ROUTINGS[moe.routing].own_input for moe in moe_layers(student)):
        raise ValueError(
            "routing 'sequence' reads the input of the model's first mixture, which a layer that stands alone in the "
            "teacher does not see: train the layers alone, or end to end"
        )
    path_of = {id(module): path for path, module in teacher.named_modules()}
    blocks = [path_of[id(block)] for block in ffn_layers(teacher)]
    for layer, ffn in enumerate(ffns):
        # Copy the teacher's structure around its own, frozen weights.
        mixed = copy.deepcopy(teacher, {id(tensor): tensor for tensor in teacher.parameters()})
        trained = copy.deepcopy(ffn)
        placed = nn.Sequential(trained, _identity(len(read_ffn(teacher, layer).w_out_DF))) if stitch else trained
        install_in_block(mixed.get_submodule(blocks[layer]), stack_of(teacher, layer), placed)
        run = Distiller(teacher, mixed, batches, objective, replace(training, balance_step=0.0, scope="experts"))
        try:
            losses = [metrics.loss for metrics in run.run()]
        except FloatingPointError as error:
            raise FloatingPointError(f"layer {layer}, stitched into the teacher: {error}") from error
        ffn.load_state_dict(trained.state_dict())
        yield LayerCurve(layer, losses)


def _identity(width: int) -> nn.Linear:
    stitch = nn.Linear(width, width)
    nn.init.eye_(stitch.weight)
    nn.init.zeros_(stitch.bias)
    return stitch


def train(bench: Bench, cell: Cell, made: Made, teacher: Any, objective: Objective) -> None:
    """Train stitched layers for their share of the steps, then the model end to end.

    A step runs the model once for each layer, so the layers get as many steps fewer as there are layers.
    """
    apart = steps_apart(bench, cell)
    if apart:
        one = training(bench, cell, made, steps=max(1, apart // bench.num_layers))
        exhaust(distil_stitched(teacher, made.model, bench.batches(cell.seed), objective, replace(one, elastic=())))
    end_to_end(bench, cell, made, teacher, objective, training(bench, cell, made, steps=bench.budget.steps - apart))


RECIPES.register("stitched", Recipe(train))
add(
    Method(
        "stitched",
        "stitched, then end to end",
        "distillation",
        "m2mKD, arXiv 2402.16918",
        ("distilled",),
        layerwise_share=0.5,
        recipe="stitched",
    )
)
