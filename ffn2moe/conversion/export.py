"""Write a mixture as an export, or as a checkpoint alone where no graphs are wanted or possible."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ffn2moe.moe import checkpoint
from ffn2moe.onnx.write import export_model, facts
from ffn2moe.progress import Say, Track
from ffn2moe.spec import MoESpec


def export_or_checkpoint(
    model: Any,
    teacher: Any | None,
    reader: Any,
    spec: MoESpec,
    folder: Path,
    *,
    onnx: bool,
    say: Say,
    track: Track,
) -> dict[str, Any]:
    """Write a mixture to the empty `folder` as an export, and return the manifest, whose file is not written.

    Without `onnx`, and where no graphs can be made (`say` tells why), it has the checkpoint and tokenizer alone.
    """
    if onnx:
        try:
            return export_model(
                model, teacher, reader, spec, folder, track=lambda plans, what: track(plans, len(plans), what)
            )
        except ValueError as error:
            say(f"no ONNX graphs: {error}")
            shutil.rmtree(folder)
            folder.mkdir()
    reader.save_pretrained(folder / "tokenizer")
    checkpoint.save(model, None, spec, folder / "checkpoint")
    return bare_manifest(model, spec)


def bare_manifest(model: Any, spec: MoESpec) -> dict[str, Any]:
    """Return the manifest of an export without plans."""
    return {"spec": spec.to_dict(), "model": facts(model, spec), "plans": {}, "refused": {}}
