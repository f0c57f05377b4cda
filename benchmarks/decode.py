"""Time one FFN of a language model's shape, dense and as a mixture, from one token to a thousand.

    python -m benchmarks.decode --out docs/results/decode.md
    python -m benchmarks.decode --layers 8 --tokens 1 2 4 8 16 --out docs/results/decode-layers.md

Weights, router and tokens are random and made on the spot: nothing is downloaded, and what is timed does not depend on
them but for the experts that the tokens use, which are counted. Every mixture plan of every engine takes its turn with
every dense one, among them OpenVINO with weights of 8 and 4 bits, multiplied in bfloat16 or with activations quantised
as they run. Calls take other tokens in turn, and with them other experts. The error of a plan is that of its output
against the same FFN, or mixture, in float64; a second comparison is with the dense plans of like error alone.

One FFN alone pays for a call of its engine, and its weights may stay in a cache. In a model the call is shared by all
layers, and each reads its weights from memory: `--layers` puts so many FFNs behind each other in one graph, as
x + FFN(norm(x)), with weights of their own, and tells the time of one. `--export` times the plans of a causal export as
well: a prompt, and the tokens after it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ffn import EPSILON, Layers, dense_ffn
from benchmarks.inference import KEPT, read_texts, sample_of
from benchmarks.race import Samples, Spread, race, stopwatch
from benchmarks.show import Rounds, about, bars, complain, verdict, write
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.planning import timing
from ffn2moe.runtime import plans as runtime_plans
from ffn2moe.runtime.engines import has_openvino, openvino
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import read_manifest
from ffn2moe.spec import FFNShape, MoESpec

TOKENS = [1, 2, 4, 8, 16, 128, 1024]
TARGETS = {1: 3.2, 4: 1.0, 16: 1.3, 128: 2.2, 1024: 2.6}  # speed over the best dense plan that is aimed at
MOST_TOKENS_JUDGED = 128  # that the error is taken over
# Batches of other tokens that are run in turn: of one again and again, the experts would stay in a cache. Fewer where
# they are large.
BATCHES, TOKENS_IN_ALL = 16, 4096
LIKE = 1.5  # times the error of a mixture: what a dense plan of like error has at most
EXACT = 1e-5  # errors below are those of float32, and alike
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
# Dense in OpenVINO with weights of few bits: name -> bits, weights that share a scale (None: a row), arithmetic, and
# activations that share one (0: they are not quantised).
COMPRESSED: dict[str, tuple[int, int | None, str, int]] = {
    "ov-weights8": (8, None, "f32", 32),
    "ov-weights8-bf16": (8, None, "bf16", 0),
    "ov-weights4": (4, 128, "f32", 128),
    "ov-weights4-bf16": (4, 128, "bf16", 0),
}

Run = Callable[[np.ndarray], np.ndarray]  # x [n, D] -> y [n, D]


@dataclass(frozen=True)
class Row:
    """One plan at so many tokens. `speed` is over the best dense plan, with the quartiles of the rounds.

    `like_speed` is over the best dense plan of like error, `like_dense`.
    """

    tokens: int
    plan: str
    milliseconds: float
    speed: float
    low: float
    high: float
    best_dense: str
    like_speed: float
    like_low: float
    like_high: float
    like_dense: str
    gigabytes_per_second: float  # of weights
    gigaflops: float  # of products that are needed, a second
    rounds: int


@dataclass(frozen=True)
class Plan:
    """A plan that is open: how to run it, the bits of its weights, and its error."""

    run: Run
    bits: int
    error: float
    dense: bool


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        result = measure(options, console)
    except (ValueError, OSError, RuntimeError) as error:
        return complain(error)
    for title, header, rows in grids(result):
        shown = Table(title=title, title_justify="left")
        for column in header:
            shown.add_column(column, justify="left" if column == "plan" else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(about())
    if options.out:
        result["image"] = options.out.with_suffix(".png").name
        write(options.out, page(result), result, lambda: figure(result), console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048, help="D")
    parser.add_argument("--ffn-width", type=int, default=5632, help="F, a multiple of the experts")
    parser.add_argument("--experts", type=int, default=8, help="E")
    parser.add_argument("--active", type=int, default=2, help="K")
    parser.add_argument("--layers", type=int, default=1, help="FFNs in one graph; the times are of one of them")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=20.0, help="the most for one n, beyond the first 5 rounds")
    parser.add_argument("--export", type=Path, help="a causal export to time as well, prompt and decoding")
    parser.add_argument("--texts", type=Path, help="prompts for --export: JSON lines with a text each, or plain lines")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/decode.md")
    return parser


# --- the FFN --------------------------------------------------------------------------------------------------------


def mixture(width: int, ffn_width: int, experts: int, active: int, seed: int = 0) -> MoEFFN:
    """A gated FFN of random weights, cut into experts that a random router chooses from."""
    if min(width, ffn_width, experts, active) < 1:
        raise ValueError("--width, --ffn-width, --experts and --active start at 1")
    if ffn_width % experts or active > experts:
        raise ValueError(f"{experts} experts, {active} active, do not divide {ffn_width} neurons: choose others")
    shape = FFNShape("layers", 1, width, ffn_width, ffn_width // experts, 0, True, "silu")
    spec = MoESpec(
        family="llama",
        model_class="LlamaModel",
        head="causal",
        stacks=(shape,),
        num_experts=experts,
        num_active=active,
        gate="unit",
        router_bias=True,
        container=None,
        partition="random",
        teacher="random weights",
        pooling=None,
        max_length=2048,
    )
    generator = torch.Generator().manual_seed(seed)
    moe = MoEFFN(spec, b_in=False, b_out=False)
    assert moe.w_gate is not None
    with torch.no_grad():
        for parameter in (moe.w_in, moe.w_gate, moe.w_out):
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        moe.router.weight.normal_(0, width**-0.5, generator=generator)
    return moe.eval()


@torch.no_grad()
def _output(ffns: Sequence[MoEFFN] | Sequence[DenseFFN], x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What FFNs behind each other give for tokens [T, D] in its dtype, and what each of them has read."""
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
    w_gate_FD = None if ffn.w_gate_FD is None else ffn.w_gate_FD.to(x_TD.dtype)
    exact = DenseFFN(ffn.w_in_FD.to(x_TD.dtype), ffn.w_out_DF.to(x_TD.dtype), ffn.activation, w_gate_FD=w_gate_FD)
    return exact(x_TD)


