"""`ffn2moe encode`: write embeddings of texts as JSON lines."""

from __future__ import annotations

import argparse
import sys

from ffn2moe.commands._command import Command, add_execution, add_path, providers
from ffn2moe.commands._input import given_texts

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
    from ffn2moe.runtime.opened import require_text

    with given_texts(options.texts, require_text) as texts:
        export = open_export(options.path, options.plan, options.threads, providers(options))
        if not hasattr(export, "encode") or hasattr(export, "generate"):
            raise ValueError(f"{options.path} makes no embeddings: see `ffn2moe info {options.path}`")
        prompts = {"prompt": options.prompt, "prompt_name": options.prompt_name}
        for part in parts(texts, TEXTS_AT_ONCE):
            for text, embedding in zip(part, export.encode(part, **prompts), strict=True):
                row = {"text": text, "embedding": [float(f"{value:.7g}") for value in embedding.tolist()]}
                sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


ROW = Command("embeddings of texts, as JSON lines", add_arguments, run)
