"""Dense FFN and mixture side by side in PyTorch on a GPU, forward, and forward with backward.

    python -m benchmarks.gpu --out docs/results/gpu.md
    python -m benchmarks.gpu --device cpu --shapes 64x256 --tokens 32      # tries the code where there is no GPU

Ways to compute the same mixture: `loop` copies the tokens of each expert out and adds its outputs in, as models in
transformers do; `grouped` is this project's layer, of which `torch._grouped_mm` does the products on a GPU in bfloat16;
`triton` is a kernel of our own (benchmarks.triton_experts), forward alone. Every way is compared with a float32
reference before it is timed, and is not timed if it is wrong. With `--export`, the plans `dense` and `fused` of an
export are timed in ONNX Runtime on the same GPU.

Needs PyTorch alone. Where there is no GPU it says so and ends with exit code 2, as nothing was measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import util
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rounds import Ratio, in_turn, ratio
from ffn2moe.dense.ffn import ACTIVATIONS
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import FFNShape, MoESpec

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of an output or a gradient, relative
SHORTEST_SAMPLE = 0.005  # seconds; what is faster is run several times for one sample
MOST_CALLS = 200

Way = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device != "cpu" and not _there(options.device):
        print(f"no GPU: PyTorch {torch.__version__} finds no device {options.device!r} here, so nothing is measured")
        return 2
    device = torch.device(options.device)
    if device.index is not None:  # events and Triton's launches go to the current one
        torch.get_device_module(device).set_device(device)
    results = []
    for width, ffn_width, gated in options.shapes:
        moe = layer(width, ffn_width, gated, options)
        for tokens in options.tokens:
            for backward in (False, True):
                results.append(measure(moe, tokens, backward, options))
                print("\n".join(lines([results[-1]])), flush=True)
    found = {
        "device": _name(options.device),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "experts": options.experts,
        "active": options.active,
        "rows": results,
        "onnxruntime": exported(options) if options.export else [],
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options, found), encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"written to {options.out}")
    wrong = [f"{row['shape']} {row['tokens']} {way}" for row in results for way in row["wrong"]]
    if wrong:
        print(f"wrong, and so not timed: {', '.join(wrong)}")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or another that PyTorch knows; cpu to try it")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=[_shape("384x1536"), _shape("2048x5632g")], help="DxF, with g gated"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 4096, 16384])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--export", type=Path, help="an export whose plans are timed in ONNX Runtime, too")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/gpu.md")
    return parser


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


def _name(device: str) -> str:
    return "CPU" if device == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def layer(width: int, ffn_width: int, gated: bool, options: argparse.Namespace) -> MoEFFN:
    """A mixture with random weights and a random router."""
    if ffn_width % options.experts:
        raise SystemExit(f"{ffn_width} neurons do not make {options.experts} equal experts")
    activation = "silu" if gated else "gelu"
    shape = FFNShape("layers", 1, width, ffn_width, ffn_width // options.experts, 0, gated, activation)
    spec = MoESpec(
        family="llama" if gated else "bert",
        model_class="random",
        head="causal" if gated else "embedding",
        stacks=(shape,),
        num_experts=options.experts,
        num_active=options.active,
        gate="unit",
        router_bias=True,
        container=None,
        partition="contiguous",
        teacher="random weights",
        pooling=None if gated else "mean",
        max_length=512,
    )
    moe = MoEFFN(spec, b_in=not gated, b_out=not gated)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            if parameter.dim():
                parameter.copy_(parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape, generator=generator))
    return moe.to(options.device, getattr(torch, options.dtype)).eval()


def ways_of(moe: MoEFFN, backward: bool) -> dict[str, Way]:
    """The dense FFN, and each way to compute the mixture; all of them differentiable, or not, as asked."""
    found: dict[str, Way] = {"dense": dense(moe), "loop": lambda x_TD: loop(moe, x_TD), "grouped": moe}
    if not backward and util.find_spec("triton") and (moe.w_in.device.type != "cpu" or _interpreted(moe)):
        from benchmarks.triton_experts import routed

        found["triton"] = lambda x_TD: routed(moe, x_TD)
    return found


def _interpreted(moe: MoEFFN) -> bool:
    """Whether Triton's kernels run on the CPU here, as TRITON_INTERPRET asks; they take bfloat16 for integers there."""
    import triton

    return bool(triton.knobs.runtime.interpret) and moe.w_in.dtype == torch.float32


