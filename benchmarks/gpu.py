"""Time a dense FFN and a mixture side by side in PyTorch on a GPU: forward, and forward with backward.

    python -m benchmarks.gpu --out docs/results/gpu.md
    python -m benchmarks.gpu --device cpu --shapes 64x256 --tokens 32      # try the code without a GPU

This benchmark never ran on a GPU: its tests run on the CPU only, and docs/results has no page of it.

Ways to compute the same mixture: `loop` gathers the tokens of each expert and adds its outputs, as models in
transformers do; `grouped` is the layer of this project, which uses `torch._grouped_mm` on a GPU in bfloat16. Every way
is compared with a float32 reference first; a wrong way is not timed. Without a GPU nothing is measured: exit code 2.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.ffn import TrainedFFN, random_mixture, random_spec
from benchmarks.page import Grid, Page, parser_of, report, working
from benchmarks.race import Spread, race
from ffn2moe.decompose.layer import dense_ffn
from ffn2moe.moe.layer import MoEFFN

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative, for an output or a gradient
SHORTEST_SAMPLE = 0.005  # seconds; a faster way runs several times for one sample
MOST_CALLS = 200

Way = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if a way is wrong, 2 if nothing can be measured."""
    parser = parser_of("benchmarks.gpu", __doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or another that PyTorch knows; cpu to try it")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    shapes = [_shape("384x1536"), _shape("2048x5632g")]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=shapes, help="DxF; g means gated")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 4096, 16384])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Time every shape and number of tokens, forward alone and with the backward pass."""
    if options.device != "cpu" and not _there(options.device):
        raise ValueError(f"no GPU: PyTorch {torch.__version__} finds no device {options.device!r}; nothing is measured")
    device = torch.device(options.device)
    if device.index is not None:  # the timer waits for the current device
        torch.get_device_module(device).set_device(device)
    rows = []
    for width, ffn_width, gated in options.shapes:
        moe = random_mixture(random_spec(width, ffn_width, options.experts, options.active, gated=gated))
        moe = moe.to(options.device, getattr(torch, options.dtype))
        for tokens, backward in product(options.tokens, (False, True)):
            with working(console, f"{width} x {ffn_width}, {tokens} tokens"):
                rows.append(row_of(moe, tokens, backward, options))
    wrong = [f"{row['shape']} {row['tokens']} {way}" for row in rows for way in row["wrong"]]
    name = "CPU" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))
    header = ["D x F", "tokens", "pass", "way", "time", "speed over dense"]
    cells = [
        [row["shape"], str(row["tokens"]), row["pass"], name, f"{time:.3f} ms", str(Spread(**row["speedup"][name]))]
        for row in rows
        for name, time in row["milliseconds"].items()
    ]
    return Page(
        "Dense FFN and mixture on a GPU",
        [
            f"{name}, torch {torch.__version__}, {options.dtype}; {options.active} of {options.experts} experts "
            f"active: the products alone allow {options.experts / options.active:.1f}x. Router and layout are "
            "included. Medians; speeds within rounds, with quartiles."
        ],
        [Grid("In PyTorch", header, cells)],
        result={"device": name, "torch": torch.__version__, "dtype": options.dtype, "rows": rows},
        failure=f"wrong, so not timed: {', '.join(wrong)}" if wrong else "",
    )


def _shape(text: str) -> tuple[int, int, bool]:
    found = re.fullmatch(r"(\d+)x(\d+)(g?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxFFN_WIDTH, for example 2048x5632g")
    return int(found[1]), int(found[2]), bool(found[3])


def _there(device: str) -> bool:
    try:
        asked = torch.device(device)
        module = torch.get_device_module(asked)
        return bool(module.is_available()) and (asked.index or 0) < module.device_count()
    except RuntimeError:
        return False


