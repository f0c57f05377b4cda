"""Match the tensors of a folder with those of a model: none is missing, and none is left out without a word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffn2moe.dense.weights import Header

NAMED = 3  # tensors that a message names at most


@dataclass(frozen=True)
class Match:
    """Which tensor of the files each tensor of the model is; nothing of the weights is read."""

    place: dict[str, str]  # the model's name -> the files' name
    made: dict[str, str]  # the model's name -> one of the tensors of the files that transformers makes it of
    left: tuple[str, ...]  # the names of the files that the model does not take


def match(folder: str | Path, headers: Mapping[str, Header], model: Any) -> Match:
    """Match the files with a transformers model, whose weights may be on the meta device.

    ValueError for a tensor that is there twice, or of another shape than the model's.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    place: dict[str, str] = {}
    made: dict[str, str] = {}
    left = []
    for source, header in headers.items():
        name, converted = rename_source_key(source, renamings, converters, model.base_model_prefix, wanted)
        if converted is not None:
            made[name] = source
            continue
        if name in place:
            raise ValueError(f"{folder} holds {name} twice, as {place[name]} and as {source}: remove one")
        if name not in wanted:
            left.append(source)
            continue
        place[name] = source
        if header.shape != tuple(wanted[name].shape):
            raise ValueError(
                f"{name} in {folder} is {list(header.shape)}, and by config.json {list(wanted[name].shape)}: they "
                "belong to different models"
            )
    return Match(place, made, tuple(left))


def explain(folder: str | Path, model: Any, left: Iterable[str]) -> str | None:
    """Return in words which tensors of the files a model does not read, and None where it reads all.

    ValueError for a tensor that is neither of another head of this model type nor one that transformers says that the
    model computes itself: without it the model would be another one.
    """
    left = sorted(left)
    known = [name for name in left if _is_ignored(model, name)]
    rest = [name for name in left if name not in known]
    if rest:
        elsewhere = {name for names in _other_classes(model) for name in names}
        base = f"{model.base_model_prefix}."
        strange = [name for name in rest if not {name, base + name, name.removeprefix(base)} & elsewhere]
        if strange:
            more = f", and {len(strange) - NAMED} more" if len(strange) > NAMED else ""
            raise ValueError(
                f"{folder} holds {', '.join(strange[:NAMED])}{more}, which {type(model).__name__} does not read: "
                "without them it would be another model. Name the folder whose config.json describes these weights"
            )
    if not left:
        return None
    counts = Counter(_part(model, name) for name in left)
    parts = ", ".join(f"{part} ({count} tensor{'s' * (count > 1)})" for part, count in sorted(counts.items()))
    return f"leaving out {parts}: {type(model).__name__} does not read them"


def _is_ignored(model: Any, name: str) -> bool:
    """Return whether transformers drops this tensor: a buffer that the model computes, or a part that it lacks."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq$")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def _other_classes(model: Any) -> Iterator[set[str]]:
    """Yield the names of the tensors of every transformers class of this model type."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = set()
    for key, mapping in vars(modeling_auto).items():
        if key.startswith("MODEL_") and key.endswith("_MAPPING_NAMES"):
            names = mapping.get(model.config.model_type) or ()
            found |= {names} if isinstance(names, str) else set(names)
    for name in sorted(found):
        try:
            with torch.device("meta"):
                yield set(getattr(transformers, name)(model.config).state_dict())
        except (ValueError, AttributeError, TypeError, KeyError):
            continue  # a class that asks for more than this config says


def _part(model: Any, name: str) -> str:
    """Return the module that a tensor belongs to, as a message names it."""
    path = name.removeprefix(f"{model.base_model_prefix}.").split(".")
    return path[-1] if path[-1] in ("position_ids", "inv_freq") else path[0]
