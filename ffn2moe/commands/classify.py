"""`ffn2moe classify`: write the scores of texts or pairs of texts, or the entities in texts, as JSON lines."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ffn2moe.commands._command import Command, add_execution, add_path, providers
from ffn2moe.commands._input import given_texts

TEXTS_AT_ONCE = 1024  # output begins after so many texts, and not at the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, the lines of standard input")
    parser.add_argument("--query", metavar="TEXT", help="the first text of a pair with every TEXT, as for a reranker")
    parser.add_argument("--pairs", action="store_true", help="every TEXT is a pair: two texts with a tab between them")
    add_execution(parser)


def run(options: argparse.Namespace) -> int:
    import json

    from ffn2moe.runtime.batching import parts
    from ffn2moe.runtime.export import open_export

    if options.pairs and options.query is not None:
        raise ValueError("--query pairs every text with one, and --pairs gives pairs: use one of the two")
    read = partial(_row, options)
    with given_texts(options.texts, read) as texts:
        export = open_export(options.path, options.plan, options.threads, providers(options))
        if not hasattr(export, "answers"):
            raise ValueError(f"{options.path} classifies nothing: see `ffn2moe info {options.path}`")
        for part in parts(map(read, texts), TEXTS_AT_ONCE):
            for row, answer in zip(part, export.answers(part), strict=True):
                given = {"text": row} if isinstance(row, str) else {"text": row[0], "text_pair": row[1]}
                sys.stdout.write(json.dumps(given | {export.gives: answer}, ensure_ascii=False) + "\n")
    return 0


def _row(options: argparse.Namespace, text: str, name: str = "a text") -> str | tuple[str, str]:
    """Return a text, or a pair of texts. ValueError, which calls it `name`, for one that is neither."""
    from ffn2moe.runtime.opened import require_text

    if options.query is not None:
        return require_text(options.query, "--query"), require_text(text, name)
    if not options.pairs:
        return require_text(text, name)
    parts = text.split("\t")
    if len(parts) != 2:
        raise ValueError(
            f"{name} has {len(parts) - 1} tabs, and a pair has one: write two texts with a tab between them"
        )
    return require_text(parts[0], f"the first text of {name}"), require_text(parts[1], f"the second text of {name}")


ROW = Command("scores of texts or pairs of texts, or the entities in texts, as JSON lines", add_arguments, run)
