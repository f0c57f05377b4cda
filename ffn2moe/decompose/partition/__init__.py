"""Methods that partition the neurons of an FFN into experts: one file, one row of `PARTITIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


AUTO = "auto"  # the partition that fits the model; see `settled`


def settled(spec: MoESpec) -> MoESpec:
    """Return the spec with the partition that fits the model where it asks for `auto`.

    Gated language models whose tokens use one expert get `token_clusters`, others `coactivation`
    (docs/decisions/0027-language-model-partition.md). ValueError where the spec asks for what its partition cannot do.
    """
    if spec.partition == AUTO:
        clustered = spec.head == "causal" and all(shape.gated for shape in spec.stacks) and _one_expert(spec)
        spec = replace(spec, partition="token_clusters" if clustered else "coactivation")
    if PARTITIONS[spec.partition].refilled and not _one_expert(spec):
        raise ValueError(
            f"the partition {spec.partition} makes experts for clusters of tokens, so that a token uses one expert in "
            f"every layer, and {spec.num_active} of {spec.num_experts} are asked for: use 1 active expert, and no "
            "budgets beside it, or the partition coactivation"
        )
    if spec.container is None and not PARTITIONS[spec.partition].refilled:
        _require_no_wider(spec)
    return spec


def _require_no_wider(spec: MoESpec) -> None:
    """Raise ValueError for experts with more room than neurons, where each neuron is in one of them."""
    for shape in spec.stacks:
        needed = -(-(shape.ffn_width - shape.shared_width) // spec.num_experts)
        if shape.expert_width > needed:
            raise ValueError(
                f"{spec.num_experts} experts of the partition {spec.partition} are {needed} neurons wide, as each "
                f"neuron is in one of them, and {shape.expert_width} are asked for: use the partition token_clusters, "
                "or the width auto"
            )


def _one_expert(spec: MoESpec) -> bool:
    return spec.budgets == (1,) and not spec.active_per_layer and SELECTIONS[spec.selection].fixed
