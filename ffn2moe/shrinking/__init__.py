"""Fit a mixture to one task, with fewer experts. Importing the package loads no torch.

Routers prefer some experts on the texts of a task (PreMoe, arXiv 2505.17639). A method decides what happens to the
other experts of a layer; its file in `ffn2moe.shrinking.methods` holds it as `ROW`. Then scale, output bias and output
matrices are fitted in closed form, so that each layer computes on the task's tokens what it computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffn2moe.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.moe.layer import MoEFFN
    from ffn2moe.spec import MoESpec


@dataclass(frozen=True)
class Layer:
    """A layer that is to have fewer experts."""

    moe: MoEFFN
    spec: MoESpec  # of the smaller mixture
    index: int
    kept_K: Tensor  # the experts to keep, in order
    use_E: Tensor  # of each expert on the task's tokens
    x_TD: Tensor  # the task's tokens, as the layer sees them


@dataclass(frozen=True)
class ShrinkMethod:
    """A way to make a layer of fewer experts."""

    make: Callable[[Layer], MoEFFN]
    reference: str
    width: Callable[[Sequence[MoEFFN], int], int] | None = None  # neurons of an expert then; None: as before
    keeps_order: bool = True  # whether experts that are blocks in order of importance stay so


SHRINK_METHODS: Table[ShrinkMethod] = Table("shrink method", package="ffn2moe.shrinking.methods")
