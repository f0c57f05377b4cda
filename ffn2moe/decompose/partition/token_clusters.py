"""Make experts for clusters of tokens: each has the neurons that its tokens need most."""

from __future__ import annotations

import torch
from torch import Tensor

from ffn2moe.decompose.partition import Partition
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN


def dealt(ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Return the expert of each neuron, [F]: in turn. The fit of the router fills the experts anew."""
    return torch.arange(ffn.ffn_width) % num_experts


ROW = Partition("docs/decisions/0027-language-model-partition.md", dealt, refilled=True)
