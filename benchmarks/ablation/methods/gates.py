"""Other weights of the chosen experts."""

from __future__ import annotations

from benchmarks.ablation.method import BOTH, Method, add

add(
    Method("softmax", "softmax over all", "gates", "Qwen2-MoE", gate="softmax", heads=BOTH),
    Method("softmax_topk", "softmax over the chosen", "gates", "Mixtral", gate="softmax_topk", heads=BOTH),
    Method("sigmoid", "sigmoid", "gates", "DeepSeek-V3", gate="sigmoid", heads=BOTH),
)
