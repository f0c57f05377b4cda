"""Answer from a transformers config what a model gives and how its class is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffn2moe.choices import HEADS, head_of_class
from ffn2moe.dense.families import FAMILIES, Family
from ffn2moe.dense.probe import options_of_class
from ffn2moe.dense.sentence_folder import is_sentence_encoder
from ffn2moe.literals import Reads


def head_of(config: Any, folder: str | Path | None = None) -> str:
    """Return the head of a config's checkpoint: by the class that wrote it, else the first head of its family.

    A model in the folder of a sentence encoder gives embeddings, whatever class it was trained as.
    """
    if folder is not None and is_sentence_encoder(folder):
        return "embedding"
    family = FAMILIES.get(config.model_type)
    for name in config.architectures or ():
        head = head_of_class(name)
        if head is not None and (family is None or head in family.heads):
            return head
    if family is not None:
        return family.heads[0]
    return "embedding" if hasattr(config, "vocab_size") else "features"


def constructor_options(config: Any, head: str) -> dict[str, Any]:
    """Return the constructor arguments of a config's transformers class: no pooler, where the head reads none."""
    if not HEADS[head].bare:
        return {}
    family = FAMILIES.get(config.model_type)
    if family is not None:
        return dict(family.options)
    return dict(options_of_class(config))


def auto_class(head: str, reads: Reads, family: Family | None) -> str:
    """Return the name of the transformers class that opens a model with this head, input and family."""
    encoder_alone = family is not None and "seq2seq" in family.heads
    return HEADS[head].class_for(reads, encoder_alone=encoder_alone)
