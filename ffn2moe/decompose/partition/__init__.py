"""Methods that partition the neurons of an FFN into experts: one file, one row of `PARTITIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ffn2moe.choices import SELECTIONS
from ffn2moe.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.decompose.statistics import NeuronStatistics
    from ffn2moe.dense.ffn import DenseFFN
    from ffn2moe.spec import MoESpec


@dataclass(frozen=True)
class Partition:
    """A method that gives each neuron an expert. The widths of two experts differ by one neuron at most."""

    reference: str
    # (ffn, statistics, num_experts, seed) -> the expert of each neuron, [F] int64. With a shared expert, FFN and
    # statistics are those of the other neurons.
    assign: Callable[[DenseFFN, NeuronStatistics, int, int], Tensor]
    # What `assign` reads: the weights alone, sums over the calibration tokens, or each neuron's activation profile.
    reads: Literal["weights", "sums", "profiles"] = "weights"
    # Whether the fit of the routers fills the experts anew, for clusters of tokens (`ffn2moe.decompose.token_experts`):
    # then a neuron may stand in several experts, and `assign` only says where it stands until then.
    refilled: bool = False


PARTITIONS: Table[Partition] = Table("partition", package="ffn2moe.decompose.partition")


def require_partition(spec: MoESpec) -> None:
    """Raise ValueError where the spec asks for what its partition cannot do."""
    row = PARTITIONS[spec.partition]
    if row.refilled and (spec.budgets != (1,) or spec.active_per_layer or not SELECTIONS[spec.selection].fixed):
        raise ValueError(
            f"the partition {spec.partition} makes experts for clusters of tokens, so that a token uses one expert in "
            f"every layer, and {spec.num_active} of {spec.num_experts} are asked for: use 1 active expert, and no "
            f"budgets beside it, or the partition {next(name for name in PARTITIONS.names() if name != spec.partition)}"
        )
