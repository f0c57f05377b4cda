"""`ffn2moe encode`: write embeddings of texts as JSON lines."""

from __future__ import annotations

import argparse
import codecs
import io
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

from ffn2moe.commands._command import Command, add_execution, add_path, providers

TEXTS_AT_ONCE = 1024  # output begins after so many texts, and not at the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, the lines of standard input")
    parser.add_argument("--prompt-name", metavar="NAME", help="the model's prompt to write before each text")
    parser.add_argument("--prompt", metavar="TEXT", help="a prompt of your own to write before each text")
    add_execution(parser)


def run(options: argparse.Namespace) -> int:
    import json

    from ffn2moe.runtime.batching import parts
    from ffn2moe.runtime.export import open_export

    with _texts(options) as texts:
        export = open_export(options.path, options.plan, options.threads, providers(options))
        if not hasattr(export, "encode") or hasattr(export, "generate"):
            raise ValueError(f"{options.path} makes no embeddings: see `ffn2moe info {options.path}`")
        prompts = {"prompt": options.prompt, "prompt_name": options.prompt_name}
        for part in parts(texts, TEXTS_AT_ONCE):
            for text, embedding in zip(part, export.encode(part, **prompts), strict=True):
                row = {"text": text, "embedding": [float(f"{value:.7g}") for value in embedding.tolist()]}
                sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


@contextmanager
def _texts(options: argparse.Namespace) -> Iterator[Iterable[str]]:
    """Give the texts to encode. ValueError, before one is encoded, where one of them is no text, or where is none."""
    from ffn2moe.runtime.opened import require_text

    with nullcontext(options.texts) if options.texts else standard_input() as texts:
        name, first = ("text {}", 0) if options.texts else ("line {} of standard input", 1)
        count = 0
        for count, text in enumerate(texts, 1):
            require_text(text, name.format(count - 1 + first))
        if not count:
            raise ValueError("there is no text to encode: name texts, or pipe lines in")
        yield texts


class Lines:
    """The lines of a file of bytes, from its first one each time: UTF-8, or UTF-16 with a byte order mark.

    Bytes that are neither become half surrogates, which `require_text` refuses with the number of the line.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start = file, file.tell()

    def __iter__(self) -> Iterator[str]:
        self._file.seek(self._start)
        marked = self._file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        self._file.seek(self._start)
        text = io.TextIOWrapper(
            self._file, encoding="utf-16" if marked else "utf-8-sig", errors="surrogateescape", newline=None
        )
        try:
            for line in text:
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"standard input is not {error.encoding} text ({error.reason}): convert it first"
            ) from None
        finally:
            text.detach()


@contextmanager
def standard_input() -> Iterator[Iterable[str]]:
    """Give the lines of standard input, to be read again and again: those of a pipe are kept on disk meanwhile."""
    if not isinstance(sys.stdin, io.TextIOWrapper):
        yield [line.rstrip("\n") for line in sys.stdin]
    elif sys.stdin.seekable():
        yield Lines(sys.stdin.buffer)
    else:
        with tempfile.TemporaryFile() as kept:
            shutil.copyfileobj(sys.stdin.buffer, kept)
            kept.seek(0)
            yield Lines(kept)


ROW = Command("embeddings of texts, as JSON lines", add_arguments, run)
