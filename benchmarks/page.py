"""Share what all benchmarks need beyond timing: options, progress, tables, and the page with its raw figures."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.race import Spread, Track
from ffn2moe.planning.timing import machine
from ffn2moe.progress import Screen

GIB = 2**30


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m MODULE` with the option --out; the first line of `description` is its help."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(description or "").splitlines()[0])
    page = f"docs/results/{module.rpartition('.')[2]}.md"
    parser.add_argument("--out", type=Path, help=f"also write a page and its raw figures, for example {page}")
    return parser


def shape_of(text: str) -> tuple[int, int]:
    """Read BATCHxSEQUENCE, for example 32x128; argparse reports everything else."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxSEQUENCE from 1x1, for example 32x128")
    batch, sequence = map(int, text.split("x"))
    return batch, sequence


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Add the option --texts."""
    texts = Path("data/corpus/evaluation.jsonl")
    parser.add_argument("--texts", type=Path, default=texts, help="JSON lines with a text each, or plain lines")


def read_texts(path: Path) -> list[str]:
    """Read the texts of a file of lines, or of JSON lines with a `text` each."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a file of texts with --texts")
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} has no text to time the plans on")
    return texts


def chosen(known: Iterable[str], wanted: Sequence[str] | None, always: str = "dense") -> list[str]:
    """Return the wanted plans of an export and one plan more; all if none is named. ValueError for an unknown plan."""
    known = list(known)
    missing = [plan for plan in wanted or () if plan not in known]
    if missing:
        raise ValueError(f"the export has no plan {missing[0]!r}; it has: {', '.join(sorted(known))}")
    return [plan for plan in known if wanted is None or plan in wanted or plan == always]


def command_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the command line that sets these options: positional arguments first, then --out last."""
    words = [parser.prog]
    actions = [one for one in parser._actions if one.dest != "help" and one.help != argparse.SUPPRESS]
    for action in sorted(actions, key=lambda one: (bool(one.option_strings), one.dest == "out")):
        value = getattr(options, action.dest)
        if value is None or value is False or value == []:
            continue
        words += action.option_strings[:1]
        if value is not True:
            words += [shlex.quote(_word(one)) for one in (value if isinstance(value, list) else [value])]
    return " ".join(words)


def _word(value: object) -> str:
    if isinstance(value, tuple):  # a shape; True stands for a gated FFN
        return "x".join(str(one) for one in value if not isinstance(one, bool)) + "g" * (True in value[2:])
    return f"{value:g}" if isinstance(value, float) else str(value)


def console_of() -> Console:
    """Return a console that never reads text as markup."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def complain(error: Exception) -> int:
    """Print one line on stderr; return the exit code of bad input."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
    return 2


@contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Show what runs: a bar on a terminal, else a line now and after each silence."""
    with Screen(console) as screen, screen.step(text):
        if not console.is_terminal:
            screen.say(text)
        yield


@contextmanager
def rounds_of(console: Console) -> Iterator[Track]:
    """Show the progress of races: a bar for each on a terminal, else a line now and after each silence."""
    with Screen(console) as screen:

        def track(label: str, rounds: range) -> Iterator[int]:
            if not console.is_terminal:
                screen.say(label)
            return screen.track(rounds, len(rounds), label)

        yield track


