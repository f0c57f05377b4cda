"""Encoders of images: ViT and its relatives, and CLIP with a tower of text beside one of images."""

from __future__ import annotations

from collections.abc import Iterator

from ffn2moe.dense.families import Family
from ffn2moe.dense.families._stacks import NO_POOLER, gated, plain

_HEADS = ("features", "classification")


def _towers(name: str) -> Iterator[Family]:
    """Yield CLIP or a relative: two towers, each of which is also a model of its own."""
    tower = plain("encoder.layers", "fc1", "fc2", inside="mlp")
    yield Family(f"{name}_text_model", (tower,), ("features",))
    yield Family(f"{name}_vision_model", (tower,), _HEADS, reads="images")
    both = tuple(
        plain(f"{side}_model.encoder.layers", "fc1", "fc2", inside="mlp", config=f"{side}_config")
        for side in ("text", "vision")
    )
    yield Family(name, both, _HEADS, reads="text and images")


FAMILIES = (
    *(
        Family(
            name,
            (plain("layers", "fc1", "fc2", inside="mlp"),),
            _HEADS,
            reads="images",
            options=NO_POOLER,
            positions=None,
        )
        for name in ("vit", "deit")
    ),
    Family(
        "dinov2",
        (
            plain("encoder.layer", "fc1", "fc2", inside="mlp", where=("use_swiglu_ffn", False)),
            gated("encoder.layer", activation="silu", where=("use_swiglu_ffn", True)),
        ),
        _HEADS,
        reads="images",
        positions=None,
    ),
    *_towers("clip"),
    *_towers("siglip"),
)
