"""Keep models that had to be rewritten before they could be read: dequantised ones, and merged ones."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

LAYOUT = 1  # of the folders that this version writes; a higher number makes them all again


def cache_folder() -> Path:
    """Return the folder of rewritten models: ffn2moe/models in the user's cache. Nothing breaks if it is deleted."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root) / "ffn2moe" / "models"


def cached(name: str, files: Iterable[Path], write: Callable[[Path], None], needed: int) -> Path:
    """Return the folder that `write` makes of these files; it is made once for the same bytes and appears whole.

    `needed` is its size in bytes. OSError where the cache cannot be written or the disk is too full.
    """
    import transformers

    digest = hashlib.sha256(f"{LAYOUT} {transformers.__version__}".encode())
    for file in sorted(files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    folder = cache_folder() / f"{name}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise OSError(
            f"the rewritten model cannot be kept in {folder.parent} ({error.strerror}): set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from error
    if free < needed:
        raise OSError(
            f"the rewritten model takes {needed / 2**30:.1f} GiB, and {folder.parent} has {free / 2**30:.1f} GiB left: "
            "free some, or set XDG_CACHE_HOME to a larger disk"
        )
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    try:
        write(partial)
        partial.chmod(0o755)
        if not folder.is_dir():  # another process may have made it meanwhile
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def save_as_floats(model: Any, out: Path, **options: Any) -> None:
    """Write a dequantised or merged transformers model to the folder `out`, in float32; `options` build its class.

    Its own `save_pretrained` would refuse it, or quantise it again: so the class is built anew from its config without
    the quantisation, and takes the weights.
    """
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.dtype = torch.float32
    with torch.device("meta"):
        plain = type(model)(config, **options)
    plain.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()}, assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    plain.save_pretrained(out)
