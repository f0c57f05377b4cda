"""Describe how a model makes one embedding of a text from hidden states, in the words of sentence-transformers.

A description is saved in the spec of a model. Its weights, if a module has any, are among the model's
(`ffn2moe.dense.sentence`). Nothing here imports torch, so that an export can be opened without it.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_args

from ffn2moe.literals import Pooling, Similarity


@dataclass(frozen=True)
class Dense:
    """A linear map of the embedding and an activation; with `use_residual`, its input is added to the result."""

    in_features: int
    out_features: int
    bias: bool
    activation: str  # the name of a class without weights in torch.nn, e.g. "Tanh"
    use_residual: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm of the embedding."""

    dimension: int


@dataclass(frozen=True)
class Normalize:
    """The embedding divided by its length."""


Module = Dense | LayerNorm | Normalize
_MODULES: dict[str, type[Module]] = {kind.__name__: kind for kind in (Dense, LayerNorm, Normalize)}


@dataclass(frozen=True)
class SentenceModules:
    """What stands behind the transformer of a sentence encoder, and what is written before a text."""

    pooling: tuple[Pooling, ...] = ("mean",)  # several vectors are joined, in this order
    modules: tuple[Module, ...] = (Normalize(),)  # applied to the pooled vector, one after the other
    truncate_dim: int | None = None  # the embedding is cut to its first numbers, after all modules
    prompts: tuple[tuple[str, str], ...] = ()  # name and text of each prompt
    default_prompt_name: str | None = None
    similarity: Similarity | None = None  # that the authors compare embeddings by
    do_lower_case: bool = False  # whether the tokenizer writes all letters small; the saved one does

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.pooling if mode not in get_args(Pooling)]
        if unknown or not self.pooling:
            raise ValueError(f"pooling {list(self.pooling)} is not made of {', '.join(get_args(Pooling))}")
        if self.default_prompt_name is not None and self.default_prompt_name not in dict(self.prompts):
            raise ValueError(
                f"the default prompt {self.default_prompt_name!r} is none of the prompts "
                f"({', '.join(dict(self.prompts)) or 'there are none'})"
            )

    @property
    def unit(self) -> bool:
        """Whether embeddings have length 1."""
        return bool(self.modules) and isinstance(self.modules[-1], Normalize) and self.truncate_dim is None

    def pooled_width(self, width: int) -> int:
        """Return the dimensions of the pooled vector of a model that is `width` wide."""
        return len(self.pooling) * width

    def embedding_width(self, width: int) -> int:
        """Return the dimensions of an embedding of a model that is `width` wide."""
        found = self.pooled_width(width)
        for module in self.modules:
            if isinstance(module, Dense):
                found = module.out_features
        return found if self.truncate_dim is None else min(found, self.truncate_dim)

    def prompt(self, prompt: str | None = None, prompt_name: str | None = None) -> str:
        """Return what is written before each text: `prompt`, else the prompt of a name, else the default one.

        ValueError for an unknown name, and for both.
        """
        if prompt is not None and prompt_name is not None:
            raise ValueError("prompt and prompt_name are two ways to say the same: give one of them")
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return ""
        known = dict(self.prompts)
        if name not in known:
            raise ValueError(f"there is no prompt {name!r}; this model has: {', '.join(known) or 'none'}")
        return known[name]

    def describe(self) -> str:
        """Return pooling, modules and the default prompt in words."""
        parts = [f"{' and '.join(self.pooling)} pooling"]
        for module in self.modules:
            if isinstance(module, Dense):
                parts.append(f"a dense layer ({module.activation})")
            elif isinstance(module, LayerNorm):
                parts.append("a layer norm")
        parts.append("unit length" if self.unit else "not of unit length")
        if self.prompt():
            parts.append(f"behind the prompt {self.prompt()!r}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON gives them back."""
        return asdict(self) | {
            "pooling": list(self.pooling),
            "modules": [{"type": type(module).__name__} | asdict(module) for module in self.modules],
            "prompts": [list(prompt) for prompt in self.prompts],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SentenceModules:
        """Return what `to_dict` wrote. ValueError for anything else."""
        unknown = sorted(set(values) - {one.name for one in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys of a sentence encoder: {', '.join(unknown)}")
        read: dict[str, Any] = {}
        if "pooling" in values:
            read["pooling"] = tuple(values["pooling"])
        if "modules" in values:
            read["modules"] = tuple(_module(dict(module)) for module in values["modules"])
        if "prompts" in values:
            read["prompts"] = tuple((name, text) for name, text in values["prompts"])
        return cls(**values | read)

    @classmethod
    def of_spec(cls, spec: dict[str, Any]) -> SentenceModules:
        """Return the description in a spec as it is written in a manifest, also by version 0.1.0."""
        if spec.get("sentence") is not None:
            return cls.from_dict(spec["sentence"])
        return cls(pooling=(spec.get("pooling") or "mean",))


def _module(values: dict[str, Any]) -> Module:
    kind = _MODULES.get(name := values.pop("type", ""))
    if kind is None:
        raise ValueError(f"the module {name!r} of a sentence encoder is not one of {', '.join(_MODULES)}")
    known = {one.name for one in fields(kind)}
    needed = {one.name for one in fields(kind) if one.default is MISSING}
    if not needed <= set(values) <= known:
        raise ValueError(f"the module {name} has {', '.join(sorted(values))}, and needs {', '.join(sorted(needed))}")
    return kind(**values)
