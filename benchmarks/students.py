"""Judge several students of one language model by the same text and questions, each paired with the others.

    python -m benchmarks.students ./my-llama half half-pruned --text held-out.txt --hellaswag hellaswag.jsonl

The students are folders that `ffn2moe convert` wrote, or their checkpoints. The page says how the perplexity of each
relates to the teacher's, which share of the tasks it keeps, and for every mixture whether it is ahead of the students
without experts beyond two standard errors. A student is judged once: its answers stay in --work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.page import Grid, Page, about, load_average, parser_of, report
from ffn2moe import metrics
from ffn2moe.judge import Subject
from ffn2moe.judges.answers import Compared, kept, kept_interval, right
from ffn2moe.judges.asked import ask
from ffn2moe.judges.items import TASKS, Item, spread
from ffn2moe.judges.likelihood import log_likelihoods
from ffn2moe.judges.reading import blocks, read
from ffn2moe.moe import checkpoint
from ffn2moe.progress import Screen

TEACHER = "teacher"
CERTAIN = 2.0  # standard errors beyond which one student is ahead of another


@dataclass(frozen=True)
class Judged:
    """One model on the blocks of the text and the questions of each task."""

    nats_N: Tensor  # sums over the positions of each block, float64
    positions_N: Tensor
    right: Mapping[str, Tensor]  # by task: the share of each question that is right, float64

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(self.nats_N, self.positions_N)


@dataclass(frozen=True)
class Ratio:
    """A ratio of perplexities on the same blocks, and the standard error of its logarithm."""

    value: float
    error: float

    @classmethod
    def of(cls, one: Judged, other: Judged) -> Ratio:
        """Compare two models, block by block."""
        apart_N = (one.nats_N - other.nats_N) / one.positions_N
        error = apart_N.std() / len(apart_N) ** 0.5 if len(apart_N) > 1 else torch.tensor(0.0)
        return cls(one.perplexity / other.perplexity, error.item())

    @property
    def verdict(self) -> str:
        """Say which model is ahead, or that it is not known."""
        distance, noise = math.log(self.value), CERTAIN * self.error
        return "ahead" if distance < -noise else "behind" if distance > noise else "equal within two errors"

    def __str__(self) -> str:
        return f"{self.value:.3f}x ± {self.value * self.error:.3f}"


class Judge:
    """The text and the questions that every model gets, and what is known of their answers."""

    def __init__(self, options: argparse.Namespace, screen: Screen) -> None:
        if not options.text.is_file():
            raise FileNotFoundError(f"there is no file {options.text}: name a text in UTF-8 with --text")
        self.text = options.text.read_text(encoding="utf-8")
        self.files = {name: file for name in TASKS if (file := getattr(options, name)) is not None}
        self.items = {name: spread(TASKS[name].read(file), options.most) for name, file in self.files.items()}
        self.options, self.screen = options, screen

    def of(self, source: str, name: str, *, questions: bool) -> Judged:
        """Return what is kept of a model, or judge it."""
        subject = Subject.of(source, self.screen.say)
        file = self.options.work / f"{self._key(subject.folder, questions)}.json"
        if file.is_file():
            known = json.loads(file.read_text())
        else:
            known = self._judge(subject, name, questions)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(known))
            os.replace(partial, file)
        found = {task: torch.tensor(values, dtype=torch.float64) for task, values in known["right"].items()}
        nats_N, positions_N = (torch.tensor(known[key], dtype=torch.float64) for key in ("nats", "positions"))
        return Judged(nats_N, positions_N, found)

    def _judge(self, subject: Subject, name: str, questions: bool) -> dict[str, Any]:
        model, tokenizer = subject.open()
        model.eval()
        length = min(self.options.block, subject.positions or self.options.block)
        reading = read({name: model}, blocks(tokenizer, self.text, length), track=self.screen.track, what=name)[name]
        found = {}
        for task, items in self.items.items() if questions else ():
            sheet = ask(items, tokenizer, subject.positions)
            label = f"{name}: {TASKS[task].title}"
            nats_A = log_likelihoods(model, sheet.asked, track=self.screen.track, what=label)
            found[task] = right(items, nats_A, TASKS[task].figures[0]).tolist()
        return {"nats": reading.nats_N.tolist(), "positions": reading.positions_N.tolist(), "right": found}

    def _key(self, folder: Path, questions: bool) -> str:
        """Return what changes with the weights and with what they are judged by."""
        weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")]
        files = self.files if questions else {}
        asked = [(name, str(file.resolve()), len(self.items[name])) for name, file in files.items()]
        told = [str(folder.resolve()), sorted(weights), asked, sha256(self.text.encode()).hexdigest()]
        return sha256(json.dumps([told, self.options.block]).encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.students", __doc__)
    parser.add_argument("teacher", help="the dense model, as `ffn2moe convert` takes it")
    parser.add_argument("students", nargs="+", help="folders that `ffn2moe convert` wrote, or checkpoints")
    parser.add_argument("--untrained", nargs="+", default=[], help="students that read the text alone")
    parser.add_argument("--text", type=Path, required=True, help="a text that nothing was fitted to")
    for name, task in TASKS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"questions of {task.title}")
    parser.add_argument("--most", type=int, default=400, help="questions of each file at most, evenly spread (400)")
    parser.add_argument("--block", type=int, default=1024, help="tokens of the text that are read together (1024)")
    parser.add_argument("--work", type=Path, default=Path(".cache/students"), help="where answers stay")
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Judge every model that --work does not know; return the page."""
    specs = {source: checkpoint.load_spec(_checkpoint(source)) for source in [*options.students, *options.untrained]}
    with Screen(console) as screen:
        judge = Judge(options, screen)
        teacher = judge.of(options.teacher, TEACHER, questions=True)
        judged = {
            source: judge.of(str(_checkpoint(source)), Path(source).name, questions=source in options.students)
            for source in specs
        }
    rows = [_row(Path(source).name, spec, judged[source], teacher, judge.items) for source, spec in specs.items()]
    mixtures = [source for source in options.students if not specs[source].is_dense]
    others = [source for source in options.students if specs[source].is_dense]
    pairs = [
        [Path(one).name, Path(other).name, *_pair(judged[one], judged[other])] for one in mixtures for other in others
    ]
    header = ["student", "FFN active", "experts", "perplexity", "of the teacher's", *_titles(judge.items), "tasks kept"]
    grids = [Grid("Quality", header, [_teacher_row(teacher, judge.items), *rows])]
    if pairs:
        columns = ["mixture", "student without experts", "perplexity over its", "", "more questions right"]
        grids.append(Grid("Mixtures against students without experts", columns, pairs))
    told = {"load": load_average(), "teacher_perplexity": teacher.perplexity, "rows": rows, "pairs": pairs}
    asked = ", ".join(f"{len(items)} questions of {TASKS[name].title}" for name, items in judge.items.items())
    return Page(
        "Students of a language model: what each keeps",
        [
            f"{about()}. Judged in float32 on {options.text.name} in blocks of {options.block} tokens"
            f"{', and by ' + asked if asked else ''}. ± is one standard error over the blocks or questions, paired "
            "with the model that a row compares with; brackets hold 95 % intervals. Tasks kept is the mean over the "
            "tasks of the accuracy above chance, over the teacher's.",
        ],
        grids,
        result=told,
    )


