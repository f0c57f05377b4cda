"""`ffn2moe generate`: write the continuation of a prompt, or the answer of a chat model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ffn2moe.commands._command import Command, add_execution, add_path, count, providers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help='the text to continue; "" for a text without a prompt')
    add("--chat", action="store_true", help="PROMPT is a message to a chat model; print its answer")
    add("--system", metavar="TEXT", help="with --chat: the instructions before the message")
    add("--max-tokens", type=count, default=128, metavar="N", help="stop after N tokens (128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: always the most probable token (0)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens, whose probabilities add up to P (1)",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of the random draws (0)")
    add_execution(parser)


def run(options: argparse.Namespace) -> int:
    from ffn2moe.runtime.export import open_export

    if options.system is not None and not options.chat:
        raise ValueError("--system gives instructions to a chat model: add --chat")
    export = open_export(options.path, options.plan, options.threads, providers(options))
    if not hasattr(export, "generate"):
        raise ValueError(f"{options.path} generates no text: see `ffn2moe info {options.path}`")
    sampling = {
        "max_new_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    if options.chat:
        pieces = _answer(export, options, sampling)
    else:
        pieces = export.generate(options.prompt, **sampling)
        if export.continues_prompt:
            sys.stdout.write(options.prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _answer(export: Any, options: argparse.Namespace, sampling: dict[str, Any]) -> Iterator[str]:
    """Return the pieces of a chat model's answer."""
    if not hasattr(export, "chat"):
        raise ValueError(f"{options.path} is no language model, and only one can chat: leave --chat out")
    messages = [{"role": "user", "content": options.prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    pieces: Iterator[str] = export.chat(messages, **sampling)
    return pieces


ROW = Command("the continuation of a prompt, printed while it is generated", add_arguments, run)