@torch.no_grad()
def _experts_used(moes: Sequence[MoEFFN], x_TD: np.ndarray) -> float:
    """How many different experts these tokens use in a layer, on average."""
    _, read = _output(moes, torch.from_numpy(x_TD))
    chosen = [moe.router(x).topk(moe.num_active).indices for moe, x in zip(moes, read, strict=True)]
    return sum(len(experts_TK.unique()) for experts_TK in chosen) / len(moes)


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that the page tells, as it goes into JSON."""
    if min(*options.tokens, options.threads, options.layers) < 1:
        raise ValueError("--tokens, --threads and --layers start at 1")
    if options.export is not None and options.texts is None:
        raise ValueError("--export needs --texts, a file of prompts")
    decoder = None if options.export is None else _decoder(options)  # first: it may refuse
    sizes = (options.width, options.ffn_width, options.experts, options.active)
    moes = [mixture(*sizes, seed=layer) for layer in range(options.layers)]
    ffns = [dense_ffn(moe, options.ffn_width) for moe in moes]
    random = np.random.default_rng(0)
    most = max(tokens * _batches(tokens) for tokens in options.tokens)
    x_TD = random.standard_normal((most, options.width), dtype=np.float32)
    judged_TD = x_TD[: min(MOST_TOKENS_JUDGED, max(options.tokens))]
    with console.status("the FFNs in float64"):
        judged = torch.from_numpy(judged_TD).double()
        references = {True: _output(ffns, judged)[0].numpy(), False: _output(moes, judged)[0].numpy()}
    plans: dict[str, Plan] = {}
    missing: dict[str, str] = {}
    with console.status("opening the plans") as status, tempfile.TemporaryDirectory() as folder:
        for name, open_plan in _openers(moes, ffns, options, Path(folder)).items():
            status.update(f"opening {name}")
            try:
                run, bits = open_plan()
            except (ValueError, FileNotFoundError) as error:
                missing[name] = str(error)
                continue
            dense = name in runtime_plans.DENSE_PLANS or name in COMPRESSED
            exact = references[dense]
            error_of = float(np.linalg.norm(run(judged_TD) - exact) / np.linalg.norm(exact))
            plans[name] = Plan(run, bits, error_of, dense)
    rows: list[Row] = []
    used: dict[int, float] = {}
    with Rounds(console, len(options.tokens)) as rounds:
        for tokens in options.tokens:
            batches = np.split(x_TD[: tokens * _batches(tokens)], _batches(tokens))
            used[tokens] = sum(_experts_used(moes, x_nD) for x_nD in batches) / len(batches)
            timed = {name: stopwatch(partial(_call, plan.run, cycle(batches))) for name, plan in plans.items()}
            found = race(
                timed, rounds=options.rounds, limit=options.seconds, label=f"n = {tokens}", track=rounds.track
            )["whole"]
            rows += _rows(plans, found, tokens, used[tokens], options)
    return {
        "command": command(options),
        "machine": timing.machine(),
        "threads": options.threads,
        "shape": {name: getattr(options, name) for name in ("width", "ffn_width", "experts", "active", "layers")},
        "bound": round(options.ffn_width / _active_width(options), 3),
        "experts_used": {str(tokens): count for tokens, count in used.items()},
        "copies_gb_per_s": round(_copies(), 1),
        "errors": {name: plan.error for name, plan in plans.items()},
        "dense": [name for name, plan in plans.items() if plan.dense],
        "missing": missing,
        "rows": [asdict(row) for row in rows],
        "model": decoder,
    }


def _batches(tokens: int) -> int:
    return max(1, min(BATCHES, TOKENS_IN_ALL // tokens))


def _call(run: Run, batches: Iterator[np.ndarray], _: int) -> np.ndarray:
    return run(next(batches))


def _active_width(options: argparse.Namespace) -> float:
    """Neurons a token uses, with the router counted as as many as it costs: it has E rows of the three matrices'."""
    return float(options.active * options.ffn_width / options.experts + options.experts / 3)


