"""Read from a dense model's config what decides which container holds it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DenseModel:
    """The properties of a dense causal model, read from its transformers config."""

    config: Any

    @property
    def family(self) -> str:
        """The `model_type`, for example llama."""
        return self.config.model_type

    @property
    def windows(self) -> list[int]:
        """The sliding window of each layer in tokens; 0 where a layer has none."""
        window = getattr(self.config, "sliding_window", None) or 0
        match self.family:
            case "llama":  # it has no windows, whatever its config.json says
                return [0] * self.config.num_hidden_layers
            case "mistral":
                return [window] * self.config.num_hidden_layers
        return [window if kind == "sliding_attention" else 0 for kind in self.config.layer_types]

    @property
    def query_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.family == "qwen2" or self.output_bias

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of the attention has a bias."""
        return self.family != "qwen2" and bool(getattr(self.config, "attention_bias", False))

    @property
    def query_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.family == "qwen3"

    @property
    def head_width(self) -> int:
        """The width of an attention head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def plain_heads(self) -> bool:
        """Whether heads are hidden_size / num_attention_heads wide."""
        return self.head_width * self.config.num_attention_heads == self.config.hidden_size

    @property
    def rope(self) -> dict[str, Any]:
        """A copy of the parameters of the rotary embedding."""
        return deepcopy(self.config.rope_parameters)
