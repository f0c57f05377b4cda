"""Show what happens to a teacher of each kind: dequantised or refused by its name, and in how many seconds.

Usage: `python -m tests.acceptance.sources`. Each checkpoint is a tiny one with the names and dtypes of tensors that its
library writes. Exits with 1 if one takes 20 seconds, or is neither read nor refused with a message.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf

from ffn2moe.dense.load import load_dense
from tests.gguf_files import llama, write_gguf
from tests.quantised_files import KINDS, block_fp8, plain, stored_as

MOST_SECONDS = 20.0
Make = Callable[[Path], Path]  # writes a teacher into an empty folder; returns what a user names


def sources(model: Path) -> Iterator[tuple[str, str, Make]]:
    """Yield each kind, by what it is recognised, and what writes it; `model` is a folder of plain floats."""

    def copied(change: Callable[[Path], object]) -> Make:
        def make(folder: Path) -> Path:
            shutil.copytree(model, folder / "model")
            change(folder / "model")
            return folder / "model"

        return make

    for form in ("F16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"):
        kind = gguf.GGMLQuantizationType[form]
        yield f"GGUF {form}", "file", lambda folder, kind=kind: write_gguf(folder / "tiny.gguf", llama(), kind)
    other = {"architecture": "rwkv7"}
    yield "GGUF of rwkv7", "file", lambda folder: write_gguf(folder / "tiny.gguf", llama(), **other)
    yield "block FP8", "config.json", copied(block_fp8)
    for name, (settings, parts) in KINDS.items():
        if settings:
            yield name, "config.json", copied(lambda folder, p=parts, s=settings: stored_as(folder, p, s))
        yield name, "tensors", copied(lambda folder, p=parts: stored_as(folder, p, None))


def outcome(source: Path) -> tuple[str, float]:
    """Return what happens to a teacher in words, and the seconds that it takes."""
    said: list[str] = []
    start = time.monotonic()
    try:
        load_dense(str(source), say=said.append)
    except (ValueError, OSError) as error:
        return f"refused: {str(error).replace(str(source), source.name)}", time.monotonic() - start
    return said[0] if said else "read as it is", time.monotonic() - start


def main() -> int:
    slowest = 0.0
    print("| kind | seen by | what happens | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        model = Path(scratch, "plain")
        plain(model)
        for index, (kind, seen, make) in enumerate(sources(model)):
            folder = Path(scratch, str(index))
            folder.mkdir()
            what, seconds = outcome(make(folder))
            slowest = max(slowest, seconds)
            print(f"| {kind} | {seen} | {what} | {seconds:.2f} |", flush=True)
    return int(slowest >= MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
