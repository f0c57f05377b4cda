"""Say at which shapes the plans of an export are timed: as params.yaml lists them, or as is usual for the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffn2moe.runtime.workload import usual_shapes
from tasks.params import Benchmark


def shapes_of(settings: Benchmark, manifest: Mapping[str, Any]) -> tuple[tuple[int | float, ...], ...]:
    """Return the shapes, [batch, sequence] or [batch, sequence, weight]."""
    if settings.shapes != "auto":
        return settings.shapes
    spec, model = manifest["spec"], manifest.get("model", {})
    longest = model.get("positions") if spec["head"] == "causal" else spec.get("max_length")
    return usual_shapes(spec["head"], longest, settings.decode_tokens)