def _openers(
    moes: Sequence[MoEFFN], ffns: Sequence[DenseFFN], options: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], tuple[Run, int]]]:
    """Every plan by name: what opens it, and gives how to run it and the bits of its weights."""
    layers = Layers(moes, [options.ffn_width] * len(moes), stacked=True)

    def known(name: str) -> Callable[[], tuple[Run, int]]:
        def open_it() -> tuple[Run, int]:
            (graph,) = layers.open(name, options.threads, folder)
            bits = BITS[runtime_plans.precision_of(name, graph)]
            return lambda x_nD: graph.run(["y"], {"x": x_nD})[0], bits

        return open_it

    openers = {name: known(name) for name in get_args(runtime_plans.Plan)}
    if has_openvino():
        for name, (bits, group, precision, quantised) in COMPRESSED.items():
            openers[name] = partial(_compressed, ffns, bits, group, precision, quantised, options.threads)
    return openers


def _compressed(
    ffns: Sequence[DenseFFN], bits: int, group: int | None, precision: str, quantised: int, threads: int
) -> tuple[Run, int]:
    """Dense gated FFNs in OpenVINO with weights of 8 or 4 bits, symmetric, one scale for `group` of a row's weights.

    Activations are quantised in groups of `quantised` as the model runs, or stay as they are where that is 0. The
    form is what OpenVINO's own weight compression (NNCF) writes: constant, Convert, Multiply, Reshape, MatMul.
    """
    width = ffns[0].w_in_FD.shape[1]
    if group is not None and (width % group or ffns[0].ffn_width % group):
        raise ValueError(f"a scale for {group} weights each does not divide its matrices")
    ov = openvino()
    import openvino.opset13 as ops

    def linear(x: Any, weight: torch.Tensor | None) -> Any:
        assert weight is not None
        N, K = weight.shape
        blocks_NBg = weight.detach().numpy().reshape(N, -1, group or K)
        largest = 2 ** (bits - 1) - 1
        scales_NB1 = np.maximum(np.abs(blocks_NBg).max(-1, keepdims=True) / largest, np.finfo(np.float32).tiny)
        steps_NBg = np.rint(blocks_NBg / scales_NB1).astype(np.int8)
        if bits == 4:
            nibbles = (steps_NBg.view(np.uint8) & 15).reshape(-1)
            packed = nibbles[0::2] | (nibbles[1::2] << 4)
            tensor = ov.Tensor(packed, ov.Shape(list(steps_NBg.shape)), ov.Type.i4)
        else:
            tensor = ov.Tensor(steps_NBg)
        constant = ov.op.Constant(tensor, shared_memory=False)
        scaled = ops.multiply(ops.convert(constant, "f32"), ops.constant(scales_NB1.astype(np.float32)))
        return ops.matmul(x, ops.reshape(scaled, np.array([N, K]), False), False, True)

    def norm(x: Any) -> Any:
        mean_n1 = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), ops.constant([-1]), keep_dims=True)
        inverse_n1 = ops.power(ops.add(mean_n1, ops.constant(np.float32(EPSILON))), ops.constant(np.float32(-0.5)))
        return ops.multiply(x, inverse_n1)

    given_nD = y_nD = ops.parameter([-1, width], np.float32)
    for ffn in ffns:
        x_nD = norm(y_nD) if len(ffns) > 1 else y_nD
        h_nF = ops.multiply(ops.swish(linear(x_nD, ffn.w_gate_FD)), linear(x_nD, ffn.w_in_FD))
        made_nD = linear(h_nF, ffn.w_out_DF)
        y_nD = ops.add(y_nD, made_nD) if len(ffns) > 1 else made_nD
    model = ov.Model([ops.result(y_nD)], [given_nD], "ffn")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": quantised,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(x_nD: np.ndarray) -> np.ndarray:
        found: np.ndarray = request.infer([x_nD], share_inputs=True, share_outputs=True)[0].copy()
        return found

    return run, bits


