"""Time one FFN of a language model's shape, dense and as a mixture, from one token to a thousand.

    python -m benchmarks.decode --out docs/results/decode.md
    python -m benchmarks.decode --layers 8 --tokens 1 2 4 8 16 --out docs/results/decode-layers.md
    python -m benchmarks.decode --operator-dense                               what of a gain is the operator's
    python -m benchmarks.decode --plain --width 384 --ffn-width 1536           a GELU FFN with biases, as in BERT

Weights, router and tokens are random; nothing is downloaded. Every mixture plan of every engine is timed in turn with
every dense one, including OpenVINO with weights of 8 and 4 bits. Calls alternate between batches of different tokens,
which use different experts. The error of a plan compares its output with the same FFN, or mixture, in float64. A second
table compares a mixture only with dense plans of similar error.

A single FFN pays for a call of its engine, and its weights may stay in a cache. In a model, all layers share the call
and each reads its weights from memory: `--layers` puts FFNs in sequence in one graph and reports the time of one.
`--operator-dense` adds the native operator as a dense FFN: one expert of the whole width. `benchmarks.inference` times
a whole causal model: a prompt, and the tokens after it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.ffn import EPSILON, Layers, one_expert, random_mixture, random_spec
from benchmarks.openvino_weights import COMPRESSED, Run, compressed
from benchmarks.page import Grid, Page, about, parser_of, report, rounds_of, some, verdict, working
from benchmarks.plot import bars
from benchmarks.race import Compared, Samples, race, stopwatch
from ffn2moe.decompose.layer import dense_ffn
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.planning import timing
from ffn2moe.runtime import plans
from ffn2moe.runtime.engines import ENGINES

TOKENS = [1, 2, 4, 8, 16, 128, 1024]
TARGETS = {1: 3.2, 4: 1.0, 16: 1.3, 128: 2.2, 1024: 2.6}  # target speeds over the best dense plan
MOST_TOKENS_JUDGED = 128  # tokens of the error
# Batches of different tokens alternate: with one batch alone, its experts would stay in a cache.
BATCHES, TOKENS_IN_ALL = 16, 4096
LIKE = 1.5  # a dense plan of similar error has at most this times the error of the mixture
EXACT = 1e-5  # errors below this are rounding of float32
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
OPERATOR_DENSE = " as dense"  # after the name of a native plan: the operator with one expert of the whole width


@dataclass(frozen=True, kw_only=True)
class Row(Compared):
    """Hold one plan at n tokens. `like_speed` is over `like_dense`, the best dense plan of similar error."""

    tokens: int
    like_speed: float
    like_low: float
    like_high: float
    like_dense: str
    gigabytes_per_second: float  # weights read
    gigaflops: float  # necessary products


@dataclass(frozen=True)
class Plan:
    """Hold an open plan: how to run it, the bits of its weights, its error, and its role.

    `dense` plans compute the dense FFN; `baseline` plans among them are candidates for the best dense plan.
    """

    run: Run
    bits: int
    error: float
    dense: bool
    baseline: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.decode", __doc__)
    parser.add_argument("--width", type=int, default=2048, help="D")
    parser.add_argument("--ffn-width", type=int, default=5632, help="F, a multiple of the experts")
    parser.add_argument("--experts", type=int, default=8, help="E")
    parser.add_argument("--active", type=int, default=2, help="K")
    parser.add_argument("--plain", action="store_true", help="GELU with biases in place of SwiGLU")
    parser.add_argument("--layers", type=int, default=1, help="FFNs in one graph; the times are of one of them")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit for one n, after the first 5 rounds")
    parser.add_argument("--operator-dense", action="store_true", help="also time the native operator as a dense FFN")
    return report(parser, lambda options, console: page(measure(options, console)), arguments)


@torch.no_grad()
def _output(ffns: Sequence[MoEFFN] | Sequence[DenseFFN], x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the output of FFNs in sequence for tokens [T, D] in their dtype, and the input of each."""
    if len(ffns) == 1:
        return _applied(ffns[0], x), [x]
    read = []
    for ffn in ffns:
        read.append(x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt())
        x = x + _applied(ffn, read[-1])
    return x, read


