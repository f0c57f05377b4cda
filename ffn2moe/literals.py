"""Closed sets of names: kernels, graphs and saved files fix them. Open choices are tables (`ffn2moe.choices`)."""

from __future__ import annotations

from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Pooling = Literal["mean", "cls"]
Reads = Literal["text", "images", "speech", "text and images"]  # the input of a model
# What happens to the experts that a task uses least (ffn2moe.shrink is the definition).
#   drop: they go    regroup: their neurons go to the others, which get wider    merge: the others take their mean
Shrinking = Literal["drop", "regroup", "merge"]
