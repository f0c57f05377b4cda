"""Find the folder whose model becomes a GGUF file: of an export, a container, a checkpoint, or a dense model."""

from __future__ import annotations

import json
from pathlib import Path

from ffn2moe.containers.table import CONTAINERS
from ffn2moe.dense.plain import plain_folder
from ffn2moe.moe.checkpoint import SPEC_FILE, load_spec
from ffn2moe.progress import Say, silent
from ffn2moe.runtime.files import MANIFEST, read_manifest
from ffn2moe.spec import MoESpec


def folder_of(source: str, *, say: Say = silent) -> Path:
    """Return the folder of transformers that a source holds.

    A source is what `ffn2moe convert` or `make run` made, a folder in it, or any dense model. ValueError or
    FileNotFoundError, with the remedy, for a mixture that is in no native container.
    """
    path = Path(source).expanduser()
    if (path / MANIFEST).is_file():
        return _of_export(path)
    if (path / SPEC_FILE).is_file():
        model_type = json.loads((path / "config.json").read_text()).get("model_type")
        if model_type not in CONTAINERS and not load_spec(path).is_dense:
            raise ValueError(
                f"{path} is a checkpoint of this project, whose experts no engine reads: name the native container "
                "beside it, or the folder of both"
            )
        return path
    return plain_folder(source, say=say)


def _of_export(path: Path) -> Path:
    manifest = read_manifest(path)
    spec = MoESpec.from_dict(manifest["spec"])
    if "container" in manifest:
        return path / manifest["container"]["folder"]
    if spec.head != "causal":
        raise ValueError(f"{path} is no language model ({spec.head}), and GGUF is written of language models alone")
    if spec.is_dense:
        return path / "checkpoint"
    raise ValueError(
        f"{path} has no native container, and llama.cpp reads no other mixture: convert it again with --container "
        "auto, or run the pipeline with decompose.container=auto"
    )
