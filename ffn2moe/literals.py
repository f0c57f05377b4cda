"""Closed sets of names: kernels, graphs and saved files fix them. Open choices are tables (`ffn2moe.choices`)."""

from __future__ import annotations

from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Reads = Literal["text", "images", "speech", "text and images"]  # the input of a model
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]  # of embeddings
Widths = Literal["auto", "same", "budget"]  # of the layers' experts, or of their FFNs without experts
