"""`ffn2moe gguf`: write a language model as a GGUF file for llama.cpp."""

from __future__ import annotations

import argparse
from pathlib import Path

from ffn2moe.commands._command import Command, silence_transformers
from ffn2moe.containers.gguf.types import GGUF_TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="OUT", help="what `convert` or `make run` made, a container, or a dense language model")
    add("path", type=Path, metavar="FILE", help="the file to write, for example OUT/model-q8_0.gguf")
    add(
        "--type",
        default="f16",
        metavar=f"{{{','.join(GGUF_TYPES.names())}}}",
        help="how the matrices are stored (f16)",
    )


def run(options: argparse.Namespace) -> int:
    from ffn2moe.containers.gguf.types import require_type
    from ffn2moe.progress import Screen

    require_type(options.type)
    with Screen() as screen:
        with screen.step("importing PyTorch"):
            from ffn2moe.containers.gguf.source import folder_of
            from ffn2moe.containers.gguf.write import write_gguf
        silence_transformers()
        folder = folder_of(options.source, say=screen.say)
        written = write_gguf(folder, options.path, options.type, track=screen.track)
        for note in written.notes:
            screen.say(note)
        screen.say(
            f"made {written.path}: {written.architecture}, {options.type}, {written.bytes / 2**20:.4g} MiB; next: "
            f"llama-cli -m {written.path}"
        )
    return 0


ROW = Command("a GGUF file of a language model, for llama.cpp", add_arguments, run)
