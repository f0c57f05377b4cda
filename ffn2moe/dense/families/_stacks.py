"""Build the stacks that many families share."""

from __future__ import annotations

from typing import Any

from ffn2moe.dense.families import Stack

NO_POOLER = (("add_pooling_layer", False),)  # no head of this package reads the pooler
TEXT_ENCODER = ("embedding", "classification", "token_classification")
LANGUAGE_MODEL = ("causal", "classification", "token_classification", "embedding")


def plain(layers: str, w_in: str, w_out: str, *, inside: str, **more: Any) -> Stack:
    """Return a stack whose FFN is a module of its own: the mixture takes that module's place."""
    return Stack(layers, f"{inside}.{w_in}", f"{inside}.{w_out}", inside, **more)


def inline(layers: str, **more: Any) -> Stack:
    """Return a stack whose FFN is written out in the layer's forward (BART): the mixture replaces its first step."""
    return Stack(
        layers, "fc1", "fc2", "fc1", bypass=("activation_fn", "fc2"), **({"activation": "activation_function"} | more)
    )


def gated(layers: str = "layers", **more: Any) -> Stack:
    """Return a stack with LLaMA's FFN."""
    return Stack(layers, "mlp.up_proj", "mlp.down_proj", "mlp", w_gate="mlp.gate_proj", **more)
