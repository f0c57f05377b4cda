"""`ffn2moe info | encode | verify PATH`: look at an export, use it, check it.

Everything heavy is imported where it is used, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 done, 1 a check failed, 2 the user's error, told in one line."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BrokenPipeError:  # the reader of our output, `head` say, has had enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        _say_error(error)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ffn2moe", description="Use what a run of ffn2moe exported.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = _command(commands, "info", _info, "what an export is: experts, plans, quality, speed")
    info.set_defaults(plan=None)

    encode = _command(commands, "encode", _encode, "embeddings of texts, as JSON lines")
    encode.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, the lines of standard input")
    _running(encode)

    verify = _command(commands, "verify", _verify, "check an export's files, and its graphs against PyTorch")
    verify.add_argument("--texts", type=_count, default=16, help="random batches are made of so many texts")
    _running(verify)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.add_argument("path", type=Path, metavar="PATH", help="the export, for example exports/minilm")
    command.set_defaults(command=run)
    return command


def _running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plan", help="how to execute it (default: the one the benchmark chose; verify: all)")
    command.add_argument("--threads", type=_count, help="threads (default: one a core)")
    command.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="ONNX Runtime execution provider, for example CUDAExecutionProvider (default: the CPU)",
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: give a whole number from 1")
    return int(text)


def _say_error(error: Exception) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print("[red]error:[/red]", str(error), markup=True)


def _providers(options: argparse.Namespace) -> tuple[str, ...]:
    from ffn2moe.runtime import CPU

    return tuple(options.provider or CPU)


# --- info -----------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ffn2moe.runtime import default_plan, read_manifest, read_plan

    path: Path = options.path
    manifest, measured = read_manifest(path), read_plan(path)
    spec, plans = manifest["spec"], manifest["plans"]
    chosen = default_plan(path, plans)
    console = Console(highlight=False)

    what = Table(box=None, pad_edge=False, show_header=False)
    share = spec["num_active"] * spec["expert_width"] / spec["ffn_width"]
    for label, text in (
        ("export", str(path)),
        ("teacher", spec["teacher"]),
        ("model", f"{spec['model_class']}, {spec['num_layers']} layers, width {spec['width']}"),
        (
            "experts",
            f"{spec['num_experts']} of {spec['expert_width']} neurons a layer, {spec['num_active']} chosen by each "
            f"token: {100 * share:.0f} % of the FFN is active",
        ),
        ("partition", spec["partition"]),
        ("embeddings", f"{spec['width']} numbers, {spec['pooling']} pooling, up to {spec['max_length']} tokens"),
        ("default plan", chosen + ("" if measured else " (not measured yet)")),
    ):
        what.add_row(f"[bold]{label}[/bold]", text)
    console.print(what)

    quality = Table(title="Plans", title_justify="left")
    quality.add_column("plan")
    for column in ("size", "from PyTorch", "nDCG@10", "of the teacher's"):
        quality.add_column(column, justify="right")
    for plan, entry in plans.items():
        file = path / entry["file"]
        quality.add_row(
            f"[bold]{plan}[/bold]" if plan == chosen else plan,
            f"{file.stat().st_size / 2**20:.0f} MiB" if file.is_file() else "missing",
            f"{entry['parity_max_abs']:.1e}",
            f"{entry['retrieval_ndcg_at_10']:.4f}",
            f"{100 * entry['retention']:.1f} %",
        )
    console.print(quality)
    if measured:
        speed = Table(title="Time of a batch x sequence, and speed over dense", title_justify="left")
        speed.add_column("plan")
        for row in measured["timings"][chosen]:
            speed.add_column(f"{row['batch']} x {row['sequence']}", justify="right")
        for plan, rows in measured["timings"].items():
            cells = (f"{row['median_ms']:.3g} ms {row['speedup_vs_dense']:.2f}x" for row in rows)
            speed.add_row(f"[bold]{plan}[/bold]" if plan == chosen else plan, *cells)
        console.print(speed)
        console.print(f"{measured['reason']} (on {measured['machine']['cpu']})")
    return 0


# --- encode ---------------------------------------------------------------------------------------------------------


def _encode(options: argparse.Namespace) -> int:
    import json

    from ffn2moe.runtime import open_export

    texts = options.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise ValueError("there is no text to encode: name texts, or pipe lines in")
    export = open_export(options.path, options.plan, options.threads, _providers(options))
    for start in range(0, len(texts), 1024):  # output comes as it is made
        part = texts[start : start + 1024]
        for text, embedding in zip(part, export.encode(part), strict=True):
            row = {"text": text, "embedding": [float(f"{value:.7g}") for value in embedding.tolist()]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


# --- verify ---------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ffn2moe.verify import verify

    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    for check in verify(
        options.path,
        plans=[options.plan] if options.plan else None,
        texts=options.texts,
        threads=options.threads,
        providers=_providers(options),
    ):
        failed += not check.passed
        console.print("[green]ok[/green]    " if check.passed else "[red]failed[/red]", f"{check.name}: {check.detail}")
    if failed:
        console.print(f"{failed} of the checks failed: copy the export again, or make it again (make run)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