def _applied(ffn: MoEFFN | DenseFFN, x_TD: torch.Tensor) -> torch.Tensor:
    if isinstance(ffn, MoEFFN):
        return copy.deepcopy(ffn).to(x_TD.dtype).reference(x_TD)
    tensors = {name: value.to(x_TD.dtype) for name, value in vars(ffn).items() if isinstance(value, torch.Tensor)}
    return replace(ffn, **tensors)(x_TD)


@torch.no_grad()
def _experts_used(moes: Sequence[MoEFFN], x_TD: np.ndarray) -> float:
    """Return how many different experts these tokens use in a layer, on average."""
    _, read = _output(moes, torch.from_numpy(x_TD))
    chosen = [moe.router(x).topk(moe.num_active).indices for moe, x in zip(moes, read, strict=True)]
    return sum(len(experts_TK.unique()) for experts_TK in chosen) / len(moes)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return all figures of the page, ready for JSON."""
    if min(*options.tokens, options.threads, options.layers) < 1:
        raise ValueError("--tokens, --threads and --layers start at 1")
    gated = not options.plain
    spec = random_spec(options.width, options.ffn_width, options.experts, options.active, gated=gated)
    moes = [random_mixture(spec, seed=layer) for layer in range(options.layers)]
    ffns = [dense_ffn(moe) for moe in moes]
    most = max(tokens * _batches(tokens) for tokens in options.tokens)
    x_TD = np.random.default_rng(0).standard_normal((most, options.width), dtype=np.float32)
    opened, missing = _opened(moes, ffns, x_TD, options, console)
    rows: list[Row] = []
    used: dict[int, float] = {}
    with rounds_of(console) as track:
        for tokens in options.tokens:
            batches = np.split(x_TD[: tokens * _batches(tokens)], _batches(tokens))
            used[tokens] = sum(_experts_used(moes, x_nD) for x_nD in batches) / len(batches)
            given = {name: cycle(batches) for name in opened}
            timed = {
                name: stopwatch(lambda _, run=plan.run, given=given[name]: run(next(given)))
                for name, plan in opened.items()
            }
            label = f"n = {tokens}"
            found = race(timed, rounds=options.rounds, limit=options.seconds, label=label, track=track)
            rows += _rows(opened, found["whole"], tokens, used[tokens], options)
    return {
        "machine": timing.machine(),
        "threads": options.threads,
        "shape": {name: getattr(options, name) for name in ("width", "ffn_width", "experts", "active", "layers")},
        "gated": gated,
        "bound": round(options.ffn_width / _active_width(options), 3),
        "experts_used": {str(tokens): count for tokens, count in used.items()},
        "copies_gb_per_s": round(_copies(), 1),
        "errors": {name: plan.error for name, plan in opened.items()},
        "dense": [name for name, plan in opened.items() if plan.baseline],
        "operator_dense": [name for name, plan in opened.items() if plan.dense and not plan.baseline],
        "missing": missing,
        "rows": [asdict(row) for row in rows],
    }


def _opened(
    moes: Sequence[MoEFFN], ffns: Sequence[DenseFFN], x_TD: np.ndarray, options: argparse.Namespace, console: Console
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Open every plan and compare it with float64; return the plans, and the reasons of those that cannot run here."""
    judged_TD = x_TD[: min(MOST_TOKENS_JUDGED, max(options.tokens))]
    with working(console, "computing the FFNs in float64"):
        judged = torch.from_numpy(judged_TD).double()
        references = {True: _output(ffns, judged)[0].numpy(), False: _output(moes, judged)[0].numpy()}
    opened: dict[str, Plan] = {}
    missing: dict[str, str] = {}
    with working(console, "opening the plans"), tempfile.TemporaryDirectory() as folder:
        for name, open_plan in _openers(moes, ffns, options, Path(folder)).items():
            try:
                run, bits = open_plan()
            except (ValueError, FileNotFoundError) as error:
                missing[name] = str(error)
                continue
            baseline = name in COMPRESSED or (name in plans.PLANS and plans.is_dense(name))
            dense = baseline or name.endswith(OPERATOR_DENSE)
            error_of = np.linalg.norm(run(judged_TD) - references[dense]) / np.linalg.norm(references[dense])
            opened[name] = Plan(run, bits, float(error_of), dense, baseline)
    return opened, missing


