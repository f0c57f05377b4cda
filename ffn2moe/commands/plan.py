"""`ffn2moe plan`: time every plan on this machine, and choose those to use."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.commands._command import Command, add_path, add_providers, bold, count, counts, milliseconds, providers
from ffn2moe.progress import clock

if TYPE_CHECKING:
    from ffn2moe.progress import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    add = parser.add_argument
    add(
        "--workload",
        metavar="W",
        help="batch x sequence in tokens with weights, such as 1x16:0.5,32x128:0.5, or a .txt, .jsonl or .csv file of "
        "requests (default: the workload of the plan before)",
    )
    add("--threads", type=counts, metavar="N,...", help="numbers of threads to plan for (default: one for each core)")
    add("--minutes", type=float, default=5.0, metavar="M", help="time to measure, about, and at most where it can (5)")
    add("--plans", metavar="NAME,...", help="plans to time (default: all)")
    add("--max-plans", type=count, metavar="N", help="use at most N plans; 1: the same plan for every batch")
    add("--texts", type=Path, metavar="FILE", help="texts to time on (default: the requests, or docstrings of numpy)")
    add("--text-column", default="text", metavar="NAME", help="the column of a table that holds the text (text)")
    add("--decode-tokens", type=count, metavar="N", help="tokens that a language model writes after a prompt (16)")
    add("--min-retention", type=float, metavar="R", help="share of the teacher's quality that a plan must keep (0.97)")
    add_providers(parser)


def run(options: argparse.Namespace) -> int:
    from ffn2moe.progress import Screen

    with Screen() as screen:
        return _run(options, screen)


def _run(options: argparse.Namespace, screen: Screen) -> int:
    with screen.step("importing what measures"):
        from ffn2moe.data.corpus import docstrings
        from ffn2moe.planning import lists, measure, plan_file
        from ffn2moe.runtime.engines import cores
        from ffn2moe.runtime.files import read_manifest, read_plan
    path: Path = options.path
    manifest, before = read_manifest(path), read_plan(path) or {}
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise ValueError(f"--minutes {options.minutes:g} is no time to measure in: give a number above 0")
    plans = None if options.plans is None else [name.strip() for name in options.plans.split(",")]
    measure.require_plans(path, manifest, plans)
    decode_tokens = options.decode_tokens or (before.get("workload") or {}).get("decode_tokens") or 16
    with screen.step("reading texts"):
        workload, texts = _workload(options, manifest, before)
        measure.require_readable(workload, manifest, decode_tokens)
        texts = texts or docstrings(("numpy",), standard_library=False)
    minimum = options.min_retention
    minimum = before.get("min_retention", measure.MIN_RETENTION) if minimum is None else minimum
    threads = options.threads or [cores()]
    keeps_quality = measure.quality_of(manifest, minimum)
    if manifest.get("left_out"):
        screen.say(f"not in this export: {', '.join(manifest['left_out'])}; {manifest['bring_back']} brings them back")
    screen.say(f"workload ({workload.source}): " + ", ".join(_share(shape) for shape in workload.shapes))
    for plan in measure.plans_to_time(manifest["plans"], plans, providers(options)):
        if not keeps_quality[plan]:
            screen.say(f"{plan} is timed, but keeps less than {100 * minimum:g} % of the teacher's quality")

    seconds = 60 * options.minutes
    races = len(workload.shapes) + lists.reads_lists(manifest["spec"]["head"])
    with _countdown(screen, seconds, len(threads) * races) as track:
        setting = measure.Setting(path, workload, threads, keeps_quality, decode_tokens, measure.retention_of(manifest))
        on_lists = min(lists.SECONDS, seconds / (10 * len(threads)))  # of each number
        measured = measure.measure(
            setting,
            texts,
            plans=plans,
            seconds=seconds - len(threads) * on_lists,
            providers=providers(options),
            track=track,
        )
        measured = lists.with_lists(measured, texts, seconds=on_lists, providers=providers(options), track=track)
    with screen.step("measuring the memory of the chosen plans"):
        content = plan_file.planned(measured, min_retention=minimum, max_plans=options.max_plans, texts=texts)
    content |= {"bounds": before["bounds"]} if "bounds" in before else {}
    _show(screen, content)
    screen.say(f"wrote {plan_file.write(path, content)}")
    return 0


def _workload(options: argparse.Namespace, manifest: dict[str, Any], before: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the workload that the user or the plan before names, and the texts to time it on, if any."""
    from ffn2moe.data.corpus import read_corpus
    from ffn2moe.runtime import workload as work

    wanted: str | None = options.workload
    texts = read_corpus(str(options.texts), options.text_column) if options.texts else []
    if wanted is not None and (Path(wanted).suffix in work.FILES or Path(wanted).is_file()):
        found, requests = _requests(options, manifest, wanted)
        return found, texts or requests
    if wanted is not None:
        return work.parse_workload(wanted), texts
    if "workload" in before:
        shapes = {(one["batch"], one["sequence"]): one["weight"] for one in before["workload"]["shapes"]}
        return work.Workload.of(shapes, before["workload"]["source"]), texts
    raise ValueError(
        f"{options.path} has no plan yet, so the workload is unknown: name one, for example "
        "--workload 1x16:0.5,32x128:0.5"
    )