def _rows(
    plans: Mapping[str, Plan], samples: Samples, tokens: int, used: float, options: argparse.Namespace
) -> Iterator[Row]:
    dense = {name: plan.error for name, plan in plans.items() if plan.dense}
    best = samples.fastest(dense)
    weights = 3 * options.width * options.ffn_width
    for name, plan in plans.items():
        seconds, speed = samples.median(name) / options.layers, samples.speed(name, best)
        most = LIKE * max(plan.error, EXACT)
        like = samples.fastest(other for other, error in dense.items() if other == name or error <= most)
        like_speed = samples.speed(name, like)
        read = weights * (1.0 if plan.dense else used / options.experts) * plan.bits / 8
        width = options.ffn_width if plan.dense else _active_width(options)
        yield Row(
            tokens=tokens,
            plan=name,
            milliseconds=round(1000 * seconds, 4),
            speed=round(speed.median, 4),
            low=round(speed.low, 4),
            high=round(speed.high, 4),
            best_dense=best,
            like_speed=round(like_speed.median, 4),
            like_low=round(like_speed.low, 4),
            like_high=round(like_speed.high, 4),
            like_dense=like,
            gigabytes_per_second=round(read / seconds / 1e9, 2),
            gigaflops=round(2 * 3 * options.width * width * tokens / seconds / 1e9, 1),
            rounds=samples.rounds,
        )


def _copies() -> float:
    """GB a second that one thread reads and writes, copying 256 MB: the best of a few."""
    source = np.ones(2**26, dtype=np.float32)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9