def _batches(tokens: int) -> int:
    return max(1, min(BATCHES, TOKENS_IN_ALL // tokens))


def _matrices(options: argparse.Namespace) -> int:
    return 2 if options.plain else 3


def _active_width(options: argparse.Namespace) -> float:
    """Return the neurons that a token uses, plus the neurons that cost as much as the router."""
    return float(options.active * options.ffn_width / options.experts + options.experts / _matrices(options))


def _openers(
    moes: Sequence[MoEFFN], ffns: Sequence[DenseFFN], options: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], tuple[Run, int]]]:
    """Return for every plan a function that opens it and returns how to run it and the bits of its weights."""

    def opener(layers: Layers, name: str, files: Path) -> tuple[Run, int]:
        files.mkdir(exist_ok=True)
        (graph,) = layers.open(name, options.threads, files)
        return lambda x_nD: graph.run(["y"], {"x": x_nD})[0], BITS[plans.precision_of(name, graph.precision)]

    layers = Layers(moes, stacked=True)
    names = plans.PLANS.names()
    openers = {name: partial(opener, layers, name, folder / "mixture") for name in names}
    if options.operator_dense:
        whole = Layers([one_expert(ffn) for ffn in ffns], stacked=True)
        natives = [name for name, row in plans.PLANS.items() if row.operator is plans.EXPERTS]
        openers |= {f"{name}{OPERATOR_DENSE}": partial(opener, whole, name, folder / "dense") for name in natives}
    if ENGINES["openvino"].is_installed:
        for name, (bits, group, precision, quantised) in COMPRESSED.items():
            openers[name] = partial(compressed, ffns, bits, group, precision, quantised, options.threads)
    return openers


def _rows(
    opened: Mapping[str, Plan], samples: Samples, tokens: int, used: float, options: argparse.Namespace
) -> Iterator[Row]:
    dense = {name: plan.error for name, plan in opened.items() if plan.baseline}
    best = samples.fastest(dense)
    weights = _matrices(options) * options.width
    for name, plan in opened.items():
        seconds = samples.median(name) / options.layers
        most = LIKE * max(plan.error, EXACT)
        like = samples.fastest(other for other, error in dense.items() if other == name or error <= most)
        like_speed = samples.speed(name, like)
        read = weights * options.ffn_width * (1.0 if plan.dense else used / options.experts) * plan.bits / 8
        width = options.ffn_width if plan.dense else _active_width(options)
        yield Row(
            **samples.compared(name, best, options.layers),
            tokens=tokens,
            like_speed=round(like_speed.median, 4),
            like_low=round(like_speed.low, 4),
            like_high=round(like_speed.high, 4),
            like_dense=like,
            gigabytes_per_second=round(read / seconds / 1e9, 2),
            gigaflops=round(2 * weights * width * tokens / seconds / 1e9, 1),
        )


def _copies() -> float:
    """Return the GB a second that one thread reads and writes when it copies 256 MB: the best of five."""
    source = np.ones(2**26, dtype=np.float32)
    target = np.empty_like(source)
    best = min(timeit.repeat(lambda: np.copyto(target, source), number=1, repeat=5))
    return 2 * source.nbytes / best / 1e9


def _by_tokens(result: Mapping[str, Any]) -> dict[int, dict[str, Row]]:
    found: dict[int, dict[str, Row]] = {}
    for values in result["rows"]:
        row = Row(**values)
        found.setdefault(row.tokens, {})[row.plan] = row
    return found


def _mixtures(result: Mapping[str, Any]) -> list[str]:
    """Return the mixture plans; pages from before `--operator-dense` have no operator_dense."""
    others = {*result["dense"], *result.get("operator_dense", ())}
    return [plan for plan in result["errors"] if plan not in others]


