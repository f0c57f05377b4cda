"""Orders of training, and divergences, that the core offers beside the default."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(
    Method(
        "layerwise",
        "layer by layer alone",
        "distillation",
        "docs/methods.md",
        ("distilled",),
        layerwise_share=1.0,
    ),
    Method(
        "layerwise-then-end",
        "layer by layer, then end to end",
        "distillation",
        "docs/methods.md",
        ("distilled",),
        layerwise_share=0.5,
    ),
)
add(
    Method(
        "reverse_kl",
        "reverse KL",
        "distillation",
        "docs/methods.md",
        ("distilled",),
        divergence="reverse_kl",
        heads=("causal",),
    ),
    Method("taid", "TAID", "distillation", "arXiv 2501.16937", ("distilled",), divergence="taid", heads=("causal",)),
)
