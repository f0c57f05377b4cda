"""`ffn2moe encode`: write embeddings of texts as JSON lines."""

from __future__ import annotations

import argparse
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

    texts = options.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise ValueError("there is no text to encode: name texts, or pipe lines in")
    export = open_export(options.path, options.plan, options.threads, providers(options))
    if not hasattr(export, "encode") or hasattr(export, "generate"):
        raise ValueError(f"{options.path} makes no embeddings: see `ffn2moe info {options.path}`")
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        for text, embedding in zip(part, export.encode(part), strict=True):
            row = {"text": text, "embedding": [float(f"{value:.7g}") for value in embedding.tolist()]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


ROW = Command("embeddings of texts, as JSON lines", add_arguments, run)
