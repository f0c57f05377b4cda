"""Score a file of texts with a version of the registry: embeddings, labels, entities, or generated texts.

    python -m flows.score INPUT OUTPUT [--model NAME] [--version N | --alias NAME] [--column NAME]
                          [--prompt-name NAME] [--skip-bad]

INPUT is .txt (one text a line), .jsonl, .csv or .tsv, in UTF-8, or UTF-16 with a byte order mark; --column FIRST,SECOND
reads pairs of texts for a classifier. OUTPUT is .jsonl or .parquet (with the line number of each text), or .npy (one
row a text). OUTPUT is written whole or not at all.
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

from ffn2moe.data.corpus import encoding_of
from flows.environment import settle
from flows.errors import report, stop_on_terminate
from flows.serve import ROOT, add_model_options, registry_of
from flows.workspace import FlowError
from tasks.params import load_params
from tasks.stage import StageRun

INPUTS, OUTPUTS = (".txt", ".jsonl", ".csv", ".tsv"), (".jsonl", ".parquet", ".npy")
# What a version from earlier code gives, which does not say it itself: head -> key of the results.
EARLIER = {"embedding": "embedding", "classification": "probabilities", "causal": "text", "seq2seq": "text"}
BATCH = 1024  # most texts at once: with 256, padding and calls cost 2 to 6 % more (docs/decisions/0034)
WRITTEN = 16  # where the model writes, one text after the other: a step of the progress
SHOWN = 10  # bad lines that a message names
console = Console(highlight=False, soft_wrap=True, markup=False)

Write = Callable[[list[int], list[Any]], None]


@dataclass(frozen=True)
class Line:
    """Hold a text, a pair of texts, or what is wrong with it, and its line number from 1."""

    number: int
    text: str | tuple[str, ...]
    problem: str = ""


def read_lines(path: Path, column: str) -> Iterator[Line]:
    """Yield every text of a file, or every pair where `column` names two; FlowError if the file cannot be read."""
    columns = tuple(name.strip() for name in column.split(","))
    if path.suffix not in INPUTS:
        raise FlowError(f"{path} cannot be read; name a file that ends in {', '.join(INPUTS)}")
    if len(columns) > 2:
        raise FlowError(f"--column {column} names {len(columns)} columns; name one, or two for pairs of texts")
    if len(columns) == 2 and path.suffix == ".txt":
        raise FlowError(f"{path} has no columns, and --column {column} names two; give {', '.join(INPUTS[1:])}")
    try:
        with path.open("rb") as start:
            encoding = encoding_of(start.read(2))
        with path.open(encoding=encoding, newline="") as stream:
            if path.suffix == ".txt":
                yield from (_checked(number, (row.rstrip("\r\n"),)) for number, row in enumerate(stream, 1))
            elif path.suffix == ".jsonl":
                yield from (_from_json(number, row, columns) for number, row in enumerate(stream, 1))
            else:
                yield from _from_table(stream, path, columns)
    except UnicodeDecodeError as error:
        raise FlowError(
            f"{path} is not {error.encoding.upper()} text ({error.reason} at byte {error.start}); convert it first"
        ) from None


def _checked(number: int, texts: Sequence[Any]) -> Line:
    """Return a text or, of two, a pair; or what is wrong with the first that cannot be scored."""
    for place, text in enumerate(texts):
        which = "" if len(texts) == 1 else f"in text {place + 1}: "
        if not isinstance(text, str):
            return Line(number, "", f"{which}is {type(text).__name__}, not text")
        if not text.strip():
            return Line(number, "", f"{which}is empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            return Line(number, "", f"{which}has half of a surrogate pair")
    return Line(number, texts[0] if len(texts) == 1 else tuple(texts))


def _from_json(number: int, row: str, columns: Sequence[str]) -> Line:
    try:
        content = json.loads(row)
    except ValueError as error:
        return Line(number, "", f"is not JSON ({error})")
    if isinstance(content, list) and len(content) == len(columns):
        return _checked(number, content)
    if not isinstance(content, dict):
        return _checked(number, (content,)) if len(columns) == 1 else Line(number, "", "is no pair of texts")
    for column in columns:
        if column not in content:
            return Line(number, "", f"has no {column!r}; it has {', '.join(content) or 'nothing'} (--column)")
    return _checked(number, [content[column] for column in columns])


def _from_table(stream: Any, path: Path, columns: Sequence[str]) -> Iterator[Line]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
    for column in columns:
        if column not in (rows.fieldnames or ()):
            raise FlowError(f"{path} has no column {column!r}; it has {', '.join(rows.fieldnames or ())} (--column)")
    for row in rows:
        texts = [row[column] for column in columns]
        short = any(text is None for text in texts)
        yield Line(rows.line_num, "", "is too short") if short else _checked(rows.line_num, texts)


def score(
    model: Any,
    source: Path,
    target: Path,
    column: str,
    skip_bad: bool,
    track: Callable[[Iterator[int], int], Any],
    prompt_name: str = "",
) -> tuple[int, int]:
    """Write the result of a loaded model for each text of `source`; return the numbers of texts scored and left out.

    FlowError with the first bad lines, unless `skip_bad`, and for a prompt that the model lacks; then nothing is
    written.
    """
    served = model.unwrap_python_model()
    limits = getattr(served, "limits", {})  # versions from earlier code have none
    longest = limits.get("max_characters", sys.maxsize)
    head = served.export.manifest["spec"]["head"]
    key = getattr(served.export, "gives", None) or EARLIER[head]
    at_once = min(WRITTEN if key == "text" else BATCH, limits.get("max_texts", BATCH))
    if "," in column and key != "labels":
        raise FlowError(f"--column {column} names two columns, and {key} is made of single texts; name one column")

    params = {"prompt_name": prompt_name} if prompt_name else None
    if params:
        _require_prompt(served.export, prompt_name)

    def lines() -> Iterator[Line]:
        for line in read_lines(source, column):
            size = max(map(len, line.text)) if isinstance(line.text, tuple) else len(line.text)
            yield Line(line.number, "", f"has {size} characters, over {longest}") if size > longest else line

    good = bad = 0
    first: list[str] = []
    for line in lines():
        good += not line.problem
        bad += bool(line.problem)
        if line.problem and len(first) < SHOWN:
            first.append(f"line {line.number} {line.problem}")
    lines_shown = "\n  ".join([*first, *([f"and {bad - len(first)} more"] if bad > len(first) else [])])
    if bad and (not skip_bad or target.suffix == ".npy"):
        remedy = "correct them" if skip_bad else "correct them, or leave them out with --skip-bad"
        reason = "; rows of .npy have no line numbers, so no text can be left out" if skip_bad else ""
        raise FlowError(f"{source}: {bad} of {good + bad} texts cannot be scored{reason}; {remedy}:\n  {lines_shown}")
    if not good:
        raise FlowError(f"{source} has no text to score")
    if bad:
        console.print(f"leaving out {bad} texts:\n  {lines_shown}")

    usable = (line for line in lines() if not line.problem)
    with _writer(target, key, good, getattr(served.export, "labels", ())) as write:
        for _ in track(iter(range(0, good, at_once)), -(-good // at_once)):
            batch = list(islice(usable, at_once))
            write([line.number for line in batch], model.predict([line.text for line in batch], params=params))
    return good, bad


def _require_prompt(export: Any, name: str) -> None:
    sentence = getattr(export, "sentence", None)
    if sentence is None:
        raise FlowError(f"--prompt-name {name}, but this version has no prompts: leave it out")
    try:
        sentence.prompt(prompt_name=name)
    except ValueError as error:
        raise FlowError(f"--prompt-name {name}: {error}") from None


@contextmanager
def _writer(target: Path, key: str, count: int, labels: Sequence[str]) -> Iterator[Write]:
    """Write a temporary file in the format of the name of `target`, and rename it at the end.

    `labels` are those of a classifier, in the order of its config, which is that of the columns of .npy.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        write_as = {".jsonl": _jsonl, ".parquet": _parquet, ".npy": _npy}[target.suffix]
        with write_as(partial, key, count, labels) as write:
            yield write
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _jsonl(path: Path, key: str, count: int, labels: Sequence[str]) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as stream:

        def write(numbers: list[int], results: list[Any]) -> None:
            for number, result in zip(numbers, results, strict=True):
                stream.write(json.dumps({"line": number, key: result}, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet(path: Path, key: str, count: int, labels: Sequence[str]) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    numbers_of = pyarrow.list_(pyarrow.float32())
    label = {"label": pyarrow.string(), "score": pyarrow.float64()}
    entity = {"entity_group": pyarrow.string(), "score": pyarrow.float64(), "word": pyarrow.string()}
    place = {"start": pyarrow.int64(), "end": pyarrow.int64()}
    kind = {
        "text": pyarrow.string(),
        "embedding": numbers_of,
        "probabilities": numbers_of,
        "labels": pyarrow.list_(pyarrow.struct(label)),
        "entities": pyarrow.list_(pyarrow.struct(entity | place)),
    }[key]
    schema = pyarrow.schema([("line", pyarrow.int64()), (key, kind)])
    with parquet.ParquetWriter(path, schema) as writer:
        yield lambda numbers, results: writer.write_table(
            pyarrow.table({"line": numbers, key: pyarrow.array(results, kind)}, schema=schema)
        )


@contextmanager
def _npy(path: Path, key: str, count: int, labels: Sequence[str]) -> Iterator[Write]:
    if key in ("text", "entities"):
        raise FlowError(
            f"this model gives {key}, and .npy holds numbers; name an OUTPUT that ends in .jsonl or .parquet"
        )
    done, rows = 0, None

    def write(numbers: list[int], results: list[Any]) -> None:
        nonlocal done, rows
        if key == "labels":
            by_label = ({one["label"]: one["score"] for one in result} for result in results)
            results = [[scores[label] for label in labels] for scores in by_label]
        if rows is None:
            shape = (count, len(results[0]))
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        rows[done : done + len(results)] = results
        done += len(results)

    yield write
    if rows is not None:
        rows.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.score", description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help=f"a file that ends in {', '.join(INPUTS)}")
    parser.add_argument("output", type=Path, help=f"a file that ends in {', '.join(OUTPUTS)}")
    add_model_options(parser)
    parser.add_argument(
        "--column",
        default="text",
        metavar="NAME",
        help="field of the text in .jsonl, .csv and .tsv, or FIRST,SECOND for pairs of texts; default: text",
    )
    parser.add_argument(
        "--prompt-name", default="", metavar="NAME", help="the model's prompt to write before each text"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out texts that cannot be scored, and print them")
    options = parser.parse_args(arguments)
    settle(ROOT)
    stop_on_terminate()
    try:
        if options.output.suffix not in OUTPUTS:
            raise FlowError(f"{options.output} cannot be written; name a file that ends in {', '.join(OUTPUTS)}")
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
            options.prompt_name,
        )
        console.print(f"{options.output}: {good} texts by {registry.model} version {version}")
        return 0
    except KeyboardInterrupt:
        console.print("Stopped. Nothing was written.")
        return 130
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
