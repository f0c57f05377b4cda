"""Give any source the form that everything else reads: a folder with float weights as safetensors."""

from __future__ import annotations

from pathlib import Path

from ffn2moe.dense.cache import cached
from ffn2moe.dense.gguf import GgufFile, open_gguf, write_dequantised
from ffn2moe.dense.sentence_folder import transformer_folder
from ffn2moe.dense.source import download, resolve_source
from ffn2moe.progress import Say, silent

FLOAT32 = 4  # bytes


def plain_folder(source: str, revision: str | None = None, *, say: Say = silent) -> Path:
    """Return a folder that holds the model of any source of `resolve_source` as float safetensors.

    It is the source's own folder where that is one, or that of a sentence encoder's transformer; else a copy in the
    user's cache, about which `say` is told.
    ValueError or FileNotFoundError, with the remedy, before weights are read, for a source that cannot be read.
    """
    _, path = resolve_source(source)
    path = transformer_folder(path or download(source, revision))
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(open_gguf(path), say)
    return path


def _of_gguf(file: GgufFile, say: Say) -> Path:
    needed = FLOAT32 * file.parameters
    say(
        f"dequantising {file.path.name} ({file.form}) to float32, {needed / 2**30:.1f} GiB: the dequantised model is "
        "the teacher"
    )
    return cached(file.path.stem, [file.path], lambda out: write_dequantised(file, out), needed)
