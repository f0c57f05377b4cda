"""Drop the experts that the task uses least (PreMoe). The model gets smaller; a token costs what it did."""

from __future__ import annotations

from ffn2moe.moe.fit import calibrate
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.shrinking import Layer, ShrinkMethod
from ffn2moe.shrinking.neurons import gather, places, take_router


def make(layer: Layer) -> MoEFFN:
    """Return the layer with the kept experts alone."""
    made = gather(layer.moe, layer.spec, layer.index, places(layer.moe)[layer.kept_K])
    take_router(made, layer.moe, layer.kept_K)
    calibrate(made, layer.x_TD)
    return made


ROW = ShrinkMethod(make, "PreMoe, arXiv 2505.17639")
