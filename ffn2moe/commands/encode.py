"""`ffn2moe encode`: write embeddings of texts as JSON lines."""

from __future__ import annotations

import argparse
import io
import sys

from ffn2moe.commands._command import Command, add_execution, add_path, providers

TEXTS_AT_ONCE = 1024  # output begins after so many texts, and not at the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, the lines of standard input")
    add_execution(parser)


def run(options: argparse.Namespace) -> int:
    import json

    from ffn2moe.runtime.export import open_export
    from ffn2moe.runtime.opened import require_text

    texts = options.texts or lines_of_standard_input()
    if not texts:
        raise ValueError("there is no text to encode: name texts, or pipe lines in")
    name = "text {}" if options.texts else "line {} of standard input"
    for index, text in enumerate(texts):  # nothing is written before all texts are known to be good
        require_text(text, name.format(index if options.texts else index + 1))
    export = open_export(options.path, options.plan, options.threads, providers(options))
    if not hasattr(export, "encode") or hasattr(export, "generate"):
        raise ValueError(f"{options.path} makes no embeddings: see `ffn2moe info {options.path}`")
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        for text, embedding in zip(part, export.encode(part), strict=True):
            row = {"text": text, "embedding": [float(f"{value:.7g}") for value in embedding.tolist()]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


def lines_of_standard_input() -> list[str]:
    """Return the lines of standard input, read as UTF-8 with or without a byte order mark.

    Bytes that are not UTF-8 become half surrogates, which `require_text` refuses with the number of the line.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline=None)
    return [line.rstrip("\n") for line in sys.stdin]


ROW = Command("embeddings of texts, as JSON lines", add_arguments, run)
