"""Compare FactorLLM's recipe with ours on one small language model: same text, same steps, one table.

    python -m benchmarks.causal ../shared/data/stories260k --out docs/results/stories260k.md

All training uses text drawn from the model itself. The judge is a text file from elsewhere (MODEL/sample.txt, or
--sample). Finished cells stay in --work, so that a stopped run resumes and two processes with different --cells share
the work.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as progress
from torch.nn import functional as F

from benchmarks.ablation.methods import factorllm
from benchmarks.page import Grid, Page, about, parser_of, report, some
from ffn2moe import metrics
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.data.batches import Batch, Batches, pack
from ffn2moe.data.generate import sample_tokens
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer, outputs
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.route import RouterSettings, fit_router
from ffn2moe.dense.families import positions
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.objectives import Loss, Objective, Outputs, objective_for
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec

LONGEST_TEXT = 512  # tokens drawn from a model without a longest text
PROMPT = "Once upon a time"
SHARED = ("model", "experts", "steps", "batch_tokens", "learning_rate", "length", "container", "seed")  # as in Bench


@dataclass(frozen=True)
class Cell:
    """Hold one row of the table."""

    method: str
    active: int
    steps: int
    perplexity: float
    ratio: float  # to the dense model's perplexity
    divergence: float  # KL(dense || this), nats a token
    top1: float  # share of tokens with the dense model's most probable next token
    seconds: float  # of training, without the text that it is trained on
    continuation: str


class TextObjective:
    """The language model's own loss: cross entropy on the next token of the text. It needs no teacher."""

    terms = ("text",)

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        """Return the logits."""
        return Outputs((), model(**batch.inputs).logits)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        """Return the cross entropy."""
        ids_BL = batch.inputs["input_ids"]
        text = F.cross_entropy(student.head[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())
        return Loss(text, {"text": text})


@dataclass(frozen=True)
class Bench:
    """The settings that all cells share."""

    model: str
    sample: Path
    experts: int
    texts: list[list[int]]
    steps: int
    batch_tokens: int
    learning_rate: float
    length: int
    container: str | None  # container of our rows
    seed: int

    def opened(self) -> tuple[Any, Any]:
        return load_dense(self.model)

    def spec(self, model: Any, active: int, partition: str, container: str | None = None) -> MoESpec:
        held = CONTAINERS[container] if container else None
        return spec_of(
            model,
            head="causal",
            num_experts=self.experts,
            num_active=active,
            partition=partition,
            teacher=Path(self.model).name,
            max_length=self.length,
            gate=held.gate if held else "unit",
            router_bias=held is None,
            container=container,
            width_multiple=held.width_multiple if held else 1,
        )

    def ours(self, active: int, console: Console, *, steps: int) -> tuple[Any, float]:
        """Decompose by coactivation, fit the router to the oracle, then distil logits and hidden states."""
        teacher, _ = self.opened()
        student, _ = self.opened()
        begun = time.monotonic()
        spec = self.spec(student, active, "coactivation", self.container)
        calibration = Batches(self.texts, batch_tokens=4096, seed=self.seed + 1).from_step(0)
        layers: list[MoEFFN] = []
        for index, x_TD in enumerate(layer_inputs(student, calibration, max_tokens=32768)):
            ffn = read_ffn(student, index)
            layers.append(decompose_layer(ffn, x_TD, spec, index, seed=self.seed))
            fit_router(layers[-1], x_TD, RouterSettings(steps=200, batch_tokens=4096, seed=index))
            refit_outputs(layers[-1], x_TD, outputs(ffn, x_TD), penalty=1e-2)
        install_moe(student, layers)
        if steps:
            self.train(teacher, student, objective_for("causal"), f"ours, {active} of {self.experts}", console)
        return student.eval(), time.monotonic() - begun

    def train(self, teacher: Any, student: Any, objective: Objective, what: str, console: Console) -> None:
        """Spend the steps on all weights of a student, and show the progress."""
        batches = Batches(self.texts, batch_tokens=self.batch_tokens, seed=self.seed)
        settings = Training(steps=self.steps, learning_rate=self.learning_rate, scope="all")
        run = Distiller(teacher, student, batches, objective, settings)
        for _ in progress(run.run(), total=run.steps, description=what, console=console):
            pass

    def factorllm(self, active: int, console: Console, *, train_router: bool) -> tuple[Any, float]:
        """Make contiguous experts with scale E/K and a random router; train by cross entropy on the same text."""
        teacher, _ = self.opened()
        student, _ = self.opened()
        begun = time.monotonic()
        spec = self.spec(student, active, "contiguous")
        torch.manual_seed(self.seed)
        nothing_TD = torch.empty(0, spec.width)
        layers = []
        for index in range(spec.num_layers):
            layers.append(decompose_layer(read_ffn(student, index), nothing_TD, spec, index, seed=self.seed))
            factorllm.set_router(layers[-1])
        install_moe(student, layers)
        objective = factorllm.FactorLLMObjective(TextObjective(), teacher, student, train_router=train_router)
        self.train(teacher, student, objective, f"FactorLLM, {active} of {self.experts}", console)
        return student.eval(), time.monotonic() - begun

    def judged(self, model: Any, method: str, active: int, steps: int, seconds: float) -> Cell:
        teacher, tokenizer = self.opened()
        stories = re.split(r"<\|endoftext\|>|\n\n\n+", self.sample.read_text(encoding="utf-8"))
        limit = teacher.config.max_position_embeddings
        texts = [torch.tensor([tokenizer(story.strip())["input_ids"][:limit]]) for story in stories if story.strip()]
        nats, dense_nats, apart, same = [], [], [], []
        with torch.no_grad():
            for ids_1L in texts:
                logits_LV, dense_LV = model(input_ids=ids_1L).logits[0, :-1], teacher(input_ids=ids_1L).logits[0, :-1]
                nats.append(metrics.nats(logits_LV, ids_1L[0, 1:]))
                dense_nats.append(metrics.nats(dense_LV, ids_1L[0, 1:]))
                apart.append(metrics.divergence(dense_LV, logits_LV))
                same.append((logits_LV.argmax(-1) == dense_LV.argmax(-1)).float())
            prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
            text = tokenizer.decode(model.generate(prompt, max_new_tokens=80, do_sample=False)[0])
        mean = torch.cat(nats).double().mean().item()
        dense = torch.cat(dense_nats).double().mean().item()
        return Cell(
            method=method,
            active=active,
            steps=steps,
            perplexity=math.exp(mean),
            ratio=math.exp(mean - dense),
            divergence=torch.cat(apart).mean().item(),
            top1=torch.cat(same).mean().item(),
            seconds=seconds,
            continuation=" ".join(text.replace("<s>", " ").split()),
        )


# name -> the title of its rows, how to make its model with its seconds, and whether it is trained
METHODS: dict[str, tuple[str, Callable[[Bench, int, Console], tuple[Any, float]], bool]] = {
    "released": ("FactorLLM, as released", lambda bench, K, say: bench.factorllm(K, say, train_router=False), True),
    "published": ("FactorLLM, as published", lambda bench, K, say: bench.factorllm(K, say, train_router=True), True),
    "free": ("ours, training-free", lambda bench, K, say: bench.ours(K, say, steps=0), False),
    "ours": ("ours", lambda bench, K, say: bench.ours(K, say, steps=bench.steps), True),
}


def cell(bench: Bench, name: str, console: Console) -> Cell:
    """Return the cell of a name such as `ours-2`: a method and K. `dense` is the teacher."""
    if name == "dense":
        return bench.judged(bench.opened()[0], "dense", bench.experts, 0, 0.0)
    key, _, active = name.partition("-")
    title, make, trained = METHODS[key]
    model, seconds = make(bench, int(active), console)
    return bench.judged(model, title, int(active), bench.steps if trained else 0, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.causal", __doc__)
    parser.add_argument("model", help="a folder with a causal language model that is small enough to train here")
    parser.add_argument("--sample", type=Path, help="text to judge on, <|endoftext|> or empty lines between documents")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--active", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--texts", type=int, default=2000, help="texts drawn from the model, as long as it allows")
    parser.add_argument("--length", type=int, default=128, help="tokens of a training block")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--container", help="the native container of our rows, for example mixtral")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="+", help="run only these, for example ours-2 published-2")
    parser.add_argument("--work", type=Path, default=Path(".cache/causal"))
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Make every requested cell that --work does not hold; return the page of all of them."""
    torch.set_num_threads(options.threads)
    sample = options.sample or Path(options.model) / "sample.txt"
    if not sample.is_file():
        raise FileNotFoundError(f"{sample} does not exist: name a text file with --sample")
    counts = (options.experts, options.texts, options.length, options.steps, options.batch_tokens)
    more = (options.learning_rate, options.container, options.seed)
    work = options.work / "-".join(map(str, (Path(options.model).name, *counts, *more)))
    work.mkdir(parents=True, exist_ok=True)
    blocks, drawn_seconds = texts(options, work, console)
    bench = Bench(sample=sample, texts=blocks, **{name: getattr(options, name) for name in SHARED})
    names = ["dense", *(f"{key}-{active}" for active in options.active for key in METHODS)]
    wrong = set(options.cells or ()) - set(names)
    if wrong:
        raise ValueError(f"unknown cell {sorted(wrong)[0]!r}; known: {', '.join(names)}")
    rows = []
    for name in names:
        kept = work / f"{name}.json"
        if kept.is_file():
            rows.append(Cell(**json.loads(kept.read_text())))
        elif not options.cells or name in options.cells:
            rows.append(cell(bench, name, console))
            kept.write_text(json.dumps(asdict(rows[-1]), indent=2))
            console.print(f"{name}: {rows[-1].ratio:.3f}x the dense perplexity, {rows[-1].seconds:.0f} s")
    return page(options, rows, drawn_seconds)


def texts(options: argparse.Namespace, work: Path, console: Console) -> tuple[list[list[int]], float]:
    """Return the training blocks, drawn from the model once and kept, and the seconds that this took."""
    kept = work / "texts.json"
    if not kept.is_file():
        model, tokenizer = load_dense(options.model)
        begun = time.monotonic()
        drawn = sample_tokens(
            model,
            count=options.texts,
            length=positions(model.config) or LONGEST_TEXT,
            seed=options.seed,
            bos=tokenizer.bos_token_id,
            batch=250,
            track=lambda items, total, what: progress(items, total=total, description=what, console=console),
        )
        kept.write_text(json.dumps({"seconds": time.monotonic() - begun, "texts": drawn}))
    found = json.loads(kept.read_text())
    return pack(found["texts"], options.length, None), found["seconds"]


COLUMNS = ("method", "active FFN", "steps", "perplexity", "of dense", "KL, nats", "same top token", "time")


def page(options: argparse.Namespace, rows: Sequence[Cell], drawn_seconds: float) -> Page:
    """Return the page: the table and how each row continues the prompt."""
    cells, continuations = [], []
    for row in rows:
        share = f"{100 * row.active / options.experts:.0f} %"
        minutes = f"{row.seconds / 60:.1f} min" if row.seconds else "-"
        figures = (f"{row.perplexity:.2f}", f"{row.ratio:.3f}x", f"{row.divergence:.3f}", f"{100 * row.top1:.1f} %")
        cells.append([row.method, share, str(row.steps or "-"), *figures, minutes])
        continuations.append(f"- **{row.method}, {share}**: {row.continuation}")
    return Page(
        f"{Path(options.model).name}: FactorLLM's recipe and ours",
        [
            f"{options.experts} experts. {options.texts} texts are drawn from the model itself, which took "
            f"{drawn_seconds / 60:.1f} minutes, and packed into blocks of {options.length} tokens. Every weight is "
            f"trained, {options.batch_tokens} tokens a step, in the same order for every row. The judge is the model's "
            f"`sample.txt`, which no training saw. {about()}, {some(options.threads, 'thread')}; rows were trained one "
            "after another, or two at a time. Our experts are weighted by "
            f"{CONTAINERS[options.container].gate if options.container else 'unit'} gates.",
        ],
        [Grid("FactorLLM's recipe and ours", COLUMNS, cells)],
        notes="\n".join([f'## Greedy continuations of "{PROMPT}"', "", *continuations]),
    )


if __name__ == "__main__":
    sys.exit(main())
