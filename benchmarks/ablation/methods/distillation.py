"""Other orders of training, and other losses on logits."""

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
    Method(
        "stitched",
        "stitched, then end to end",
        "distillation",
        "m2mKD, arXiv 2402.16918",
        ("distilled",),
        layerwise_share=0.5,
        layerwise="stitched",
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
    Method(
        "js", "Jensen-Shannon", "distillation", "docs/methods.md", ("distilled",), divergence="js", heads=("causal",)
    ),
    Method(
        "balanced_kl",
        "balanced KL",
        "distillation",
        "BD-KD, arXiv 2212.12965",
        ("distilled",),
        divergence="balanced_kl",
        heads=("causal",),
    ),
    Method("taid", "TAID", "distillation", "arXiv 2501.16937", ("distilled",), divergence="taid", heads=("causal",)),
    Method(
        "token_share",
        "the half of the tokens with most to learn",
        "distillation",
        "AdaSPEC, arXiv 2510.19779",
        ("distilled",),
        token_share=0.5,
        heads=("causal",),
    ),
)
