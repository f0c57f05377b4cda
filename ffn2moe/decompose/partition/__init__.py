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
    from ffn2moe.spec import FFNShape, MoESpec


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


def settled(spec: MoESpec, expert_width: str | int | float = AUTO, width_multiple: int = 1) -> MoESpec:
    """Return the spec with the partition that fits the model where it asks for `auto`, and with the width of experts.

    Gated language models whose tokens use one expert get `token_clusters`, others `coactivation`
    (docs/decisions/0027-language-model-partition.md). Experts for clusters of tokens are `expert_width` neurons wide,
    or that share of the FFN, rounded up to `width_multiple`, or as wide as an even partition needs (auto). ValueError
    where the spec asks for what its partition cannot do.
    """
    if spec.partition == AUTO:
        clustered = spec.head == "causal" and all(shape.gated for shape in spec.stacks) and _one_expert(spec)
        spec = replace(spec, partition="token_clusters" if clustered else "coactivation")
    if isinstance(expert_width, str):
        if expert_width != AUTO:
            raise ValueError(f"expert_width = {expert_width!r} must be auto, a number of neurons, or a share")
    else:
        wide = [_width(spec, shape, expert_width, width_multiple) for shape in spec.stacks]
        stacks = (replace(shape, expert_width=M) for shape, M in zip(spec.stacks, wide, strict=True))
        spec = replace(spec, stacks=tuple(stacks))
    if PARTITIONS[spec.partition].refilled and not _one_expert(spec):
        raise ValueError(
            f"the partition {spec.partition} makes experts for clusters of tokens, so that a token uses one expert in "
            f"every layer, and {spec.num_active} of {spec.num_experts} are asked for: use 1 active expert, and no "
            "budgets beside it, or the partition coactivation"
        )
    return spec


def _width(spec: MoESpec, shape: FFNShape, asked: int | float, multiple: int) -> int:
    """Return M. ValueError for disjoint experts, for those that hold less than the FFN, and for one that holds more."""
    if not PARTITIONS[spec.partition].refilled:
        raise ValueError(
            f"expert_width = {asked} is for experts that have neurons in common, and the partition {spec.partition} "
            "puts each neuron in one: use the partition token_clusters, or the width auto"
        )
    F, E = shape.ffn_width, spec.num_experts
    needed, M = -(-(F - shape.shared_width) // E), round(asked * F) if isinstance(asked, float) else asked
    if not needed <= M <= F:
        raise ValueError(
            f"expert_width = {asked} is {M} neurons: {E} experts hold an FFN of {F} neurons if each has {needed} or "
            f"more, and none can have more than {F}: use auto, a number in between, a share of the FFN, or more experts"
        )
    return -(-M // multiple) * multiple


def _one_expert(spec: MoESpec) -> bool:
    return spec.budgets == (1,) and not spec.active_per_layer and SELECTIONS[spec.selection].fixed
