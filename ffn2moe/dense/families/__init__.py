"""The table of model families: where a model type keeps its FFNs, what its models give and what they read.

A family is data. Each file of this folder holds the families of one kind as `FAMILIES`, a tuple; the table finds all
files. `register_family` adds a row from elsewhere. For a model type without a row, `ffn2moe.dense.probe` searches the
FFNs and proves what it found. This package imports no torch.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ffn2moe.literals import Reads
from ffn2moe.table import Table


@dataclass(frozen=True)
class Stack:
    """Where one stack of equal layers keeps its FFNs; all paths except `layers` are relative to a layer."""

    layers: str  # the ModuleList of layers, relative to `model.base_model`
    w_in: str  # the linear map D -> F (in a gated FFN: the one without the activation)
    w_out: str  # the linear map F -> D
    install: str  # the module whose place the mixture takes ...
    bypass: tuple[str, ...] = ()  # ... and the modules that then have nothing left to do
    w_gate: str | None = None  # gated FFNs: the linear map D -> F under the activation
    fused: bool = False  # gated FFNs whose `w_in` is one matrix [2F, D]: first the rows of the gate, then the others
    config: str = ""  # the sub-config with the activation, where the model has one
    activation: str = "hidden_act"  # the config's key; or the activation itself, where no key names it
    where: tuple[str, object] | None = None  # only for models whose config has this value under this key

    @property
    def gated(self) -> bool:
        """Whether a second linear map D -> F multiplies the first."""
        return self.fused or self.w_gate is not None


@dataclass(frozen=True)
class Family:
    """Where the models of one type keep their FFNs, what they give, and what they read.

    A model without one of the stacks (a T5 encoder alone, one tower of CLIP) has only the others.
    """

    name: str  # config.model_type
    stacks: tuple[Stack, ...]
    heads: tuple[str, ...]  # what models of this type give; the first where config.json does not say
    reads: Reads = "text"
    options: tuple[tuple[str, object], ...] = ()  # constructor arguments of the model without a head: no pooler
    positions: str | None = "max_position_embeddings"  # the config's key; None = no longest text
    positions_after_padding: bool = False  # positions are counted from the padding token's index + 1 (RoBERTa)


FAMILIES: Table[Family] = Table("model type")


def register_family(family: Family) -> Family:
    """Add a row to `FAMILIES`, or replace one; every function of the package then takes models of that type.

    For a model type `my_llama` that is built like LLaMA and keeps its layers in `decoder.layers`::

        mlp = Stack("decoder.layers", w_in="mlp.up_proj", w_gate="mlp.gate_proj", w_out="mlp.down_proj", install="mlp")
        register_family(Family("my_llama", (mlp,), heads=("causal",)))

    `ffn2moe.dense.probe.prove(model, family)` checks whether a row is right. ValueError for a row without a stack or a
    head.
    """
    if not family.stacks or not family.heads:
        raise ValueError(f"the family {family.name!r} needs at least one stack of layers and one head")
    return FAMILIES.register(family.name, family)


def positions(config: Any) -> int | None:
    """Return the longest text, in tokens, that a model of this config takes; None where nothing limits it.

    For an encoder with a decoder that reads no text (Whisper) it is the longest output.
    """
    family = FAMILIES.get(config.model_type)
    key = family.positions if family else "max_position_embeddings"
    text = config.get_text_config(decoder=True)
    limit = getattr(text, key, None) if key else None
    if not isinstance(limit, int) or limit < 1:
        return None
    return limit - text.pad_token_id - 1 if family and family.positions_after_padding else limit


def read_folder() -> None:
    """Register the families of every file in this folder."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            for family in import_module(f"{__name__}.{module.name}").FAMILIES:
                register_family(family)


read_folder()
