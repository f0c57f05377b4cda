"""Answer from a transformers config what a model gives, how long its texts are and how its class is built."""

from __future__ import annotations

import inspect
from typing import Any

from ffn2moe.choices import HEADS
from ffn2moe.dense.families import FAMILIES


def head_of_class(name: str) -> str | None:
    """Return the head of a transformers class by the end of its name; None where the name does not say."""
    return next((head.name for head in HEADS.rows() if name.endswith(head.class_endings)), None)


def head_of(config: Any) -> str:
    """Return the head of this config's checkpoint: by the class that wrote it, else the first head of its family."""
    family = FAMILIES.get(config.model_type)
    for name in config.architectures or ():
        head = head_of_class(name)
        if head is not None and (family is None or head in family.heads):
            return head
    if family is not None:
        return family.heads[0]
    return "embedding" if hasattr(config, "vocab_size") else "features"


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


def constructor_options(config: Any, head: str) -> dict[str, Any]:
    """Return the constructor arguments of a config's transformers class: no pooler, where the head reads none."""
    if not HEADS[head].bare:
        return {}
    family = FAMILIES.get(config.model_type)
    if family is not None:
        return dict(family.options)
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        return {}
    known = inspect.signature(MODEL_MAPPING[type(config)]).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}
