"""Language models with a gated FFN: LLaMA and its relatives."""

from __future__ import annotations

from ffn2moe.dense.families import Family
from ffn2moe.dense.families._stacks import LANGUAGE_MODEL, gated, plain

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo", "olmo2", "smollm3", "stablelm")

FAMILIES = (
    *(Family(name, (gated(),), LANGUAGE_MODEL) for name in _LIKE_LLAMA),
    *(Family(name, (gated(activation="hidden_activation"),), LANGUAGE_MODEL) for name in ("gemma2", "gemma3_text")),
    *(
        Family(name, (plain("layers", "gate_up_proj", "down_proj", inside="mlp", fused=True),), LANGUAGE_MODEL)
        for name in ("phi3", "glm", "glm4")
    ),
)
