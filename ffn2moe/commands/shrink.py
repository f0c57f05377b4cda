"""`ffn2moe shrink`: keep the experts that the texts of one task use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ffn2moe.commands._command import Command, add_path, count, one_of, silence_transformers
from ffn2moe.shrinking import SHRINK_METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    add = parser.add_argument
    add("texts", metavar="TEXTS", help="texts of the task: a .txt, .jsonl, .csv or .tsv file")
    add("--keep", type=count, required=True, metavar="N", help="experts that each layer keeps")
    add(
        "--method",
        default="drop",
        type=one_of("method", SHRINK_METHODS.names),
        metavar=f"{{{','.join(SHRINK_METHODS.names())}}}",
        help="what happens to the other experts (drop)",
    )
    add("--out", type=Path, required=True, metavar="PATH", help="the export to make; PATH stays as it is")
    add(
        "--text-column",
        default="text",
        metavar="NAME",
        help="the column of a table that holds the text (text); FIRST,SECOND for pairs",
    )
    add("--calibration-tokens", type=count, default=16384, metavar="N", help="tokens that measure the use (16384)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    add("--no-onnx", action="store_true", help="write the checkpoint only, without ONNX graphs")


def run(options: argparse.Namespace) -> int:
    from ffn2moe.progress import Screen

    with Screen() as screen:
        with screen.step("importing PyTorch"):
            from ffn2moe.shrink import shrink
        silence_transformers()
        manifest = shrink(
            options.path,
            options.texts,
            options.out,
            keep=options.keep,
            method=options.method,
            text_column=options.text_column,
            calibration_tokens=options.calibration_tokens,
            device=options.device,
            onnx=not options.no_onnx,
            say=screen.say,
            track=screen.track,
        )
        screen.print(_layers(manifest))
        screen.say(_sizes(manifest))
        screen.say(f"made {options.out}; next: ffn2moe info {options.out}")
    return 0


def _layers(manifest: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Layers (errors of the FFN on held-out texts)", title_justify="left")
    for column in ("layer", "kept", "load covered", "error before", "after", "changed by"):
        table.add_column(column, justify="left" if column == "kept" else "right")
    for row in manifest["shrink"]["layers"]:
        table.add_row(
            str(row["layer"]),
            " ".join(map(str, row["kept"])),
            f"{100 * row['covered']:.1f} %",
            *(f"{row[key]:.3f}" for key in ("error_before", "error_after", "change")),
        )
    return table


def _sizes(manifest: dict[str, Any]) -> str:
    from ffn2moe.spec import MoESpec

    before, after = (MoESpec.from_dict(one) for one in (manifest["shrink"]["from"], manifest["spec"]))
    return (
        f"{before.num_experts} experts of {before.stacks[0].expert_width} neurons became {after.num_experts} of "
        f"{after.stacks[0].expert_width}; {100 * after.active_share:.0f} % of the FFN is active "
        f"({100 * before.active_share:.0f} % before)"
    )


ROW = Command("fewer experts for one task: those that its texts use", add_arguments, run)