@dataclass(frozen=True)
class Grid:
    """Hold a table: rows of cells below a header. Cells that begin with ** are bold."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def table(self) -> Table:
        """Return the table for a terminal; no cell is read as markup."""
        shown = Table(title=Text(self.title), title_justify="left")
        for place, column in enumerate(self.header):
            shown.add_column(Text(column), justify="right" if place and self._is_numeric(place) else "left")
        for row in self.rows:
            shown.add_row(*(Text(text.strip("*"), style="bold" if text.startswith("**") else "") for text in row))
        return shown

    def _is_numeric(self, place: int) -> bool:
        return any(row[place].strip("*")[:1].isdigit() for row in self.rows)

    def markdown(self) -> list[str]:
        """Return the lines of the table in Markdown."""
        lines = [f"| {' | '.join(self.header)} |", "|" + "---|" * len(self.header)]
        return lines + [f"| {' | '.join(row)} |" for row in self.rows]


@dataclass(frozen=True)
class Page:
    """Hold what a benchmark shows: tables, the words around them, and the raw figures. A `failure` sets exit code 1."""

    title: str
    paragraphs: Sequence[str]
    grids: Sequence[Grid]
    notes: str = ""
    result: Mapping[str, Any] | None = None
    figure: Callable[[], Any] | None = None
    failure: str = ""

    def markdown(self, command: str, image: str = "") -> str:
        """Return question, command, tables and notes. A single table has no heading of its own."""
        wrapped = (textwrap.fill(one, 120, break_long_words=False, break_on_hyphens=False) for one in self.paragraphs)
        lines = [f"# {self.title}", "", *(line for text in wrapped for line in (text, ""))]
        if image:
            lines += [f"![{self.title}]({image})", ""]
        lines += ["```", command, "```", ""]
        for grid in self.grids:
            lines += [*([f"## {grid.title}", ""] if len(self.grids) > 1 else []), *grid.markdown(), ""]
        return "\n".join([*lines, *([self.notes, ""] if self.notes else [])])

    def write(self, out: Path, command: str) -> list[str]:
        """Write the page, and beside it the raw figures as JSON and the plot as PNG; return the names of the files."""
        image = out.with_suffix(".png")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(self.markdown(command, image.name if self.figure else ""), encoding="utf-8")
        written = [str(out)]
        if self.result is not None:
            result = {"command": command, **self.result, "load_average": round(os.getloadavg()[0], 1)}
            out.with_suffix(".json").write_text(dumps(result), encoding="utf-8")
            written.append(out.with_suffix(".json").name)
        if self.figure is not None:
            self.figure().savefig(image, dpi=110)
            written.append(image.name)
        return written


def report(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Console], Page],
    arguments: Sequence[str] | None,
) -> int:
    """Measure, print the tables and write the page; return the exit code: 1 for a failure, 2 for bad input."""
    options = parser.parse_args(arguments)
    console = console_of()
    try:
        page = measure(options, console)
    except (ValueError, OSError, RuntimeError) as error:
        return complain(error)
    for grid in page.grids:
        console.print(grid.table())
    console.print("\n".join(filter(None, (page.notes, page.failure, about()))))
    if options.out:
        console.print(f"written: {', '.join(page.write(options.out, command_of(parser, options)))}")
    return 1 if page.failure else 0


def in_process(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fresh process, whose libraries use this many threads; return its result."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with patch.dict(os.environ, limits), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def about(here: Mapping[str, Any] | None = None) -> str:
    """Return the machine and the engines in words."""
    here = machine() | {"torch": metadata.version("torch")} if here is None else here
    engines = [f"{engine} {here[engine]}" for engine in ("onnxruntime", "openvino", "torch") if engine in here]
    return ", ".join([here["cpu"], some(here["cores"], "core"), here["system"], f"Python {here['python']}", *engines])


def some(count: int, noun: str) -> str:
    """Return `1 thread`, `2 threads`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def load_average() -> str:
    """Say how busy the machine is."""
    return f"Load average {os.getloadavg()[0]:.1f}; above the number of threads, other work slowed the clock."


def verdict(speed: Spread, target: float) -> str:
    """Say whether the median meets a target, and whether the quartiles agree."""
    met = "met" if speed.median >= target else "not met"
    agreed = (speed.low >= target) == (speed.high >= target)
    return f"{target:g}x {met}{'' if agreed else ', by less than the noise'}"


def dumps(result: Mapping[str, Any]) -> str:
    """Return JSON with one line for each key, and one line for each row of a list of rows."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
