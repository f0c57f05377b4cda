"""Other losses that a router is trained by."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(
    Method(
        "factorllm-loss",
        "FactorLLM's loss",
        "router objective",
        "arXiv 2408.11855",
        ("router", "distilled"),
        objective="factorllm",
    ),
    Method(
        "mass",
        "activation mass",
        "router objective",
        "MoEfication, arXiv 2110.01786",
        ("router", "distilled"),
        objective="mass",
    ),
    Method(
        "norm",
        "norm of the output",
        "router objective",
        "D2DMoE, arXiv 2310.04361",
        ("router", "distilled"),
        objective="norm",
    ),
    Method(
        "annealed",
        "oracle, temperature 4 to 1",
        "router objective",
        "EvoMoE, arXiv 2112.14397",
        ("router", "distilled"),
        temperature=4.0,
    ),
)
