"""Say at which shapes the plans of an export are timed: as params.yaml lists them, or as fits the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.params import Benchmark

Shapes = tuple[tuple[int | float, ...], ...]

USUAL: Shapes = ((1, 16), (1, 128), (32, 32), (32, 128))
PROMPTS = (16, 128, 512)  # of a language model, which one person at a time talks to; decoding follows each


def shapes_of(settings: Benchmark, manifest: Mapping[str, Any]) -> Shapes:
    """Return the shapes [batch, sequence(, weight)]; `auto` gives a language model prompts that it can hold."""
    if settings.shapes != "auto":
        return settings.shapes
    if manifest["spec"]["head"] != "causal":
        return USUAL
    room = (manifest.get("model", {}).get("positions") or PROMPTS[-1] + settings.decode_tokens) - settings.decode_tokens
    return tuple((1, length) for length in sorted({min(prompt, max(1, room)) for prompt in PROMPTS}))
