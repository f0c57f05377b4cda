"""Fewer experts than the trained mixture has."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(
    Method("drop", "a quarter of the experts dropped", "after conversion", "UNCURL, arXiv 2409.01483", after="drop"),
    Method("regroup", "dropped, neurons regrouped", "after conversion", "DERN, arXiv 2509.10377", after="regroup"),
    Method("merge", "merged", "after conversion", "MC-SMoE, arXiv 2310.01334", after="merge"),
)
