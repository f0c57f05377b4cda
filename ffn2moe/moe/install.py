"""Install mixtures in the place of a dense model's FFNs."""

from __future__ import annotations

from torch import nn

from ffn2moe.dense.locate import install
from ffn2moe.moe.layer import MoEFFN, connect


def install_moe(model: nn.Module, layers: list[MoEFFN]) -> None:
    """Put one mixture in the place of every FFN of a dense model."""
    for index, moe in enumerate(layers):
        install(model, index, moe)
    connect(model)
