"""Give each layer of a student a width by what its neurons are worth to the teacher."""

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


def widths_by_need(
    stage: StageRun,
    model: Any,
    spec: MoESpec,
    ffns: Sequence[DenseFFN],
    inputs: Sequence[Tensor],
    batches: Iterable[Batch],
) -> tuple[MoESpec, list[Tensor]]:
    """Return what `widths.by_need` does; say the width of each layer."""
    from ffn2moe.decompose import widths
    from ffn2moe.numerics import choose_device

    found, weights = widths.by_need(
        model,
        spec,
        ffns,
        inputs,
        batches,
        seed=stage.params.seed,
        device=choose_device(stage.params.compute.device),
        do=layer_map(),
        track=stage.track,
    )
    model.to("cpu")
    used = ", ".join(map(str, widths.active_widths(found)))
    stage.say(f"neurons that a token uses, layer by layer: {used}")
    return found, weights
