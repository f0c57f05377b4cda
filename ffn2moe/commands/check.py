"""`ffn2moe check`: whether a model can be converted, what that would make, and what it would take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.commands._command import USER_ERROR, Command, print_error, silence_transformers
from ffn2moe.commands._settings import add_settings, settings_of

if TYPE_CHECKING:
    from ffn2moe.preflight.checks import Finding

STYLES = {"ok": "green", "warning": "yellow", "refused": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="the folder that `convert` would make")


def run(options: argparse.Namespace) -> int:
    from ffn2moe.progress import Screen

    settings = settings_of(options)
    with Screen() as screen:
        with screen.step("importing PyTorch"):
            from ffn2moe.conversion.task import request_of
            from ffn2moe.preflight.case import Case
            from ffn2moe.preflight.checks import findings
        silence_transformers()
        refused = 0
        case = Case(request_of(options.model, options.out, settings), screen.say, weights=False)
        for found in findings(case):
            if found.error is not None:
                refused += 1
                print_error(found.error)
            else:
                screen.print(_line(found))
        if not refused:
            screen.say(f"ready: ffn2moe convert {options.model} {options.out or 'OUT'}, with the same options")
    return USER_ERROR if refused else 0


def _line(found: Finding) -> Any:
    from rich.text import Text

    mark = Text(f"{found.kind:<9}", style=STYLES[found.kind])
    return mark.append(f"{found.check:<11}", style="bold").append(found.text, style="default not bold")


ROW = Command("whether a model can be converted, what that makes, and what it takes", add_arguments, run)
