"""Answer from a transformers config what a model gives and how its class is built."""

from __future__ import annotations

from inspect import signature
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


def takes_token_types(model: Any) -> bool:
    """Return whether a transformers model tells the texts of a pair apart by `token_type_ids` (RoBERTa does not)."""
    types = getattr(model.config, "type_vocab_size", None) or 0
    return types > 1 and "token_type_ids" in signature(model.forward).parameters


def require_padding(config: Any, tokenizer: Any, source: str) -> None:
    """Refuse a decoder with a classifier on top whose last token cannot be told from padding. ValueError.

    Such a model reads the class at the last token that is not padding, by the `pad_token_id` of its config.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or "causal" not in family.heads:
        return
    text = config.get_text_config()
    has, pads = text.pad_token_id, tokenizer.pad_token_id
    if has is None or has != pads:
        said = "has no pad_token_id" if has is None else f"has pad_token_id {has}"
        given = "has no pad_token" if pads is None else f"pads with {pads} ({tokenizer.pad_token!r})"
        raise ValueError(
            f"{source} reads the class at the last token that is not padding, but its config.json {said} and its "
            f"tokenizer {given}: set both to one token that no text ends with"
        )


def constructor_options(config: Any, head: str) -> dict[str, Any]:
    """Return the constructor arguments of a config's transformers class: no pooler, where the head reads none."""
    if not HEADS[head].bare:
        return {}
    family = FAMILIES.get(config.model_type)
    if family is not None:
        return dict(family.options)
    return dict(options_of_class(config))


def read_generation(model: Any, folder: str | Path) -> None:
    """Give a model that was built from its config the generation config of its folder: the tokens that end a text."""
    from transformers import GenerationConfig

    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def auto_class(head: str, reads: Reads, family: Family | None) -> str:
    """Return the name of the transformers class that opens a model with this head, input and family."""
    encoder_alone = family is not None and "seq2seq" in family.heads
    return HEADS[head].class_for(reads, encoder_alone=encoder_alone)
