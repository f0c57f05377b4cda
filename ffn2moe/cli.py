"""`ffn2moe convert MODEL OUT` makes an export; `info | encode | generate | verify PATH` look at it, use it, check it.
`ffn2moe plan PATH` chooses by measuring how this machine runs it; `ffn2moe shrink PATH TEXTS` fits it to one task.

Everything heavy is imported where it is used, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffn2moe.spec import MoESpec

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 done, 1 a check failed, 2 the user's error, told in one line."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BrokenPipeError:  # the reader of our output, `head` say, has had enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        _say_error(error)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ffn2moe", description="Convert a dense transformer, and use what came of it."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _converting(commands)

    info = _command(commands, "info", _info, "what an export is: experts, plans, quality, speed")
    info.set_defaults(plan=None)

    encode = _command(commands, "encode", _encode, "embeddings of texts, as JSON lines")
    encode.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, the lines of standard input")
    _running(encode)

    generate = _command(commands, "generate", _generate, "the continuation of a prompt, as it is made")
    generate.add_argument("prompt", metavar="PROMPT", help='a text to go on with; "" for a text from nothing')
    generate.add_argument("--max-tokens", type=_count, default=128, metavar="N", help="stop after N tokens (128)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token")
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens, of probability P together",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
    _running(generate)

    verify = _command(commands, "verify", _verify, "check an export's files, and its graphs against PyTorch")
    verify.add_argument("--texts", type=_count, default=16, help="random batches are made of so many texts")
    _running(verify)

    _planning(commands)
    _shrinking(commands)
    return parser


def _converting(commands: Any) -> None:
    text = "a dense model as a mixture of experts, in one process"
    command: argparse.ArgumentParser = commands.add_parser(
        "convert", help=text, description=f"{text[0].upper()}{text[1:]}. A stopped conversion goes on where it was."
    )
    command.set_defaults(command=_convert)
    command.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a hub name, or package:NAME")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    add = command.add_argument
    add("--experts", type=_count, default=8, metavar="E", help="experts that each FFN is cut into (8)")
    add("--active", type=_count, default=2, metavar="K", help="experts that a token runs (2)")
    add("--shared", type=_number, default=0, metavar="N", help="neurons of each FFN that every token runs (0)")
    add(
        "--container",
        default="auto",
        metavar="NAME",
        help="the native architecture of a language model: auto (what can hold it), none, or a name such as mixtral",
    )
    add(
        "--gate",
        default="auto",
        choices=("auto", "unit", "softmax", "softmax_topk", "sigmoid"),
        help="how the chosen are weighed (auto: as the container does, else unit)",
    )
    add(
        "--partition",
        default="coactivation",
        choices=("coactivation", "weights", "random", "contiguous"),
        help="how neurons are divided (coactivation)",
    )
    add(
        "--head",
        choices=("embedding", "causal", "classification", "seq2seq", "features"),
        help="what the model gives (default: what its config says)",
    )
    add(
        "--corpus",
        default="auto",
        metavar="WHAT",
        help="docstrings, a .txt, .jsonl, .csv or .tsv file, datasets:NAME, "
        "a folder of images, or generated: what a language model writes itself (auto: that, and docstrings for others)",
    )
    add("--text-column", default="text", metavar="NAME", help="of such a file, the column with the text (text)")
    add("--texts", type=_count, metavar="N", help="at most so many texts or images (generated: 4000, others: 40000)")
    add("--max-length", type=_count, metavar="L", help="tokens a text is cut to (128; language models: 256)")
    add("--distill-minutes", type=float, default=10.0, metavar="T", help="time to train the experts (10; 0: none)")
    add("--distill-steps", type=_number, metavar="N", help="steps instead of minutes: the same on every machine")
    add("--learning-rate", type=float, metavar="R", help="the highest (1e-3, language models 3e-3; less for wide ones)")
    add("--batch-tokens", type=_count, metavar="N", help="tokens a step sees (4096; fewer for small language models)")
    add("--train", default="experts", choices=("experts", "all"), help="experts and routers, or every weight (experts)")
    add(
        "--calibration-tokens",
        type=_count,
        default=16384,
        metavar="N",
        help="tokens whose activations are looked at (16384)",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the native container (auto: the model's)",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    add("--revision", metavar="NAME", help="of a hub name: a tag or a commit")
    add("--seed", type=_number, default=0, metavar="S", help="of every random choice (0)")
    add("--no-onnx", action="store_true", help="no ONNX graphs: only checkpoint and container")


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.add_argument("path", type=Path, metavar="PATH", help="the export, for example exports/minilm")
    command.set_defaults(command=run)
    return command


def _shrinking(commands: Any) -> None:
    command = _command(commands, "shrink", _shrink, "fewer experts, for one task: those that its texts use")
    command.add_argument("texts", metavar="TEXTS", help="texts of the task: a .txt, .jsonl, .csv or .tsv file")
    add = command.add_argument
    add("--keep", type=_count, required=True, metavar="N", help="experts that each layer keeps")
    add(
        "--method",
        required=True,
        choices=("drop", "regroup", "merge"),
        help="the others go, or give their neurons to those kept, which get wider, or are averaged into them",
    )
    add("--out", type=Path, required=True, metavar="PATH", help="the export to make; PATH stays as it is")
    add("--text-column", default="text", metavar="NAME", help="of a table, the column with the text (text)")
    add("--calibration-tokens", type=_count, default=16384, metavar="N", help="tokens that are looked at (16384)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    add("--no-onnx", action="store_true", help="no ONNX graphs: only the checkpoint")


def _planning(commands: Any) -> None:
    command = _command(commands, "plan", _plan, "time every plan on this machine, and choose those to use")
    add = command.add_argument
    add(
        "--workload",
        metavar="W",
        help="batch x sequence in tokens with weights, such as 1x16:0.5,32x128:0.5, or a .txt, .jsonl or .csv file of "
        "requests (default: the workload it was planned for before)",
    )
    add("--threads", type=_counts, metavar="N,...", help="numbers of threads to plan for (default: one a core)")
    add("--minutes", type=float, default=5.0, metavar="M", help="time to measure, about, and at most where it can (5)")
    add("--plans", metavar="NAME,...", help="plans to time (default: all)")
    add("--max-plans", type=_count, metavar="N", help="plans to use, at most; 1: the same for every batch")
    add("--texts", type=Path, metavar="FILE", help="texts to time on (default: the requests, or docstrings of numpy)")
    add("--text-column", default="text", metavar="NAME", help="of a table, the column with the text (text)")
    add("--decode-tokens", type=_count, metavar="N", help="tokens that a language model writes after a prompt (16)")
    add("--min-retention", type=float, metavar="R", help="of the teacher's quality, what a plan must keep (0.97)")
    add("--provider", action="append", metavar="NAME", help="ONNX Runtime execution provider (default: the CPU)")


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


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _say_error(error: Exception) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print("[red]error:[/red]", str(error), markup=True)


def _providers(options: argparse.Namespace) -> tuple[str, ...]:
    from ffn2moe.runtime.export import CPU

    return tuple(options.provider or CPU)


def _quiet_library() -> None:
    """What transformers says of weights that are not needed here is not for our users."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _progress(console: Any) -> Callable[[Any, int, str], Any]:
    """Wraps items that take long, (items, how many, what is done) -> items, in a bar on a terminal."""
    from collections.abc import Iterable

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    def track(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            yield from progress.track(items, total=total, description=what)

    return track


# --- convert --------------------------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with console.status("opening the tools"):
        from ffn2moe.convert import convert, told
    _quiet_library()

    try:
        manifest = convert(
            options.model,
            options.out,
            num_experts=options.experts,
            num_active=options.active,
            shared_width=options.shared,
            container=options.container,
            gate=options.gate,
            partition=options.partition,
            corpus=options.corpus,
            text_column=options.text_column,
            texts=options.texts,
            max_length=options.max_length,
            head=options.head,
            revision=options.revision,
            distill_minutes=options.distill_minutes,
            distill_steps=options.distill_steps,
            learning_rate=options.learning_rate,
            batch_tokens=options.batch_tokens,
            scope=options.train,
            calibration_tokens=options.calibration_tokens,
            dtype=options.dtype,
            device=options.device,
            seed=options.seed,
            onnx=not options.no_onnx,
            say=lambda line: console.print(line, markup=False),
            track=_progress(console),
        )
    except KeyboardInterrupt:
        console.print(f"stopped: the same command goes on with {options.out}.partial", markup=False)
        return 130
    _summary(console, options.out, manifest, told)
    return 0


def _summary(console: Any, out: Path, manifest: dict[str, Any], told: Callable[[dict[str, float]], str]) -> None:
    from rich.table import Table

    from ffn2moe.spec import MoESpec

    spec, quality = MoESpec.from_dict(manifest["spec"]), manifest["convert"]["quality"]
    shown = Table(box=None, pad_edge=False, show_header=False)
    shared = " and a shared one" if any(shape.shared_width for shape in spec.stacks) else ""
    share = f"{100 * spec.active_share:.0f} % of the FFNs is active"
    rows = [("experts", f"{spec.num_active} of {spec.num_experts}{shared}: {share}")]
    rows += [(name, told(found)) for name, found in quality.items()]
    rows.append(("checkpoint", f"{out / 'checkpoint'} (ffn2moe.load)"))
    if "container" in manifest:
        folder = out / manifest["container"]["folder"]
        rows.append(("container", f"{folder} (transformers, vLLM, SGLang, llama.cpp; no code of ours)"))
    if manifest["plans"]:
        rows.append(("ONNX", f"{', '.join(manifest['plans'])} in {out}"))
    for label, text in rows:
        shown.add_row(f"[bold]{label}[/bold]", text)
    console.print(shown)
    if not manifest["plans"]:
        following = f'python -c "import ffn2moe; model = ffn2moe.load({str(out / "checkpoint")!r})"'
    elif spec.head == "causal":
        following = f'ffn2moe generate {out} "Once upon a time"'
    elif spec.head == "embedding":
        following = f'ffn2moe encode {out} "a text"'
    else:
        following = f"ffn2moe verify {out}"
    console.print(f"next: {following}", markup=False)


# --- shrink ---------------------------------------------------------------------------------------------------------


def _shrink(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    with console.status("opening the tools"):
        from ffn2moe.shrink import shrink
        from ffn2moe.spec import MoESpec
    _quiet_library()
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
        say=lambda line: console.print(line, markup=False),
        track=_progress(console),
    )
    before, after = (MoESpec.from_dict(one) for one in (manifest["shrink"]["from"], manifest["spec"]))
    shown = Table(title="Layers; errors are those of the FFN on texts held out", title_justify="left")
    for column in ("layer", "kept", "load covered", "error before", "after", "changed by"):
        shown.add_column(column, justify="left" if column == "kept" else "right")
    for row in manifest["shrink"]["layers"]:
        shown.add_row(
            str(row["layer"]),
            " ".join(map(str, row["kept"])),
            f"{100 * row['covered']:.1f} %",
            *(f"{row[key]:.3f}" for key in ("error_before", "error_after", "change")),
        )
    console.print(shown)
    console.print(
        f"{before.num_experts} experts of {before.stacks[0].expert_width} neurons are now {after.num_experts} of "
        f"{after.stacks[0].expert_width}; {100 * after.active_share:.0f} % of the FFN is active "
        f"({100 * before.active_share:.0f} % before)"
    )
    console.print(f"made {options.out}; next: ffn2moe info {options.out}", markup=False)
    return 0


# --- plan -----------------------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    import math

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with console.status("opening the tools"):
        from ffn2moe.data.corpus import docstrings
        from ffn2moe.planning import autoplan
        from ffn2moe.runtime.engines import cores
        from ffn2moe.runtime.files import read_manifest, read_plan
    path: Path = options.path
    manifest, before = read_manifest(path), read_plan(path) or {}
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise ValueError(f"--minutes {options.minutes:g} is no time to measure in: give a number above 0")
    plans = None if options.plans is None else [name.strip() for name in options.plans.split(",")]
    autoplan.require_plans(path, manifest, plans)
    decode_tokens = options.decode_tokens or (before.get("workload") or {}).get("decode_tokens") or 16
    with console.status("reading texts"):
        workload, texts = _work(options, manifest, before)
        autoplan.require_readable(workload, manifest, decode_tokens)
        if not texts:
            texts = docstrings(("numpy",), standard_library=False)
    minimum = options.min_retention
    minimum = before.get("min_retention", autoplan.MIN_RETENTION) if minimum is None else minimum
    threads = options.threads or [cores()]
    keeps_quality = autoplan.quality_of(manifest, minimum)
    console.print(
        f"workload ({workload.source}): " + ", ".join(_share(shape) for shape in workload.shapes), markup=False
    )
    for plan in (plan for plan, keeps in keeps_quality.items() if not keeps and (plans is None or plan in plans)):
        console.print(
            f"{plan} is timed, but keeps less than {100 * minimum:g} % of the teacher's quality", markup=False
        )

    with _countdown(console, 60 * options.minutes, len(threads) * len(workload.shapes)) as track:
        measured = autoplan.measure(
            path,
            texts,
            workload,
            threads=threads,
            keeps_quality=keeps_quality,
            plans=plans,
            seconds=60 * options.minutes,
            decode_tokens=decode_tokens,
            providers=_providers(options),
            track=track,
        )
    with console.status("opening what was chosen, to see what memory it takes"):
        content = autoplan.planned(
            path,
            measured,
            workload,
            threads=threads,
            keeps_quality=keeps_quality,
            min_retention=minimum,
            decode_tokens=decode_tokens,
            max_plans=options.max_plans,
            texts=texts,
        )
    content |= {"bounds": before["bounds"]} if "bounds" in before else {}
    _show_plans(console, content)
    console.print(f"wrote {autoplan.write(path, content)}", markup=False)
    return 0


def _work(options: argparse.Namespace, manifest: dict[str, Any], before: dict[str, Any]) -> tuple[Any, list[str]]:
    """The workload, and the texts to time it on, if any: as the user or the plan before says."""
    from ffn2moe.data.corpus import read_corpus
    from ffn2moe.runtime import workload as work
    from ffn2moe.runtime.files import load_tokenizer

    wanted: str | None = options.workload
    texts = read_corpus(str(options.texts), options.text_column) if options.texts else []
    if wanted is not None and (Path(wanted).suffix in work.FILES or Path(wanted).is_file()):
        batches = work.read_requests(wanted, options.text_column)
        cut = int(manifest["spec"]["max_length"]) if manifest["spec"]["head"] not in ("causal", "seq2seq") else None
        tokenizer = load_tokenizer(options.path / "tokenizer", cut)
        found = work.workload_of(
            batches,
            lambda some: [max(1, len(one.ids)) for one in tokenizer.encode_batch(list(some))],
            f"{len(batches)} requests of {Path(wanted).name}",
        )
        return found, texts or [text for batch in batches for text in batch]
    if wanted is not None:
        found = work.parse_workload(wanted)
    elif "workload" in before:
        shapes = {(one["batch"], one["sequence"]): one["weight"] for one in before["workload"]["shapes"]}
        found = work.Workload.of(shapes, before["workload"]["source"])
    else:
        raise ValueError(
            f"{options.path} was not planned before: say for what, for example --workload 1x16:0.5,32x128:0.5"
        )
    return found, texts


def _share(shape: Any) -> str:
    return f"{shape} ({100 * shape.weight:.3g} % of the batches)"


@contextmanager
def _countdown(console: Any, seconds: float, shapes: int) -> Iterator[Callable[[str, range], Iterator[int]]]:
    """Wraps the rounds of each shape in a bar over all shapes, with the time that is left at most."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    end = time.monotonic() + seconds
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shapes, {task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("opening the plans", total=shapes, left="")

        def track(label: str, rounds: range) -> Iterator[int]:
            for index in rounds:
                left = max(0, round(end - time.monotonic()))
                told = f"about {left // 60}:{left % 60:02} left at most"
                progress.update(task, description=f"timing {label}, round {index + 1}", left=told)
                yield index

        def each(label: str, rounds: range) -> Iterator[int]:
            try:
                yield from track(label, rounds)
            finally:
                progress.advance(task)

        yield each


def _show_plans(console: Any, content: dict[str, Any]) -> None:
    """Every plan at every shape with its ratio to the best dense plan, a table for each number of threads."""
    from rich.table import Table

    for choice in content["by_threads"]:
        threads = choice["threads"]
        rows = {
            (plan, _column(row)): row
            for plan, timed in content["timings"].items()
            for row in timed
            if row["threads"] == threads
        }
        columns = list(dict.fromkeys(column for _, column in rows))
        picked = {_column(row): row for row in content["choices"] if row["threads"] == threads}
        title = f"Time of a batch, and speed over the best dense plan there (noise), {_threads(threads)}"
        table = Table(title=title, title_justify="left")
        table.add_column("plan")
        for column in columns:
            table.add_column(column, justify="right")
        for plan in content["timings"]:
            cells = (
                _timed(rows[plan, column], column in picked and picked[column]["plan"] == plan) for column in columns
            )
            table.add_row(f"[bold]{plan}[/bold]" if plan in choice["plans"] else plan, *cells)
        table.add_section()
        table.add_row(
            "[bold]chosen[/bold]", *(picked[column]["plan"] if column in picked else "" for column in columns)
        )
        console.print(table)
        if any(row["high"] is None for row in rows.values()):
            console.print("~: left behind after a few rounds, as it never once came near the best dense plan")
        console.print(f"{_threads(threads)}: {choice['reason']}", markup=False)
    for plan, reason in content["left_out"].items():
        console.print(f"left out: {plan}: {reason}", markup=False)
    memory = content["memory_mib"]
    told = ", ".join(f"{size:.0f} MiB with {plan}" for plan, size in memory.items())
    console.print(f"memory of a process, one plan opened after the other: {told}", markup=False)
    if "agreement" in content:
        console.print(
            f"embeddings of one text on two of the plans have a cosine of {content['agreement']:.3f}; who stores "
            "embeddings and compares them later may want the same plan for every batch: --max-plans 1",
            markup=False,
        )


def _column(row: dict[str, Any]) -> str:
    return f"{row['batch']} x {row['sequence']}" + ("" if row["phase"] == "whole" else f"\n{row['phase']}")


def _threads(count: int) -> str:
    return f"{count} {'thread' if count == 1 else 'threads'}"


def _milliseconds(time: float) -> str:
    return f"{time:.3g} ms" if time < 100 else f"{time:.0f} ms"


def _timed(row: dict[str, Any], chosen: bool) -> str:
    """Milliseconds, and below them the ratio: after ~ that of a plan that was left behind after a few rounds."""
    ratio = f"{row['speedup_vs_best_dense']:.2f}x"
    if row["high"] is None:
        ratio = f"~{ratio}"
    elif row["low"] != row["high"]:
        ratio += f" ±{(row['high'] - row['low']) / 2:.2f}"
    cell = f"{_milliseconds(row['median_ms'])}\n{ratio}"
    return f"[bold]{cell}[/bold]" if chosen else cell


# --- info -----------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ffn2moe.runtime.files import default_plan, read_manifest, read_plan
    from ffn2moe.spec import MoESpec

    path: Path = options.path
    manifest, measured = read_manifest(path), read_plan(path)
    spec, plans = MoESpec.from_dict(manifest["spec"]), manifest["plans"]
    chosen = default_plan(path, plans) if plans else "none: there are no ONNX graphs"
    console = Console(highlight=False)

    what = Table(box=None, pad_edge=False, show_header=False)
    widths = " and ".join(dict.fromkeys(str(shape.width) for shape in spec.stacks))
    neurons = " or ".join(dict.fromkeys(str(shape.expert_width) for shape in spec.stacks))
    shared = " and ".join(dict.fromkeys(str(shape.shared_width) for shape in spec.stacks if shape.shared_width))
    facts = [
        ("export", str(path)),
        ("teacher", spec.teacher),
        ("model", f"{spec.model_class}, {spec.num_layers} layers, width {widths}"),
        (
            "experts",
            f"{spec.num_experts} of {neurons} neurons a layer, {_choice(spec)}"
            + (f", and a shared one of {shared}" if shared else "")
            + f": {100 * spec.active_share:.0f} % of the FFN is active",
        ),
        *((("budgets", _budgets(spec)),) if spec.elastic else ()),
        ("gate", spec.gate),
        ("partition", spec.partition + (f", then fitted to a task: {spec.shrunk}" if spec.shrunk else "")),
        ("gives", _gives(spec, manifest.get("model", {}))),
        ("default plan", chosen + ("" if measured or not plans else " (not measured yet)")),
        *((("by shape", " and ".join(measured["plans"])),) if measured and len(measured.get("plans", ())) > 1 else ()),
    ]
    for label, text in facts:
        what.add_row(f"[bold]{label}[/bold]", text)
    console.print(what)

    labels = {"retrieval_ndcg_at_10": "nDCG@10", "perplexity": "perplexity", "top1_agreement": "same choice"}
    key = next((key for key in labels if all(key in entry for entry in plans.values())), None)
    quality = Table(title="Plans", title_justify="left")
    quality.add_column("plan")
    for column in ("size", "from PyTorch", *((labels[key], "of the teacher's") if key else ())):
        quality.add_column(column, justify="right")
    for plan, entry in plans.items():
        files = [path / name for name in (entry["file"], *entry.get("more", {}))]
        whole = all(file.is_file() for file in files)
        cells = [
            _mebibytes(sum(file.stat().st_size for file in files)) if whole else "missing",
            f"{entry['parity_max_abs']:.1e}",
        ]
        if key:
            cells += [f"{entry[key]:.4f}", f"{100 * entry['retention']:.1f} %"]
        quality.add_row(f"[bold]{plan}[/bold]" if plan == chosen else plan, *cells)
    if plans:
        console.print(quality)
    for reason in manifest.get("refused", {}).values():
        console.print(f"not made: {reason}")
    if measured:
        for phase in dict.fromkeys(row.get("phase", "whole") for row in measured["timings"][chosen]):
            timed = {"whole": "a", "prefill": "reading", "decode": "a token after", "request": "a request of"}[phase]
            title = f"Time of {timed} batch x sequence, and speed over dense"
            speed = Table(title=title, title_justify="left")
            speed.add_column("plan")
            for row in measured["timings"][chosen]:
                if row.get("phase", "whole") == phase:
                    speed.add_column(f"{row['batch']} x {row['sequence']}", justify="right")
            for plan, rows in measured["timings"].items():
                times = (
                    f"{_milliseconds(row['median_ms'])} {row['speedup_vs_dense']:.2f}x"
                    for row in rows
                    if row.get("phase", "whole") == phase
                )
                speed.add_row(f"[bold]{plan}[/bold]" if plan == chosen else plan, *times)
            console.print(speed)
        console.print(f"{measured['reason']} (on {measured['machine']['cpu']})")
    return 0


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.{0 if size >= 10 * 2**20 else 1}f} MiB"


def _choice(spec: MoESpec) -> str:
    """How many of its experts each token or text uses."""
    who = "token" if spec.routing == "token" else "text, ahead of all layers"
    if spec.selection == "prefix":
        return f"the first {spec.num_active} on average used by each {who}"
    if spec.selection == "threshold":
        most = f" and at most {spec.max_active}" if spec.max_active else ""
        return f"{spec.num_active} on average{most} chosen by each {who}"
    if spec.active_per_layer:
        return f"{', '.join(map(str, spec.active_per_layer))} in the layers in turn chosen by each {who}"
    return f"{spec.num_active} chosen by each {who}"


def _budgets(spec: MoESpec) -> str:
    """The numbers of experts that an elastic model serves, and their shares of the FFN."""
    shares = (f"{active} ({100 * spec.at(active).active_share:.0f} %)" for active in spec.budgets)
    return f"{', '.join(shares)} of the experts active, with the same weights"


def _gives(spec: MoESpec, model: dict[str, Any]) -> str:
    """What comes out of a model, in words."""
    if spec.head == "embedding":
        return f"embeddings: {spec.width} numbers, {spec.pooling} pooling, up to {spec.max_length} tokens"
    if spec.head in ("causal", "seq2seq"):
        longest = model.get("positions")
        limit = f", up to {longest} tokens" if longest else ""
        return ("text that goes on with a prompt" if spec.head == "causal" else "text that answers a source") + limit
    what = "logits of classes" if spec.head == "classification" else "hidden states"
    return f"{what} of {model.get('reads', 'text')}"


# --- encode ---------------------------------------------------------------------------------------------------------


def _encode(options: argparse.Namespace) -> int:
    import json

    from ffn2moe.runtime.export import open_export

    texts = options.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise ValueError("there is no text to encode: name texts, or pipe lines in")
    export = open_export(options.path, options.plan, options.threads, _providers(options))
    if not hasattr(export, "encode") or hasattr(export, "generate"):
        raise ValueError(f"{options.path} makes no embeddings: see `ffn2moe info {options.path}`")
    for start in range(0, len(texts), 1024):  # output comes as it is made
        part = texts[start : start + 1024]
        for text, embedding in zip(part, export.encode(part), strict=True):
            row = {"text": text, "embedding": [float(f"{value:.7g}") for value in embedding.tolist()]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


# --- generate -------------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    from ffn2moe.runtime.export import open_export

    export = open_export(options.path, options.plan, options.threads, _providers(options))
    if not hasattr(export, "generate"):
        raise ValueError(f"{options.path} generates no text: see `ffn2moe info {options.path}`")
    pieces = export.generate(
        options.prompt,
        max_new_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if export.goes_on:
        sys.stdout.write(options.prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


# --- verify ---------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ffn2moe.onnx.verify import verify

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
