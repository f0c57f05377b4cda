"""Other partitions of the neurons."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(
    Method("contiguous", "contiguous", "partition", "arXiv 2408.11855", partition="contiguous"),
    Method("random", "random", "partition", "arXiv 2406.16554", partition="random"),
    Method("weights", "weights", "partition", "MoEfication, arXiv 2110.01786", partition="weights"),
    Method("gradient", "gradient", "partition", "LLaMA-MoE, arXiv 2406.16554", partition="gradient"),
    Method(
        "nested",
        "nested, a prefix per token",
        "partition",
        "SortedNet, arXiv 2309.00255",
        partition="nested",
        selection="prefix",
    ),
    Method("shared", "shared expert + coactivation", "partition", "CMoE, arXiv 2502.04416", shared=True),
    Method(
        "guard",
        "shared expert + coactivation + guard",
        "partition",
        "Super Experts, arXiv 2507.23279",
        shared=True,
        guard=True,
    ),
)
