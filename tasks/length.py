"""Say how many tokens of a text the pipeline reads: `teacher.max_length`, or what the teacher's authors chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.stage import StageRun


def text_length(stage: StageRun, folder: Path, model: Any, head: str, tokenizer: Any) -> int:
    """Return the length, for a teacher as `load_dense` opens it. ValueError where a batch could not hold one text."""
    from ffn2moe.dense.length import usual_length

    wanted = stage.params.teacher.max_length
    length = usual_length(folder, model.config, head, tokenizer) if wanted == "auto" else wanted
    stage.params.require_batches_of(length)
    return length
