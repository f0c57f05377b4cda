"""Time the conversion of one layer, step by step.

    python -m benchmarks.partition --threads 2 --out docs/results/partition.md
    python -m benchmarks.partition --calibrate --threads 2 --out docs/results/calibration.md

The first command decomposes a layer of LLaMA-7B's shape into experts and surveys the oracle. With `--calibrate`, a
layer of TinyLlama-1.1B's shape goes all the way: decomposition, router, judgement, refit, as
`ffn2moe.decompose.stream` does with every layer.

Weights and tokens are random; nothing is downloaded. Random neurons have no clusters, which is the slowest case of the
clustering. The errors of such experts say nothing and are not reported. Needs 4 GB of memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.ffn import random_mixture, random_spec
from benchmarks.page import Grid, Page, about, load_average, parser_of, report, some, working
from ffn2moe.decompose import clustering, oracle, route
from ffn2moe.decompose import layer as layers
from ffn2moe.decompose.route import RouterSettings
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.numerics import chunk_of
from ffn2moe.spec import MoESpec

# Step -> the function whose time it is. The time of a nested function belongs to its own step alone.
DECOMPOSE: dict[str, tuple[Any, str]] = {
    "activations": (DenseFFN, "neurons"),
    "statistics": (layers, "decompose_layer"),
    "clustering": (clustering, "_lloyd"),
    "slicing": (layers, "mixture"),
    "oracle": (oracle, "survey"),
}
CALIBRATE = DECOMPOSE | {
    "dense outputs": (route, "outputs"),
    "router": (route, "fit_router"),
    "scale": (oracle, "fit_scales"),
    "judgement": (oracle, "diagnose"),
    "refit": (route, "refit_outputs"),
    "other": (route, "route_layer"),
}
STEPS = tuple(CALIBRATE)
LLAMA, TINY_LLAMA = (4096, 11008), (2048, 5632)  # D and F
ROUTER_STEPS = 200  # as in `ffn2moe.decompose.stream`
LIMIT = 60.0  # seconds allowed for the decomposition of a layer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if the decomposition takes longer than LIMIT."""
    parser = parser_of("benchmarks.partition", __doc__)
    parser.add_argument("--calibrate", action="store_true", help="also fit the router and refit the outputs")
    parser.add_argument("--shape", type=int, nargs=2, help="D and F (default: of LLaMA-7B, or of TinyLlama-1.1B)")
    parser.add_argument("--experts", type=int, default=8, help="E")
    parser.add_argument("--active", type=int, default=2, help="K")
    parser.add_argument("--shared", type=int, default=0, help="S, neurons of the shared expert")
    parser.add_argument("--tokens", type=int, default=16000, help="calibration tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="conversions; the table has their medians")
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Return the median seconds of each step, of all together, and of all processors."""
    options.shape = options.shape or list(TINY_LLAMA if options.calibrate else LLAMA)
    torch.set_num_threads(options.threads)
    spec = random_spec(*options.shape, options.experts, options.active, shared=options.shared)
    with working(console, "converting a layer"):
        ffn = layers.dense_ffn(random_mixture(random_spec(*options.shape, 1, 1)))
        x_TD = torch.randn(options.tokens, options.shape[0], generator=torch.Generator().manual_seed(0))
        rows = [convert(ffn, x_TD, spec, options.calibrate) for _ in range(options.rounds)]
    found = {step: median(row[step] for row in rows) for step in rows[0]}
    decomposition = sum(found[step] for step in DECOMPOSE if step != "oracle")
    width, ffn_width = options.shape
    how = f", routers by ridge regression and {ROUTER_STEPS} steps, refit of the outputs" if options.calibrate else ""
    return Page(
        f"One layer, {'calibrated' if options.calibrate else 'decomposed'}",
        [
            f"D {width}, F {ffn_width}, gated; E = {options.experts}, K = {options.active}, S = {options.shared}{how}; "
            f"{options.tokens} random tokens. Medians of {options.rounds} conversions. `processors` is the time of all "
            f"threads together. {some(options.threads, 'thread')}; {about()}. {load_average()}",
        ],
        [Grid("One layer", ["step", "coactivation"], [[step, f"{seconds:.2f} s"] for step, seconds in found.items()])],
        result={"seconds": found},
        failure=f"a decomposition took {decomposition:.0f} s, more than {LIMIT:.0f} s" if decomposition > LIMIT else "",
    )


def convert(ffn: DenseFFN, x_TD: torch.Tensor, spec: MoESpec, calibrate: bool) -> dict[str, float]:
    """Convert a layer; return the seconds of every step, `in all`, and of all processors together."""
    start, processors = time.perf_counter(), time.process_time()
    with clocks(CALIBRATE if calibrate else DECOMPOSE) as spent:
        moe = layers.decompose_layer(ffn, x_TD, spec, 0, seed=0)
        if calibrate:
            settings = RouterSettings(steps=ROUTER_STEPS, batch_tokens=4096, seed=0)
            route.route_layer(moe, x_TD, settings)
        else:
            oracle.survey(moe, x_TD, chunk_of(spec.num_experts * x_TD.shape[1]))
    in_all = {"in all": time.perf_counter() - start, "processors": time.process_time() - processors}
    return spent | in_all


@contextmanager
def clocks(steps: dict[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Time the functions of the steps while the block runs; seconds by step."""
    spent = dict.fromkeys(steps, 0.0)
    inside = [0.0]  # seconds of the steps inside of each one that runs

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                seconds = time.perf_counter() - start
                spent[step] += seconds - inside.pop()
                inside[-1] += seconds

        return call

    with ExitStack() as stack:
        for step, (owner, name) in steps.items():
            stack.enter_context(patch.object(owner, name, timed(step, getattr(owner, name))))
        yield spent


if __name__ == "__main__":
    sys.exit(main())