def grids(result: Mapping[str, Any]) -> Iterator[Grid]:
    """Yield the tables of the page."""
    rows = _by_tokens(result)
    plan_names = sorted(result["errors"], key=lambda plan: plan not in result["dense"])
    columns = [f"n = {tokens}" for tokens in rows]

    def table(cell: Callable[[Row], str], names: Sequence[str] = plan_names) -> list[list[str]]:
        return [[plan, *(cell(found[plan]) for found in rows.values())] for plan in names]

    def with_error(table: list[list[str]]) -> list[list[str]]:
        return [[plan, _percent(result["errors"][plan]), *cells] for plan, *cells in table]

    used = [f"{result['experts_used'][str(tokens)]:.3g}" for tokens in rows]
    bounds = [
        ["bound by FLOPs", "", *(f"{result['bound']:.2f}x" for _ in rows)],
        ["bound by weights read", "", *(f"{result['shape']['experts'] / float(count):.2f}x" for count in used)],
        ["experts used", "", *used],
    ]
    speeds = with_error(table(lambda row: "best dense" if row.plan == row.best_dense else f"{row.speed:.2f}x"))
    yield Grid("Speed over the best dense plan", ["plan", "error", *columns], speeds + bounds)
    compared = ["n", "best mixture", "error", "best dense", "error", "speed", "quartiles", "target"]
    yield Grid("Best mixture", compared, list(_summary(result)))
    like = with_error(table(lambda row: f"{row.like_speed:.2f}x {row.like_dense}", _mixtures(result)))
    yield Grid("Speed over the best dense plan of similar error", ["mixture", "error", *columns], like)
    yield Grid("Milliseconds", ["plan", *columns], table(lambda row: f"{row.milliseconds:.3f}"))
    yield Grid("GB/s of weights", ["plan", *columns], table(lambda row: f"{row.gigabytes_per_second:.1f}"))
    yield Grid("GFLOP/s", ["plan", *columns], table(lambda row: f"{row.gigaflops:.0f}"))


def _summary(result: Mapping[str, Any]) -> Iterator[list[str]]:
    mixtures = _mixtures(result)
    for tokens, rows in _by_tokens(result).items():
        best = min((rows[plan] for plan in mixtures), key=lambda row: row.milliseconds)
        target = TARGETS.get(tokens)
        yield [
            str(tokens),
            best.plan,
            _percent(result["errors"][best.plan]),
            best.best_dense,
            _percent(result["errors"][best.best_dense]),
            f"{best.speed:.2f}x",
            f"{best.low:.2f} to {best.high:.2f}",
            "" if target is None else verdict(best.spread, target),
        ]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _kind(result: Mapping[str, Any]) -> str:
    return "SwiGLU" if result.get("gated", True) else "GELU with biases"


def page(result: Mapping[str, Any]) -> Page:
    """Return the page."""
    shape = result["shape"]
    rounds = [row["rounds"] for row in result["rows"]]
    text = [
        f"{_kind(result)}, D {shape['width']}, F {shape['ffn_width']}; E = {shape['experts']}, K = {shape['active']}; "
        f"n tokens at once, {some(result['threads'], 'thread')}. Weights and tokens are random. "
        f"{about(result['machine'])}. A thread copies memory at {result['copies_gb_per_s']} GB/s, read and written.",
        f"Speeds are over the best dense plan at that n: medians of {min(rounds)} to {max(rounds)} interleaved rounds. "
        f"`error` compares the output with float64 over at most {MOST_TOKENS_JUDGED} tokens. `ov-weights` is the dense "
        "FFN in OpenVINO with weights of 8 or 4 bits. GB/s count the weights of the experts that are used, GFLOP/s the "
        f"necessary products. Up to {BATCHES} batches alternate, so that no expert stays in a cache. A dense plan of "
        f"similar error has at most {LIKE:g} times the error of the mixture; the fastest is named.",
    ]
    if shape["layers"] > 1:
        text.append(
            f"{shape['layers']} such FFNs run in sequence in one graph, as x + FFN(norm(x)); times are of one of them, "
            "errors of the last output. Random routers have many near ties, and rounding moves tokens between experts, "
            "so errors of mixtures in sequence say little: see the page of a single FFN."
        )
    of_layers = f", of {shape['layers']}" if shape["layers"] > 1 else ""
    return Page(
        f"Decoding: one FFN of a language model's shape{of_layers}",
        text,
        list(grids(result)),
        notes="\n\n".join(f"Not timed: `{plan}` ({reason})." for plan, reason in result["missing"].items()),
        result=result,
        figure=lambda: figure(result),
    )


def figure(result: Mapping[str, Any]) -> Any:
    """Draw the speed over the best dense plan with quartiles, a group for each n."""
    groups = {
        f"n = {tokens}": {plan: row.spread for plan, row in rows.items() if plan != "dense"}
        for tokens, rows in _by_tokens(result).items()
    }
    shape = result["shape"]
    sizes = f"D {shape['width']}, F {shape['ffn_width']}, {shape['active']} of {shape['experts']} experts"
    panel = (f"{_kind(result)}, {sizes}", groups, [result["bound"]] * len(groups))
    return bars([panel], hollow=result["dense"], ylabel="speed over best dense")


if __name__ == "__main__":
    sys.exit(main())
