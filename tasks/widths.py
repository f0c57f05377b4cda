"""Weigh neurons by what they are worth to the teacher, and give each layer of a student a width by that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.layer_map import layer_map
from tasks.stage import StageRun

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.data.batches import Batch
    from ffn2moe.dense.ffn import DenseFFN
    from ffn2moe.spec import MoESpec


def fishers_of(stage: StageRun, model: Any, head: str, batches: Iterable[Batch]) -> list[Tensor]:
    """Return the Fisher information of the output of each FFN of a dense model, [D, D] each; leave it on the CPU."""
    from ffn2moe.decompose.gradients import fisher
    from ffn2moe.numerics import choose_device

    device = choose_device(stage.params.compute.device)
    found = fisher(model, batches, head=head, seed=stage.params.seed, device=device, track=stage.track)
    model.to("cpu")
    return found


def widths_by_need(
    stage: StageRun, spec: MoESpec, ffns: Sequence[DenseFFN], inputs: Sequence[Tensor], fishers: Sequence[Tensor]
) -> MoESpec:
    """Return what `widths.by_need` does; say the width of each layer."""
    from ffn2moe.decompose import widths

    found = widths.by_need(spec, ffns, inputs, fishers, do=layer_map(), track=stage.track)
    used = ", ".join(map(str, widths.active_widths(found)))
    stage.say(f"neurons that a token uses, layer by layer: {used}")
    return found
