"""`ffn2moe judge`: judge a language model by questions and by a text, alone or beside its teacher."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ffn2moe.commands._command import Command, count, silence_transformers
from ffn2moe.judges.items import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    kinds = "an export, a checkpoint, a native container, a Hugging Face folder, a GGUF file, or package:NAME"
    add("model", metavar="MODEL", help=f"the language model: {kinds}")
    add("--teacher", metavar="MODEL", help="the dense model that it was made of, to say what it keeps")
    for name, task in TASKS.items():
        columns = ", ".join(task.columns)
        add(f"--{name}", type=Path, metavar="FILE", help=f"questions of {task.title}: .jsonl with {columns}")
    add("--text", type=Path, metavar="FILE", help="a text: perplexity, and the distance from the teacher")
    add("--most", type=count, metavar="N", help="ask at most N questions of each file, evenly spread (all)")
    add("--block", type=count, default=1024, metavar="N", help="tokens of the text that are read together (1024)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    add("--json", action="store_true", help="print JSON instead of a table, and lines about the work on stderr")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ffn2moe.progress import Screen

    screen = Screen(Console(stderr=options.json, highlight=False, markup=False, emoji=False))
    with screen:
        with screen.step("importing PyTorch"):
            from ffn2moe.judge import judge
        silence_transformers()
        found = judge(
            options.model,
            teacher=options.teacher,
            tasks={name: file for name in TASKS if (file := getattr(options, name)) is not None},
            text=options.text,
            most=options.most,
            block=options.block,
            device=options.device,
            say=screen.say,
            track=screen.track,
        )
        if options.json:
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
        else:
            screen.print(_table(found))
    return 0


def _table(found: dict[str, Any]) -> Any:
    """Return the figures: a row each, with those of the teacher and what is kept of them where there is one."""
    from rich.table import Table

    both = "teacher" in found
    title = f"{found['model']}, judged"
    table = Table(title=title, caption=_basis(found), title_justify="left", caption_justify="left", box=None)
    table.add_column("", no_wrap=True)
    for column in ("model", *(("teacher", "kept (95 % interval)") if both else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for label, *cells in _rows(found):
        table.add_row(label, *(cells if both else cells[:1]))
    return table


def _basis(found: dict[str, Any]) -> str:
    """Return what the figures come from."""
    lines = [
        f"{TASKS[name].title}: {figures['questions']} questions, chance {100 * figures['chance']:.1f} %"
        for name, figures in found["tasks"].items()
    ]
    if "text" in found:
        lines.append(f"Text: {found['text']['positions']} tokens in {found['text']['blocks']} blocks")
    return "\n".join(lines)


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return label, the model's figure, its teacher's, and what is kept, as text."""
    from ffn2moe.judges.answers import FIGURES

    rows: list[tuple[str, str, str, str]] = []
    for name, figures in found["tasks"].items():
        task = TASKS[name]
        for figure in task.figures:
            model, teacher = (_accuracy(figures[who][figure]) if who in figures else "" for who in ("model", "teacher"))
            kept = _kept(figures, "kept") if figure == task.figures[0] else ""
            rows.append((f"{task.title}, {FIGURES[figure].label}", model, teacher, kept))
    if "kept" in found:
        rows.append(("tasks kept, above chance", "", "", _kept(found, "kept")))
    if "text" in found:
        text = found["text"]
        model, teacher = (f"{text[who]['perplexity']:.3f}" if who in text else "" for who in ("model", "teacher"))
        rows.append(("perplexity", model, teacher, _kept(text, "kept")))
        if "divergence" in text:
            rows.append(("KL from the teacher, nats", f"{text['divergence']:.4f}", "", ""))
            rows.append(("same most probable token", f"{100 * text['agreement']:.1f} %", "", ""))
    return rows


def _accuracy(figure: dict[str, float]) -> str:
    return f"{100 * figure['value']:.1f} % ± {100 * figure['standard_error']:.1f}"


def _kept(figures: dict[str, Any], key: str) -> str:
    if key not in figures:
        return ""
    low, high = (100 * figures[f"{key}_interval"][side] for side in ("low", "high"))
    return f"{100 * figures[key]:.1f} % ({low:.1f} to {high:.1f})"


ROW = Command("judge a language model: HellaSwag, BLiMP, perplexity, distance from its teacher", add_arguments, run)
