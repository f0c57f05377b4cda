"""Drop a quarter of the experts of the trained mixture: the method of `ffn2moe shrink`."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(Method("drop", "a quarter of the experts dropped", "after conversion", "UNCURL, arXiv 2409.01483", after="drop"))