def _requests(options: argparse.Namespace, manifest: dict[str, Any], file: str) -> tuple[Any, list[str]]:
    """Return the workload of a file of requests, and their texts."""
    from ffn2moe.runtime import workload as work
    from ffn2moe.runtime.files import load_tokenizer

    batches = work.read_requests(file, options.text_column)
    spec = manifest["spec"]
    longest = int(spec["max_length"]) if spec["head"] not in ("causal", "seq2seq") else None
    tokenizer = load_tokenizer(options.path / "tokenizer", longest)
    found = work.workload_of(
        batches,
        lambda some: [max(1, len(one.ids)) for one in tokenizer.encode_batch(list(some))],
        f"{len(batches)} requests of {Path(file).name}",
    )
    return found, [text for batch in batches for text in batch]


def _share(shape: Any) -> str:
    return f"{shape} ({100 * shape.weight:.3g} % of the batches)"


@contextmanager
def _countdown(screen: Screen, seconds: float, shapes: int) -> Iterator[Callable[[str, range], Iterator[int]]]:
    """Give what wraps the rounds of each shape: it shows the shape, and how much of the time is left at most."""
    end = time.monotonic() + seconds
    with screen.step("opening the plans", shapes, estimate=False) as step:

        def track(label: str, rounds: range) -> Iterator[int]:
            try:
                for index in rounds:
                    left = clock(max(0.0, end - time.monotonic()))
                    step.describe(f"timing {label}, round {index + 1}, {left} left at most, shapes")
                    yield index
            finally:
                step.advance()

        yield track


# --- what is shown ---------------------------------------------------------------------------------------------------


def _show(screen: Screen, content: dict[str, Any]) -> None:
    """Print the times of every plan for each number of threads, the choice, and what it costs in memory."""
    from ffn2moe.runtime.plans import is_dense

    over = content["best_dense_plan"]
    if is_dense(over):
        over = "the best dense plan"
    for choice in content["by_threads"]:
        threads = choice["threads"]
        rows = {
            (plan, _column(row)): row
            for plan, timed in content["timings"].items()
            for row in timed
            if row["threads"] == threads
        }
        picked = {_column(row): row["plan"] for row in content["choices"] if row["threads"] == threads}
        of_lists = [row for row in content["lists"] if row["threads"] == threads]
        for chosen in of_lists:
            column = f"list of {chosen['texts']}"
            picked[column] = chosen["plan"]
            rows |= {(plan, column): row for plan, row in chosen["timings"].items()}
        screen.print(_times(list(content["timings"]), rows, picked, choice, over))
        if any(row["high"] is None for row in rows.values()):
            screen.say(f"~: dropped early, clearly slower than {over}")
        for reason in (choice["reason"], *(row["reason"] for row in of_lists)):
            screen.say(f"{_threads(threads)}: {reason}")
    for plan, reason in content["left_out"].items():
        screen.say(f"left out: {plan}: {reason}")
    sizes = ", ".join(f"{size:.0f} MiB with {plan}" for plan, size in content["memory_mib"].items())
    screen.say(f"memory of a process, one plan opened after the other: {sizes}")
    if "agreement" in content:
        screen.say(
            f"embeddings of one text on two of the plans have a cosine of {content['agreement']:.3f}: if you store "
            "embeddings and compare them later, use one plan for every batch with --max-plans 1"
        )


def _times(
    plans: list[str],
    rows: dict[tuple[str, str], dict[str, Any]],
    picked: dict[str, str],
    choice: dict[str, Any],
    over: str,
) -> Any:
    """Return the table of one number of threads: a plan a row, a shape a column, with the ratio to `over`."""
    from rich.table import Table

    columns = list(dict.fromkeys(column for _, column in rows))
    title = f"Time of a batch or list of texts, and speed over {over} there (noise), {_threads(choice['threads'])}"
    table = Table(title=title, title_justify="left")
    table.add_column("plan")
    for column in columns:
        table.add_column(column, justify="right")
    for plan in plans:
        cells = [_timed(rows[plan, column]) if (plan, column) in rows else "" for column in columns]
        marked = [
            bold(cell) if picked.get(column) == plan else cell for column, cell in zip(columns, cells, strict=True)
        ]
        table.add_row(bold(plan) if plan in picked.values() else plan, *marked)
    table.add_section()
    table.add_row(bold("chosen"), *(picked.get(column, "") for column in columns))
    return table


def _column(row: dict[str, Any]) -> str:
    return f"{row['batch']} x {row['sequence']}" + ("" if row["phase"] == "whole" else f"\n{row['phase']}")


def _threads(count: int) -> str:
    return f"{count} {'thread' if count == 1 else 'threads'}"


def _timed(row: dict[str, Any]) -> str:
    """Return milliseconds and, below, the ratio; ~ marks the ratio of a plan that was dropped after a few rounds."""
    ratio = f"{row['speedup_vs_best_dense']:.2f}x"
    if row["high"] is None:
        ratio = f"~{ratio}"
    elif row["low"] != row["high"]:
        ratio += f" ±{(row['high'] - row['low']) / 2:.2f}"
    return f"{milliseconds(row['median_ms'])}\n{ratio}"


ROW = Command("time every plan on this machine, and choose those to use", add_arguments, run)
