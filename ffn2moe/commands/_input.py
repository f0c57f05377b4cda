"""Read the texts that a command gets: its arguments, or the lines of standard input."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

from ffn2moe.data.corpus import encoding_of


@contextmanager
def given_texts(arguments: Sequence[str], check: Callable[[str, str], Any]) -> Iterator[Iterable[str]]:
    """Give the texts of a command, to be read again and again: its arguments, or the lines of standard input.

    `check` is called with each and its name in messages before the first is given. ValueError where there is none.
    """
    with nullcontext(arguments) if arguments else standard_input() as texts:
        name, first = ("text {}", 0) if arguments else ("line {} of standard input", 1)
        count = 0
        for count, text in enumerate(texts, 1):
            check(text, name.format(count - 1 + first))
        if not count:
            raise ValueError("there is no text: name texts, or pipe lines in")
        yield texts


class Lines:
    """The lines of a file of bytes, from its first one each time: UTF-8, or UTF-16 with a byte order mark.

    Bytes that are neither become half surrogates, which `require_text` refuses with the number of the line.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start = file, file.tell()

    def __iter__(self) -> Iterator[str]:
        self._file.seek(self._start)
        encoding = encoding_of(self._file.read(2))
        self._file.seek(self._start)
        text = io.TextIOWrapper(self._file, encoding=encoding, errors="surrogateescape", newline=None)
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
