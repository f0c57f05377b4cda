"""FactorLLM's recipe (arXiv 2408.11855), as its code does it and as its paper describes it."""

from __future__ import annotations

from benchmarks.ablation.method import BOTH, Method, add

add(
    Method(
        "factorllm-released",
        "FactorLLM, as released",
        "FactorLLM",
        "arXiv 2408.11855, its code",
        ("free", "distilled"),
        partition="contiguous",
        recipe="released",
        heads=BOTH,
    ),
    Method(
        "factorllm-published",
        "FactorLLM, as published",
        "FactorLLM",
        "arXiv 2408.11855",
        ("distilled",),
        partition="contiguous",
        recipe="published",
        heads=BOTH,
    ),
)
