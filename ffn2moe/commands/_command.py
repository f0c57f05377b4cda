"""Declare a command, and read the options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffn2moe.table import unknown

USER_ERROR = 2  # the exit code of a command that was asked for what cannot be done


@dataclass(frozen=True)
class Command:
    """A command: one line for `--help`, its arguments, and the function that returns its exit code."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def print_error(error: Exception | str) -> None:
    """Print the message of a user's error."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(Text("error:", style="red"), str(error))


def count(text: str) -> int:
    """Return a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: give a whole number from 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Return whole numbers from 1, which commas separate."""
    return [count(part.strip()) for part in text.split(",")]


def number(text: str) -> int:
    """Return a whole number from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def one_of(choice: str, names: Callable[[], tuple[str, ...]]) -> Callable[[str], str]:
    """Return a reader of one of the names; for another it suggests the nearest."""

    def read(text: str) -> str:
        if text not in names():
            raise argparse.ArgumentTypeError(unknown(choice, text, names()))
        return text

    return read


def add_path(parser: argparse.ArgumentParser) -> None:
    """Add the export that a command reads."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the export, for example exports/minilm")


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Add how an export is executed: plan, threads, provider."""
    parser.add_argument("--plan", help="how to execute it (default: the plan the benchmark chose; verify: all)")
    parser.add_argument("--threads", type=count, help="threads (default: one for each core)")
    add_providers(parser)


def add_providers(parser: argparse.ArgumentParser) -> None:
    """Add the execution providers of ONNX Runtime."""
    parser.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="ONNX Runtime execution provider, for example CUDAExecutionProvider (default: the CPU)",
    )


def providers(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the execution providers that the user named, or the CPU."""
    from ffn2moe.runtime.export import CPU

    return tuple(options.provider or CPU)


def silence_transformers() -> None:
    """Hide the messages of transformers about weights that are not needed here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def milliseconds(time: float) -> str:
    """Return a duration in milliseconds with three digits."""
    return f"{time:.3g} ms" if time < 100 else f"{time:.0f} ms"


def bold(text: str) -> Any:
    """Return a text for the screen in bold."""
    from rich.text import Text

    return Text(text, style="bold")


def facts(rows: list[tuple[str, str]]) -> Any:
    """Return a text for the screen with a name and a value on each line; values are never wrapped."""
    from rich.text import Text

    width = max(len(name) for name, _ in rows) + 1
    return Text("\n").join(bold(f"{name:<{width}}").append(value, style="not bold") for name, value in rows)