def _decoder(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The plans of a causal export: milliseconds of a prompt of 16 tokens and of each token after it."""
    manifest = read_manifest(options.export)
    if manifest["spec"]["head"] != "causal":
        raise ValueError(f"{options.export} does not decode (its head is {manifest['spec']['head']}): name another")
    exports = {}
    for plan in manifest["plans"]:
        try:
            exports[plan] = open_export(options.export, plan, options.threads)
        except ValueError:
            if plan == "dense":
                raise
    batches = timing.full_batches(exports["dense"], read_texts(options.texts), 1, 16)
    timed = {plan: sample_of(export, batches) for plan, export in exports.items()}
    found = race(timed, rounds=options.rounds, limit=options.seconds)
    kept = {plan: float(manifest["plans"][plan]["retention"]) for plan in exports}
    rows = []
    for phase in ("prefill", "decode"):
        samples = found[phase]
        best = samples.fastest(
            plan for plan in runtime_plans.DENSE_PLANS if plan == "dense" or kept.get(plan, 0.0) >= KEPT
        )
        for plan in samples.seconds:
            speed = samples.speed(plan, best)
            rows.append(
                {
                    "phase": phase,
                    "plan": plan,
                    "kept": kept[plan],
                    "milliseconds": round(1000 * samples.median(plan), 4),
                    "best_dense": best,
                    **{name: round(value, 4) for name, value in asdict(speed).items()},
                }
            )
    return rows


def command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.decode"]
    for name in ("width", "ffn_width", "experts", "active", "layers"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    words += ["--tokens", *map(str, options.tokens), "--threads", str(options.threads)]
    words += ["--rounds", str(options.rounds), "--seconds", f"{options.seconds:g}"]
    for name in ("export", "texts", "out"):
        if getattr(options, name):
            words += [f"--{name}", str(getattr(options, name))]
    return " ".join(words)


# --- telling --------------------------------------------------------------------------------------------------------


def _by_tokens(result: Mapping[str, Any]) -> dict[int, dict[str, Row]]:
    found: dict[int, dict[str, Row]] = {}
    for values in result["rows"]:
        row = Row(**values)
        found.setdefault(row.tokens, {})[row.plan] = row
    return found


def grids(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table."""
    rows = _by_tokens(result)
    plans = sorted(result["errors"], key=lambda plan: plan not in result["dense"])
    columns = [f"n = {tokens}" for tokens in rows]

    def table(cell: Callable[[Row], str]) -> list[list[str]]:
        return [[plan, *(cell(found[plan]) for found in rows.values())] for plan in plans]

    speeds = table(lambda row: "best dense" if row.plan == row.best_dense else f"{row.speed:.2f}x")
    for line in speeds:
        line.insert(1, _percent(result["errors"][line[0]]))
    used = [f"{result['experts_used'][str(tokens)]:.3g}" for tokens in rows]
    experts = result["shape"]["experts"]
    speeds += [
        ["bound by FLOPs", "", *(f"{result['bound']:.2f}x" for _ in rows)],
        ["bound by weights read", "", *(f"{experts / float(count):.2f}x" for count in used)],
        ["experts used", "", *used],
    ]
    yield "Speed over the best dense plan", ["plan", "error", *columns], speeds
    compared = ["n", "best mixture", "error", "best dense", "error", "speed", "quartiles", "target"]
    yield "Best mixture", compared, list(_summary(result))
    mixtures = [plan for plan in plans if plan not in result["dense"]]
    yield (
        "Speed over the best dense plan of like error",
        ["mixture", "error", *columns],
        [
            [
                plan,
                _percent(result["errors"][plan]),
                *(f"{row.like_speed:.2f}x {row.like_dense}" for row in (found[plan] for found in rows.values())),
            ]
            for plan in mixtures
        ],
    )
    yield "Milliseconds", ["plan", *columns], table(lambda row: f"{row.milliseconds:.3f}")
    yield "GB/s of weights", ["plan", *columns], table(lambda row: f"{row.gigabytes_per_second:.1f}")
    yield "GFLOP/s", ["plan", *columns], table(lambda row: f"{row.gigaflops:.0f}")
    if result["model"]:
        yield (
            "A whole model, batch of one",
            ["plan", "kept", "phase", "ms", "speed over best dense", "quartiles"],
            [
                [
                    row["plan"],
                    f"{100 * row['kept']:.1f} %",
                    row["phase"],
                    f"{row['milliseconds']:.3f}",
                    "best dense" if row["plan"] == row["best_dense"] else f"{row['median']:.2f}x",
                    f"{row['low']:.2f} to {row['high']:.2f}",
                ]
                for row in result["model"]
            ],
        )


def _summary(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for tokens, rows in _by_tokens(result).items():
        mixtures = [row for row in rows.values() if row.plan not in result["dense"]]
        best = min(mixtures, key=lambda row: row.milliseconds)
        target = TARGETS.get(tokens)
        told = "" if target is None else verdict(Spread(best.speed, best.low, best.high), target)
        yield [
            str(tokens),
            best.plan,
            _percent(result["errors"][best.plan]),
            best.best_dense,
            _percent(result["errors"][best.best_dense]),
            f"{best.speed:.2f}x",
            f"{best.low:.2f} to {best.high:.2f}",
            told,
        ]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def page(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, under the command that made them."""
    shape = result["shape"]
    rounds = [row["rounds"] for row in result["rows"]]
    lines = [
        "# Decoding: one FFN of a language model's shape" + (f", of {shape['layers']}" if shape["layers"] > 1 else ""),
        "",
        f"SwiGLU, D {shape['width']}, F {shape['ffn_width']}; E = {shape['experts']}, K = {shape['active']}; n tokens "
        f"at once, {result['threads']} {'thread' if result['threads'] == 1 else 'threads'}. Random weights and tokens.",
        f"{about(result['machine'])}. A thread copies memory at {result['copies_gb_per_s']} GB/s, read and written.",
        "",
        f"Speeds are over the best dense plan at that n, the median of {min(rounds)} to {max(rounds)} interleaved "
        "rounds. `error` is that of the output against",
        f"the same FFN, or mixture, in float64, relative, over {MOST_TOKENS_JUDGED} tokens at most. `ov-weights` is "
        "the dense FFN in OpenVINO with weights of 8 or 4 bits;",
        "activations are quantised as it runs, or in bfloat16. GB/s count the weights of the experts that are used, "
        "GFLOP/s the products that are needed.",
        f"Up to {BATCHES} batches of other tokens take turns, and with them other experts: none stays in a cache "
        "because it alone is asked for.",
        f"Of like error are dense plans whose error is at most {LIKE:g} times the mixture's: the fastest of them is "
        "named.",
        *(
            [
                "",
                f"{shape['layers']} such FFNs follow each other in one graph, as x + FFN(norm(x)), with weights of "
                "their own; times are of one of them, errors of the",
                "last one's output: as in a model, a call of the engine is shared, and weights come from memory.",
                "Random routers have many near ties, and a token that rounding sends to another expert counts whole: "
                "so the errors of mixtures behind each",
                "other say little, and plans of like error are better looked up for one FFN alone.",
            ]
            if shape["layers"] > 1
            else []
        ),
        "",
        f"![Speed of each plan over the best dense plan]({result['image']})",
        "",
        "```",
        result["command"],
        "```",
        "",
    ]
    for title, header, rows in grids(result):
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += [""]
    for plan, reason in result["missing"].items():
        lines += [f"Not timed: `{plan}` ({reason}).", ""]
    return "\n".join(lines)


def figure(result: Mapping[str, Any]) -> Any:
    """Speed over the best dense plan with quartiles, a group an n."""
    groups = {
        f"n = {tokens}": {plan: Spread(row.speed, row.low, row.high) for plan, row in rows.items() if plan != "dense"}
        for tokens, rows in _by_tokens(result).items()
    }
    shape = result["shape"]
    title = f"SwiGLU, D {shape['width']}, F {shape['ffn_width']}, {shape['active']} of {shape['experts']} experts"
    panel = (title, groups, [result["bound"]] * len(groups))
    return bars([panel], hollow=result["dense"], ylabel="speed over best dense")


if __name__ == "__main__":
    sys.exit(main())