def _checkpoint(source: str) -> Path:
    """Return the folder of a student's weights. FileNotFoundError where there is none."""
    for folder in (Path(source) / "checkpoint", Path(source)):
        if (folder / checkpoint.SPEC_FILE).is_file():
            return folder
    raise FileNotFoundError(f"{source} holds no student: name a folder that `ffn2moe convert` wrote, or its checkpoint")


def _titles(items: Mapping[str, Sequence[Item]]) -> list[str]:
    return [f"{TASKS[name].title}, %" for name in items]


def _teacher_row(teacher: Judged, items: Mapping[str, Sequence[Item]]) -> list[str]:
    accuracies = [f"{100 * teacher.right[name].mean():.1f}" for name in items]
    return [TEACHER, "100 %", "", f"{teacher.perplexity:.2f}", "", *accuracies, ""]


def _row(name: str, spec: Any, judged: Judged, teacher: Judged, items: Mapping[str, Sequence[Item]]) -> list[str]:
    experts = "none" if spec.is_dense else f"{spec.num_active} of {spec.num_experts}"
    ratio = Ratio.of(judged, teacher)
    cells = [name, f"{100 * spec.active_share:.0f} %", experts, f"{judged.perplexity:.2f}", str(ratio)]
    if not judged.right:
        return [*cells, *("" for _ in items), ""]
    compared = [Compared.of(items[task], judged.right[task], teacher.right[task]) for task in items]
    known = [one for one in compared if one.known]
    cells += [f"{100 * judged.right[task].mean():.1f}" for task in items]
    if not known:
        return [*cells, ""]
    interval = kept_interval(known)
    return [*cells, f"{100 * kept(known):.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"]


def _pair(mixture: Judged, other: Judged) -> list[str]:
    """Return the ratio of perplexities, what it says, and the difference of the accuracies over all questions."""
    ratio = Ratio.of(mixture, other)
    if not mixture.right:
        return [str(ratio), ratio.verdict, ""]
    apart_N = torch.cat([mixture.right[task] - other.right[task] for task in mixture.right])
    error = (apart_N.std() / len(apart_N) ** 0.5).item()
    return [str(ratio), ratio.verdict, f"{100 * apart_N.mean():+.1f} % ± {100 * error:.1f}"]


if __name__ == "__main__":
    sys.exit(main())
