"""Scores a file of texts with a version of the registry: embeddings, probabilities of classes, or written texts.

    python -m flows.score INPUT OUTPUT [--model NAME] [--version N | --alias NAME] [--column NAME] [--skip-bad]

INPUT is .txt (a text a line), .jsonl, .csv or .tsv; OUTPUT .jsonl or .parquet (with the number of each text's line), or
.npy (a row a text). OUTPUT is there whole or not at all.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from flows.environment import settle
from flows.serve import ROOT, add_model_options, registry_of, report, stop_on_terminate
from flows.workspace import FlowError
from tasks.params import load_params
from tasks.stage import StageRun

INPUTS, OUTPUTS = (".txt", ".jsonl", ".csv", ".tsv"), (".jsonl", ".parquet", ".npy")
RESULTS = {"embedding": "embedding", "classification": "probabilities", "causal": "text", "seq2seq": "text"}
BATCH = 256  # texts at once, at most: enough of like lengths to batch well, and a step of the progress
SHOWN = 10  # bad lines that are told
console = Console(highlight=False, soft_wrap=True, markup=False)

Write = Callable[[list[int], list[Any]], None]


@dataclass(frozen=True)
class Line:
    """A text, or what is wrong with it, and the number of its line in the file, from 1."""

    number: int
    text: str
    problem: str = ""


def read_lines(path: Path, column: str) -> Iterator[Line]:
    """Every text of a file; FlowError for a file that cannot be read at all."""
    if path.suffix not in INPUTS:
        raise FlowError(f"{path} is of no kind that is read; name a file that ends in {', '.join(INPUTS)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".txt":
                yield from (_checked(number, row.rstrip("\r\n")) for number, row in enumerate(stream, 1))
            elif path.suffix == ".jsonl":
                yield from (_from_json(number, row, column) for number, row in enumerate(stream, 1))
            else:
                yield from _from_table(stream, path, column)
    except UnicodeDecodeError as error:
        raise FlowError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None


def _checked(number: int, text: Any) -> Line:
    if not isinstance(text, str):
        return Line(number, "", f"is {type(text).__name__} and no text")
    return Line(number, text, "" if text.strip() else "is empty")


def _from_json(number: int, row: str, column: str) -> Line:
    try:
        content = json.loads(row)
    except ValueError as error:
        return Line(number, "", f"is not JSON ({error})")
    if isinstance(content, dict) and column not in content:
        return Line(number, "", f"has no {column!r}; it has {', '.join(content) or 'nothing'} (--column)")
    return _checked(number, content[column] if isinstance(content, dict) else content)


def _from_table(stream: Any, path: Path, column: str) -> Iterator[Line]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
    if column not in (rows.fieldnames or ()):
        raise FlowError(f"{path} has no column {column!r}; it has {', '.join(rows.fieldnames or ())} (--column)")
    for row in rows:
        text = row[column]
        yield Line(rows.line_num, "", "is too short") if text is None else _checked(rows.line_num, text)


def score(
    model: Any, source: Path, target: Path, column: str, skip_bad: bool, track: Callable[[Iterator[int], int], Any]
) -> tuple[int, int]:
    """Writes what a loaded model gives for each text of `source`; the numbers of texts scored and left out.

    FlowError, with the first bad lines, unless `skip_bad`; nothing is written then.
    """
    served = model.unwrap_python_model()
    limits = getattr(served, "limits", {})  # versions of earlier code have none
    longest, at_once = limits.get("max_characters", sys.maxsize), min(BATCH, limits.get("max_texts", BATCH))
    key = RESULTS[served.export.manifest["spec"]["head"]]

    def lines() -> Iterator[Line]:
        for line in read_lines(source, column):
            long = len(line.text) > longest
            yield Line(line.number, "", f"has {len(line.text)} characters, over {longest}") if long else line

    good = bad = 0
    first: list[str] = []
    for line in lines():
        good += not line.problem
        bad += bool(line.problem)
        if line.problem and len(first) < SHOWN:
            first.append(f"line {line.number} {line.problem}")
    told = "\n  ".join([*first, *([f"and {bad - len(first)} more"] if bad > len(first) else [])])
    if bad and (not skip_bad or target.suffix == ".npy"):
        remedy = "correct them" if skip_bad else "correct them, or leave them out: --skip-bad"
        reason = "; rows of .npy tell no line, so that none can be left out" if skip_bad else ""
        raise FlowError(f"{source}: {bad} of {good + bad} texts cannot be scored{reason}; {remedy}:\n  {told}")
    if not good:
        raise FlowError(f"{source} holds no text to score")
    if bad:
        console.print(f"{bad} texts are left out:\n  {told}")

    usable = (line for line in lines() if not line.problem)
    with _writer(target, key, good) as write:
        for _ in track(iter(range(0, good, at_once)), -(-good // at_once)):
            batch = list(islice(usable, at_once))
            write([line.number for line in batch], model.predict([line.text for line in batch]))
    return good, bad


@contextmanager
def _writer(target: Path, key: str, count: int) -> Iterator[Write]:
    """Writes beside `target`, in the format that its name says, and puts it in place at the end."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with {".jsonl": _jsonl, ".parquet": _parquet, ".npy": _npy}[target.suffix](partial, key, count) as write:
            yield write
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _jsonl(path: Path, key: str, count: int) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as stream:

        def write(numbers: list[int], results: list[Any]) -> None:
            for number, result in zip(numbers, results, strict=True):
                stream.write(json.dumps({"line": number, key: result}, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet(path: Path, key: str, count: int) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.string() if key == "text" else pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema([("line", pyarrow.int64()), (key, kind)])
    with parquet.ParquetWriter(path, schema) as writer:
        yield lambda numbers, results: writer.write_table(
            pyarrow.table({"line": numbers, key: pyarrow.array(results, kind)}, schema=schema)
        )


@contextmanager
def _npy(path: Path, key: str, count: int) -> Iterator[Write]:
    if key == "text":
        raise FlowError(
            "this model writes texts, and .npy holds numbers; name an OUTPUT that ends in .jsonl or .parquet"
        )
    done, rows = 0, None

    def write(numbers: list[int], results: list[Any]) -> None:
        nonlocal done, rows
        if rows is None:
            shape = (count, len(results[0]))
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        rows[done : done + len(results)] = results
        done += len(results)

    yield write
    if rows is not None:
        rows.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.score", description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help=f"a file that ends in {', '.join(INPUTS)}")
    parser.add_argument("output", type=Path, help=f"a file that ends in {', '.join(OUTPUTS)}")
    add_model_options(parser)
    parser.add_argument("--column", default="text", help="of .jsonl, .csv and .tsv: where the text is; default: text")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be scored, and tell it")
    options = parser.parse_args(arguments)
    settle(ROOT)
    stop_on_terminate()
    try:
        if options.output.suffix not in OUTPUTS:
            raise FlowError(f"{options.output} is of no kind that is written; let it end in {', '.join(OUTPUTS)}")
        if not options.output.resolve().parent.is_dir():
            raise FlowError(f"the folder of {options.output} does not exist; make it first")
        if not options.input.is_file():
            raise FlowError(f"{options.input} is not a file; name one that ends in {', '.join(INPUTS)}")
        registry = registry_of(options)
        version = registry.resolve(options.version or options.alias)
        stage = StageRun("score", load_params(ROOT / "params.yaml"), ROOT)
        good, _ = score(
            registry.load(version),
            options.input,
            options.output,
            options.column,
            options.skip_bad,
            lambda items, total: stage.track(items, total, "batches"),
        )
        console.print(f"{options.output}: {good} texts by {registry.model} version {version}")
        return 0
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        return 130
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
