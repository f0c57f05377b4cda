"""Describe workloads: which batches a model runs, and how often each.

A workload is written in a word (`1x16:0.5,32x128:0.5`), or read from a file of real requests, in a handful of shapes.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HANDFUL = 6  # the most shapes that real requests are grouped into
FILES = (".txt", ".jsonl", ".csv")
USUAL_SHAPES = ((1, 16), (1, 128), (32, 32), (32, 128))
USUAL_PROMPTS = (16, 128, 512)  # of a language model, which one person at a time talks to; decoding follows each
_EXAMPLE = "write batch x sequence with a weight each, for example 1x16:0.5,32x128:0.5"


def usual_shapes(head: str, longest: int | None, decode_tokens: int) -> tuple[tuple[int, int], ...]:
    """Return batch and sequence of the usual workload, none of more than the `longest` tokens that the model reads.

    `longest` is where its texts are cut; of a language model, whose prompts leave room for what follows, its positions.
    None is no limit.
    """
    if head == "causal":
        room = USUAL_PROMPTS[-1] if longest is None else max(1, longest - decode_tokens)
        return tuple((1, length) for length in sorted({min(prompt, room) for prompt in USUAL_PROMPTS}))
    return tuple(dict.fromkeys((batch, min(length, longest or length)) for batch, length in USUAL_SHAPES))


@dataclass(frozen=True)
class Shape:
    """Batches of so many texts, of so many tokens; the weight is their share of all batches."""

    batch: int
    sequence: int
    weight: float

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def __str__(self) -> str:
        return f"{self.batch} x {self.sequence}"


@dataclass(frozen=True)
class Workload:
    """Shapes whose weights sum to 1, and where they come from."""

    shapes: tuple[Shape, ...]
    source: str = "given"

    @classmethod
    def of(cls, weights: Mapping[tuple[int, int], float], source: str = "given") -> Workload:
        """Make a workload from (batch, sequence) -> weight on any scale. ValueError for an empty or absurd one."""
        for (batch, sequence), weight in weights.items():
            if batch < 1 or sequence < 1:
                raise ValueError(
                    f"the workload has the shape {batch}x{sequence}: a batch holds a text, and a text a token"
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {batch}x{sequence} is {weight:g}: it must be a number from 0 up")
        total = math.fsum(weights.values())
        if total <= 0:
            what = "all of its weights are 0" if weights else "it has no shapes"
            raise ValueError(f"the workload is empty, {what}: {_EXAMPLE}")
        return cls(tuple(Shape(*shape, weight / total) for shape, weight in weights.items() if weight > 0), source)

    @property
    def longest(self) -> int:
        return max(shape.sequence for shape in self.shapes)

    @property
    def fixed(self) -> set[tuple[int, int]]:
        """The shapes (batch, sequence) that plans of OpenVINO are compiled for."""
        return fixed((shape.batch, shape.sequence, shape.weight) for shape in self.shapes)

    @property
    def largest(self) -> Shape:
        """The shape with most tokens."""
        return max(self.shapes, key=lambda shape: shape.tokens)


def parse_workload(text: str) -> Workload:
    """Parse `BATCHxSEQUENCE[:WEIGHT],...`, where a missing weight is 1. ValueError for anything else."""
    weights: dict[tuple[int, int], float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        shape, _, weight = part.partition(":")
        batch, cross, sequence = shape.lower().partition("x")
        try:
            if not cross:
                raise ValueError
            key = (int(batch), int(sequence))
            weights[key] = weights.get(key, 0.0) + (float(weight) if weight else 1.0)
        except ValueError:
            raise ValueError(f"cannot read {part!r} in the workload {text!r}: {_EXAMPLE}") from None
    return Workload.of(weights, text)


# --- real requests --------------------------------------------------------------------------------------------------


def read_requests(file: str | Path, column: str = "text") -> list[list[str]]:
    """Return the batches of texts in a file of requests, in its order; texts without a word are left out.

    .txt holds a text a line, each a batch of one. .jsonl and .csv hold a row each. Its text is in `column`, which in
    .jsonl may be a list of texts that came as one batch. Rows with the same `timestamp` came together, as one batch; a
    row with a `batch_size` stands for a batch of so many texts like its own. FileNotFoundError, or ValueError with the
    line that cannot be read.
    """
    file = Path(file)
    if file.suffix not in FILES:
        raise ValueError(f"{file} must be one of {', '.join(FILES)}: texts, a line or a row each")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: name a file of requests, or give shapes like 1x16:0.5")
    try:
        rows = list(_rows(file, column))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): convert it first") from None
    together: dict[str | int, list[str]] = {}  # by time, or each row by itself
    for index, (texts, when) in enumerate(rows):
        together.setdefault(index if when is None else when, []).extend(text for text in texts if text.strip())
    batches = [texts for texts in together.values() if texts]
    if not batches:
        raise ValueError(f"{file} holds no text, so there is no workload in it")
    return batches


def _rows(file: Path, column: str) -> Iterator[tuple[list[str], str | None]]:
    """Yield the texts of each row, and its time, if it has one."""
    with file.open(encoding="utf-8", newline="" if file.suffix == ".csv" else None) as stream:
        if file.suffix == ".txt":
            for line in stream:
                yield [line.strip()], None
            return
        rows: Iterator[Any] = csv.DictReader(stream) if file.suffix == ".csv" else filter(str.strip, stream)
        for number, raw in enumerate(rows, start=2 if file.suffix == ".csv" else 1):
            try:
                row = raw if isinstance(raw, dict) else json.loads(raw)
                texts = row.get(column) if isinstance(row, dict) else None
                if isinstance(texts, str):
                    texts = [texts] * int(row.get("batch_size") or 1)
                if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                    raise ValueError(f"it has no text in {column!r}")
                when = row.get("timestamp")
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            yield texts, None if when in (None, "") else str(when)


def workload_of(
    batches: Sequence[Sequence[str]], lengths: Callable[[Sequence[str]], Sequence[int]], source: str = "requests"
) -> Workload:
    """Return the workload of batches of texts. `lengths` gives the tokens of each text after truncation.

    A batch is as long as its longest text. Batches within a factor of 2 in both are one shape, their medians. At most a
    handful of shapes stay, those with most tokens, and the others go to the nearest.
    """
    sizes = [(len(batch), max(lengths(batch))) for batch in batches]
    cells: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for batch, length in sizes:
        cells.setdefault((round(math.log2(batch)), round(math.log2(length))), []).append((batch, length))
    most = sorted(cells.values(), key=lambda members: -sum(batch * length for batch, length in members))
    shapes = [_middle(members) for members in most[:HANDFUL]]
    weights = Counter({shape: 0 for shape in shapes})
    for members in most:
        middle = _middle(members)
        weights[min(shapes, key=lambda shape: distance(middle, shape))] += len(members)
    return Workload.of(dict(sorted(weights.items())), source)


def _middle(members: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return round(median(batch for batch, _ in members)), round(median(length for _, length in members))


def fixed(shapes: Iterable[tuple[int, int, float]]) -> set[tuple[int, int]]:
    """Return the shapes (batch, sequence) that are worth a compiled model of their own: those with most tokens.

    There are at most a handful, as each costs memory.
    """
    most = sorted(shapes, key=lambda shape: (-shape[0] * shape[1] * shape[2], shape))
    return {(batch, sequence) for batch, sequence, _ in most[:HANDFUL]}


def distance(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """Return how much the costs of two shapes differ: first by their tokens, which FFNs see, then by their length."""
    return (
        abs(math.log(one[0] * one[1]) - math.log(other[0] * other[1])),
        abs(math.log(one[1]) - math.log(other[1])),
    )