def dense(moe: MoEFFN) -> Way:
    """The dense FFN that the experts are a partition of, with weights of its own."""

    def flat(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked.detach().flatten(0, 1).clone().requires_grad_(True)

    w_in, b_in, w_gate = flat(moe.w_in), flat(moe.b_in), flat(moe.w_gate)
    w_out = moe.w_out.detach().transpose(0, 1).flatten(1).contiguous().requires_grad_(True)
    b_out = None if moe.b_out is None else moe.b_out.detach().clone().requires_grad_(True)
    act = ACTIVATIONS[moe.activation]
    assert w_in is not None

    def work(x_TD: Tensor) -> Tensor:
        h_TF = F.linear(x_TD, w_in, b_in)
        return F.linear(act(h_TF) if w_gate is None else act(F.linear(x_TD, w_gate)) * h_TF, w_out, b_out)

    return work


def loop(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """The mixture an expert after the other: its tokens copied out, its outputs added in."""
    scores_TE = moe.scores(x_TD)
    experts_TK = moe.router.choose(scores_TE, moe.num_active).experts_TK
    y_TD = torch.zeros_like(x_TD)
    for index in range(moe.num_experts):
        token, _ = (experts_TK == index).nonzero(as_tuple=True)
        y_TD = y_TD.index_add(0, token, moe.expert(index, x_TD[token]))
    return moe.finish(x_TD, y_TD)


def measure(moe: MoEFFN, tokens: int, backward: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of each way and its ratio to the dense FFN within rounds; and the ways that are wrong."""
    width, dtype = moe.w_in.shape[2], moe.w_in.dtype
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, width, generator=generator).to(options.device, dtype)
    gradient_TD = torch.randn(tokens, width, generator=generator).to(options.device, dtype)
    ways, wrong = ways_of(moe, backward), {}
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
        for _ in range(3):
            once(way)
        seconds = elapsed(lambda way=way: once(way), 1, options.device)
        calls = max(1, min(MOST_CALLS, round(SHORTEST_SAMPLE / seconds)))
        works[name] = lambda way=way, calls=calls: {
            "seconds": elapsed(lambda: once(way), calls, options.device) / calls
        }
    samples = {name: [row["seconds"] for row in rows] for name, rows in in_turn(works, options.rounds, 1).items()}
    return {
        "shape": f"{width} x {moe.num_experts * moe.w_in.shape[1]}",
        "tokens": tokens,
        "pass": "forward + backward" if backward else "forward",
        "milliseconds": {name: 1000 * median(each) for name, each in samples.items()},
        "speedup": {name: asdict(ratio(samples["dense"], each)) for name, each in samples.items()},
        "wrong": wrong,
    }


def errors(moe: MoEFFN, ways: dict[str, Way], x_TD: Tensor, gradient_TD: Tensor | None) -> dict[str, float]:
    """How far each way is from the float32 reference, relative: its output, and with a gradient that of x and w_in.

    The dense FFN is judged by all experts together.
    """
    exact = copy.deepcopy(moe).float()
    whole = copy.deepcopy(exact)
    whole.use_all_experts()
    found = {}
    for name, way in ways.items():
        judge = whole if name == "dense" else exact
        wanted = _results(judge.reference, x_TD.float(), gradient_TD, judge.w_in)
        # The dense way has weights of its own, whose gradient is not asked for.
        told = _results(way, x_TD, gradient_TD, None if name == "dense" else moe.w_in)
        found[name] = max(
            ((a.float() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(told, wanted, strict=False)
        )
    moe.zero_grad()
    return found


def _results(way: Way, x_TD: Tensor, gradient_TD: Tensor | None, weight: Tensor | None) -> list[Tensor]:
    """Output, and with a gradient those of the input and of the weight."""
    if gradient_TD is None:
        with torch.no_grad():
            return [way(x_TD)]
    x_TD = x_TD.detach().clone().requires_grad_(True)
    y_TD = way(x_TD)
    asked = [x_TD] if weight is None else [x_TD, weight]
    return [y_TD.detach(), *torch.autograd.grad(y_TD, asked, gradient_TD.to(y_TD.dtype))]


def elapsed(work: Callable[[], None], calls: int, device: str) -> float:
    """Seconds of so many calls: by the device's own events, where it has them."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - start
    module = torch.get_device_module(device)
    first, last = (module.Event(enable_timing=True) for _ in range(2))
    module.synchronize()
    first.record()
    for _ in range(calls):
        work()
    last.record()
    module.synchronize()
    return float(first.elapsed_time(last)) / 1000


def exported(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The plans `dense` and `fused` of an export in ONNX Runtime on the GPU: milliseconds of a batch, end to end."""
    import numpy as np
    import onnxruntime

    from ffn2moe.runtime.export import open_export

    provider = "CPUExecutionProvider" if options.device == "cpu" else "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        print(f"ONNX Runtime has no {provider} here: it has {', '.join(onnxruntime.get_available_providers())}")
        return []
    try:
        exports = {plan: open_export(options.export, plan, 1, [provider]) for plan in ("dense", "fused")}
    except (ValueError, RuntimeError) as reason:  # the provider does not start, or its operator fails its test
        print(f"not timed in ONNX Runtime: {reason}")
        return []
    rows = []
    for batch, sequence in ((1, 16), (1, 128), (32, 128)):
        ids = np.random.default_rng(0).integers(1000, 20000, (batch, sequence))

        def timed(export: Any, ids: np.ndarray = ids) -> dict[str, float]:
            start = time.perf_counter()
            export.run(ids, np.ones_like(ids))
            return {"seconds": time.perf_counter() - start}

        found = in_turn({plan: lambda e=export: timed(e) for plan, export in exports.items()}, options.rounds)
        samples = {plan: [row["seconds"] for row in told] for plan, told in found.items()}
        rows.append(
            {
                "batch": batch,
                "sequence": sequence,
                "milliseconds": {plan: 1000 * median(each) for plan, each in samples.items()},
                "speedup": {plan: asdict(ratio(samples["dense"], each)) for plan, each in samples.items()},
            }
        )
    return rows


def lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table for each way: milliseconds, and how many times as fast as the dense FFN."""
    return [
        f"| {row['shape']} | {row['tokens']} | {row['pass']} | {name} | {milliseconds:.3f} ms | "
        f"{Ratio(**row['speedup'][name])} |"
        for row in results
        for name, milliseconds in row["milliseconds"].items()
    ]


def page(options: argparse.Namespace, found: dict[str, Any]) -> str:
    """The table as Markdown, under the command that made it."""
    shapes = " ".join(f"{width}x{ffn_width}{'g' * gated}" for width, ffn_width, gated in options.shapes)
    command = f"python -m benchmarks.gpu --device {options.device} --dtype {options.dtype} --shapes {shapes}"
    command += f" --tokens {' '.join(map(str, options.tokens))} --experts {options.experts} --active {options.active}"
    command += f" --rounds {options.rounds}{' --export EXPORT' if options.export else ''} --out docs/results/gpu.md"
    text = [
        "# Dense FFN and mixture on a GPU",
        "",
        f"{found['device']}, torch {found['torch']}, {found['dtype']}; {options.active} of {options.experts} experts "
        f"active, so that the products alone would make {options.experts / options.active:.1f}x.",
        "Router and layout included. Medians by the device's events; speed over the dense FFN within rounds, and what "
        "half of the rounds lie between.",
        "",
        "```",
        command,
        "```",
        "",
        "| D x F | tokens | pass | way | time | speed over dense |",
        "|---|---|---|---|---|---|",
        *lines(found["rows"]),
        "",
    ]
    if found["onnxruntime"]:
        text += [
            "In ONNX Runtime, end to end:",
            "",
            "| batch x length | plan | time | speed over dense |",
            "|---|---|---|---|",
        ]
        text += [
            f"| {row['batch']} x {row['sequence']} | {plan} | {told:.2f} ms | {Ratio(**row['speedup'][plan])} |"
            for row in found["onnxruntime"]
            for plan, told in row["milliseconds"].items()
        ]
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
