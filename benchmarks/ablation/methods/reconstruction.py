"""Experts whose outputs are not fitted again."""

from __future__ import annotations

from benchmarks.ablation.method import BOTH, Method, add

add(
    Method("scale-and-mean", "scale and mean alone", "reconstruction", "docs/methods.md", refit=False, heads=BOTH),
)