def ways_of(moe: MoEFFN) -> dict[str, Way]:
    """Return the dense FFN and each way to compute the mixture."""
    dense = TrainedFFN(dense_ffn(moe))
    found: dict[str, Way] = {"dense": dense, "loop": lambda x_TD: loop(moe, x_TD), "grouped": moe}
    return found


def loop(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """Compute the mixture one expert at a time: gather its tokens, add its outputs."""
    scores_TE = moe.scores(x_TD)
    experts_TK = moe.router.choose(scores_TE, moe.num_active).experts_TK
    y_TD = torch.zeros_like(x_TD)
    for index in range(moe.num_experts):
        token, _ = (experts_TK == index).nonzero(as_tuple=True)
        y_TD = y_TD.index_add(0, token, moe.expert(index, x_TD[token]))
    return moe.finish(x_TD, y_TD)


def row_of(moe: MoEFFN, tokens: int, backward: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Return the median milliseconds of each way, its speed over the dense FFN, and the errors of wrong ways."""
    width, dtype = moe.w_in.shape[2], moe.w_in.dtype
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, width, generator=generator).to(options.device, dtype)
    gradient_TD = torch.randn(tokens, width, generator=generator).to(options.device, dtype)
    ways, wrong = ways_of(moe), {}
    for name, error in errors(moe, ways, x_TD, gradient_TD if backward else None).items():
        if not error <= TOLERANCE[dtype]:
            wrong[name] = error
            del ways[name]
    x_TD.requires_grad_(backward)

    def once(way: Way) -> None:
        if backward:
            x_TD.grad = None
            way(x_TD).backward(gradient_TD)
        else:
            with torch.no_grad():
                way(x_TD)

    works = {}
    for name, way in ways.items():
        timer = Timer("once(way)", globals={"once": once, "way": way})  # waits for the device
        calls = max(1, min(MOST_CALLS, round(SHORTEST_SAMPLE / timer.timeit(3).mean)))
        works[name] = lambda _, timer=timer, calls=calls: {"whole": timer.timeit(calls).mean}
    samples = race(works, rounds=options.rounds, fewest=1, warm_up=1)["whole"]
    return {
        "shape": f"{width} x {moe.num_experts * moe.w_in.shape[1]}",
        "tokens": tokens,
        "pass": "forward + backward" if backward else "forward",
        "milliseconds": {name: 1000 * samples.median(name) for name in samples.seconds},
        "speedup": {name: asdict(samples.speed(name, "dense")) for name in samples.seconds},
        "wrong": wrong,
    }


def errors(moe: MoEFFN, ways: dict[str, Way], x_TD: Tensor, gradient_TD: Tensor | None) -> dict[str, float]:
    """Return the relative error of each way against float32: its output, and with a gradient those of x and w_in.

    The reference of the dense FFN is the mixture with all experts.
    """
    exact = copy.deepcopy(moe).float()
    whole = copy.deepcopy(exact)
    whole.use_all_experts()
    found = {}
    for name, way in ways.items():
        judge = whole if name == "dense" else exact
        wanted = _results(judge.reference, x_TD.float(), gradient_TD, judge.w_in)
        # The dense way has its own weights, so the gradient of w_in is not compared.
        given = _results(way, x_TD, gradient_TD, None if name == "dense" else moe.w_in)
        found[name] = max(
            ((a.float() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(given, wanted, strict=False)
        )
    moe.zero_grad()
    return found


def _results(way: Way, x_TD: Tensor, gradient_TD: Tensor | None, weight: Tensor | None) -> list[Tensor]:
    """Return the output, and with a gradient those of the input and of the weight."""
    x_TD = x_TD.detach().clone().requires_grad_(True)
    y_TD = way(x_TD)
    asked = [x_TD] if weight is None else [x_TD, weight]
    backward = [] if gradient_TD is None else torch.autograd.grad(y_TD, asked, gradient_TD.to(y_TD.dtype))
    return [y_TD.detach(), *backward]


if __name__ == "__main__":
    sys.exit(main())
