"""Methods that partition the neurons of an FFN into experts: one file, one row of `PARTITIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ffn2moe.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.decompose.statistics import NeuronStatistics
    from ffn2moe.dense.ffn import DenseFFN


@dataclass(frozen=True)
class Partition:
    """A method that gives each neuron an expert. The widths of two experts differ by one neuron at most."""

    reference: str
    # (ffn, statistics, num_experts, seed) -> the expert of each neuron, [F] int64. With a shared expert, FFN and
    # statistics are those of the other neurons.
    assign: Callable[[DenseFFN, NeuronStatistics, int, int], Tensor]
    # What `assign` reads: the weights alone, sums over the calibration tokens, or each neuron's activation profile.
    reads: Literal["weights", "sums", "profiles"] = "weights"


PARTITIONS: Table[Partition] = Table("partition", package="ffn2moe.decompose.partition")
