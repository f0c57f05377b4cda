"""Stitched layers learn in the teacher and leave nothing of the training behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablation.methods.stitched import distil_stitched
from ffn2moe.distill.distiller import Training
from ffn2moe.distill.layerwise import LayerCurve
from ffn2moe.moe.layer import moe_layers
from tests.test_distillation import OBJECTIVE, opened, require_trained


def stitched(dense: Any, student: Any, batches: Any, *, steps: int = 30, stitch: bool = False) -> list[LayerCurve]:
    training = Training(steps=steps, learning_rate=1e-2)
    return list(distil_stitched(dense, student, batches, OBJECTIVE, training, stitch=stitch))


def test_stitched_layers_lower_the_error_of_every_layer_and_train_router_and_experts(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    require_trained(student, before, stitched(dense, student, batches))


def test_a_layer_that_reads_whole_texts_is_not_stitched(tiny_teacher: Path):
    with pytest.raises(ValueError, match="train the layers alone"):
        stitched(*opened(tiny_teacher, routing="sequence"))


def test_a_stitch_leaves_nothing_of_itself_behind(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher)
    kinds = {name: type(module) for name, module in student.named_modules()}
    places = {name: type(module) for name, module in dense.named_modules()}
    stitched(dense, student, batches, stitch=True, steps=2)
    assert {name: type(module) for name, module in student.named_modules()} == kinds
    assert {name: type(module) for name, module in dense.named_modules()} == places
    assert moe_layers(dense) == [] and not any(moe.observer for moe in moe_layers(student))
