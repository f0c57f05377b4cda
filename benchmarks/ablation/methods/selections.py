"""Other ways to choose the experts of a token."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(
    Method("budget", "K per layer, one budget", "selection", "docs/methods.md", active_per_layer="budget"),
    Method("elastic", "elastic, all shares at once", "selection", "SortedNet, arXiv 2309.00255", elastic=True),
)
