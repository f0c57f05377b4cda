"""`ffn2moe verify`: check an export's files, and its graphs against PyTorch."""

from __future__ import annotations

import argparse

from ffn2moe.commands._command import Command, add_execution, add_path, count, providers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument(
        "--texts", type=count, default=16, metavar="N", help="texts in the random batches of the comparison (16)"
    )
    add_execution(parser)


def run(options: argparse.Namespace) -> int:
    from rich.text import Text

    from ffn2moe.onnx.verify import verify
    from ffn2moe.progress import Screen

    failed = 0
    with Screen() as screen:
        for check in verify(
            options.path,
            plans=[options.plan] if options.plan else None,
            texts=options.texts,
            threads=options.threads,
            providers=providers(options),
        ):
            failed += not check.passed
            mark = Text("ok", style="green") if check.passed else Text("failed", style="red")
            screen.print(mark, " " * (6 - len(mark)) + f"{check.name}: {check.detail}")
        if failed:
            screen.say(f"{failed} of the checks failed: copy the export again, or make it again (make run)")
    return 1 if failed else 0


ROW = Command("check an export's files, and its graphs against PyTorch", add_arguments, run)
