"""Time one FFN: the fused experts operator beside the best dense plans, on random weights.

    python -m benchmarks.operator --shape 2048x5632 --tokens 1 4 16 128 1024

Rows `native*` are the operator of native/ as a mixture that routes by itself; `native* dense` is the same operator as a
dense FFN (one expert of the whole width), which shows what of a gain is the kernel's and what the mixture's. Plans are
timed in turn; ratios are medians of the ratios within a round, against the fastest dense plan of an engine (not
`native* dense`).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from ffn2moe.onnx.lower import quantize, quantize_weights
from ffn2moe.onnx.simplify import finish
from ffn2moe.runtime import native
from ffn2moe.runtime.export import session
from ffn2moe.runtime.plans import MASKED_LOGIT, MICROSOFT
from ffn2moe.runtime.quantise import BLOCK, quantize_blocks, swiglu_rows
from ffn2moe.runtime.selftest import MOE_ACTIVATIONS

DENSE = ("dense", "dense8", "dense4", "ov-dense", "ov-dense8")
SHORTEST_SAMPLE = 0.01  # seconds; faster plans are run several times for one sample


@dataclass(frozen=True)
class FFN:
    """Random weights of an FFN, dense, and its experts: neurons in order."""

    width: int
    ffn_width: int
    num_experts: int
    num_active: int
    gated: bool
    w_in_FD: np.ndarray
    w_gate_FD: np.ndarray | None
    w_out_DF: np.ndarray

    @classmethod
    def random(cls, width: int, ffn_width: int, num_experts: int, num_active: int, gated: bool) -> FFN:
        numbers = np.random.default_rng(0)

        def matrix(rows: int, columns: int) -> np.ndarray:
            return (numbers.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

        gate = matrix(ffn_width, width) if gated else None
        w_in, w_out = matrix(ffn_width, width), matrix(width, ffn_width)
        return cls(width, ffn_width, num_experts, num_active, gated, w_in, gate, w_out)

    @property
    def activation(self) -> str:
        return "silu" if self.gated else "gelu"

    def experts(self, count: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """w_in_EMD, w_gate_EMD and w_out_EDM."""
        E, M, D = count, self.ffn_width // count, self.width
        gate = None if self.w_gate_FD is None else self.w_gate_FD.reshape(E, M, D)
        return self.w_in_FD.reshape(E, M, D), gate, self.w_out_DF.reshape(D, E, M).transpose(1, 0, 2)


def _model(nodes: list, inputs: dict[str, tuple[int, list]], width: int, constants: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "ffn",
        [helper.make_tensor_value_info(name, *shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", width])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), (MICROSOFT, 1), ("ffn2moe", 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def dense_model(ffn: FFN, plan: str) -> bytes:
    """The dense FFN as ONNX; `dense8` and `dense4` by the passes of the export."""
    constants = {"in.weight": ffn.w_in_FD.T, "out.weight": ffn.w_out_DF.T}
    nodes = [helper.make_node("MatMul", ["x", "in.weight"], ["up"])]
    if ffn.w_gate_FD is not None:
        constants["gate.weight"] = ffn.w_gate_FD.T
        nodes += [
            helper.make_node("MatMul", ["x", "gate.weight"], ["gate"]),
            helper.make_node("Sigmoid", ["gate"], ["sigmoid"]),
            helper.make_node("Mul", ["gate", "sigmoid"], ["silu"]),
            helper.make_node("Mul", ["silu", "up"], ["h"]),
        ]
    else:
        nodes.append(helper.make_node("Gelu", ["up"], ["h"]))
    nodes.append(helper.make_node("MatMul", ["h", "out.weight"], ["y"]))
    x = {"x": (TensorProto.FLOAT, ["tokens", ffn.width])}
    model = _model(nodes, x, ffn.width, constants)
    if plan == "dense":
        return model
    graph = ir.from_proto(onnx.load_from_string(model))
    if plan == "dense8":
        quantize(graph)
    else:
        quantize_weights(graph, 4)
    finish(graph)
    return ir.to_proto(graph).SerializeToString()


def native_model(
    ffn: FFN, weights: native.Weights, num_experts: int, activations: native.Activations | None = None
) -> bytes:
    """The operator with a random router, which does not look at the heavy column; gates are 1."""
    w_in, w_gate, w_out = ffn.experts(num_experts)
    attributes = native.attributes(
        ffn.width,
        w_in.shape[1],
        gated=ffn.gated,
        activation=ffn.activation,
        weights=weights,
        activations=activations,
    )
    active = min(ffn.num_active, num_experts)
    attributes |= native.routed_attributes(num_experts, active, "unit")
    router_ED = np.random.default_rng(2).standard_normal((num_experts, ffn.width)).astype(np.float32)
    router_ED[:, 0] = 0
    constants = {
        "experts": native.pack_experts(weights, w_in, w_out, w_gate_EMD=w_gate),
        "frame": native.frame(router_ED, np.zeros(num_experts)),
    }
    node = helper.make_node(native.ROUTED_OP_TYPE, ["x", "experts", "frame"], ["y"], domain=native.DOMAIN, **attributes)
    return _model([node], {"x": (TensorProto.FLOAT, ["tokens", ffn.width])}, ffn.width, constants)


def qmoe_model(ffn: FFN) -> bytes:
    w_in, w_gate, w_out = ffn.experts(ffn.num_experts)
    fc1 = w_in if w_gate is None else swiglu_rows(w_gate, w_in)
    attributes = {"activation_type": MOE_ACTIVATIONS[ffn.activation]}
    if w_gate is not None:
        attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    (q1, s1), (q2, s2) = quantize_blocks(fc1, 8), quantize_blocks(w_out, 8)
    node = helper.make_node(
        "QMoE",
        ["x", "logits", "q1", "s1", "", "q2", "s2"],
        ["y"],
        domain=MICROSOFT,
        k=ffn.num_active,
        normalize_routing_weights=1,
        expert_weight_bits=8,
        block_size=BLOCK,
        **attributes,
    )
    inputs = {
        "x": (TensorProto.FLOAT, ["tokens", ffn.width]),
        "logits": (TensorProto.FLOAT, ["tokens", ffn.num_experts]),
    }
    return _model([node], inputs, ffn.width, {"q1": q1, "s1": s1, "q2": q2, "s2": s2})


Feed = dict[str, np.ndarray]
Run = Callable[[Feed], np.ndarray]


def on_onnxruntime(model: bytes, threads: int) -> Run:
    opened = session(model, threads=threads)
    return lambda feed: opened.run(None, feed)[0]


def on_openvino(model: bytes, threads: int, *, compressed: bool = False) -> Run:
    """A model in OpenVINO with the bfloat16 hint; `compressed`: its weights are made int8, activations as they run."""
    import openvino as ov

    core = ov.Core()
    if native.is_built():
        core.add_extension(native.library())
    graph = core.read_model(model)
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if compressed:
        _compress(graph)
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 1 << 20
    elif "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        options["INFERENCE_PRECISION_HINT"] = "bf16"
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    return lambda feed: request.infer(feed, share_inputs=True, share_outputs=True)[0]


def _compress(graph: object) -> None:
    from openvino import opset13 as opset

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        weight_KN = node.input_value(1).get_node().data
        scale_1N = np.abs(weight_KN).max(0, keepdims=True) / np.float32(127)
        steps = opset.constant(np.rint(weight_KN / scale_1N).astype(np.int8))
        weight = opset.multiply(opset.convert(steps, "f32"), opset.constant(scale_1N.astype(np.float32)))
        node.input(1).replace_source_output(weight.output(0))


def feeds(ffn: FFN, tokens: int) -> dict[str, Feed]:
    """The inputs of each kind of model: tokens with a heavy column; `qmoe8` is told experts drawn at random."""
    numbers = np.random.default_rng(1)
    x_TD = numbers.standard_normal((tokens, ffn.width)).astype(np.float32)
    x_TD[:, 0] *= 20
    E, K = ffn.num_experts, ffn.num_active
    chosen_TK = np.argsort(numbers.random((tokens, E)), axis=1)[:, :K]
    logits_TE = np.full((tokens, E), MASKED_LOGIT, dtype=np.float32)
    np.put_along_axis(logits_TE, chosen_TK, 0, axis=1)
    alone = {"x": x_TD}
    return {"dense": alone, "mixture": alone, "native dense": alone, "qmoe8": {"x": x_TD, "logits": logits_TE}}


def plans(ffn: FFN, threads: int, wanted: Sequence[str] | None) -> dict[str, tuple[str, Run]]:
    """Name -> (kind of its inputs, how to run it)."""

    def dense_openvino(compressed: bool) -> Run:
        return on_openvino(dense_model(ffn, "dense"), threads, compressed=compressed)

    makers: dict[str, tuple[str, Callable[[], Run]]] = {
        "dense": ("dense", lambda: on_onnxruntime(dense_model(ffn, "dense"), threads)),
        "dense8": ("dense", lambda: on_onnxruntime(dense_model(ffn, "dense8"), threads)),
        "dense4": ("dense", lambda: on_onnxruntime(dense_model(ffn, "dense4"), threads)),
        "ov-dense": ("dense", lambda: dense_openvino(False)),
        "ov-dense8": ("dense", lambda: dense_openvino(True)),
    }
    if ffn.ffn_width // ffn.num_experts % BLOCK == 0:
        makers["qmoe8"] = ("qmoe8", lambda: on_onnxruntime(qmoe_model(ffn), threads))
    for weights, activations, name in (
        ("bf16", "bf16", "native"),
        ("int8", "int16", "native8"),
        ("int8", "int8", "native8a8"),
        ("int4", "int8", "native4"),
    ):
        for kind, label, experts in (("mixture", name, ffn.num_experts), ("native dense", f"{name} dense", 1)):
            model = partial(native_model, ffn, weights, experts, activations)
            makers[label] = (kind, lambda model=model: on_openvino(model(), threads))
    return {name: (kind, make()) for name, (kind, make) in makers.items() if wanted is None or name in wanted}


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each plan in each round."""
    repeats = {}
    for name, run in runs.items():
        run()
        began = time.perf_counter()
        run()
        repeats[name] = max(1, round(SHORTEST_SAMPLE / (time.perf_counter() - began)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(sorted(runs), len(runs)):
            runs[name]()  # its weights come into the cache as far as they go
            began = time.perf_counter()
            for _ in range(repeats[name]):
                runs[name]()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, width=150)
    if not native.is_built():
        Console(stderr=True).print(f"error: the experts operator is not built: {native.REMEDY}")
        return 2
    lines = []
    for D, F in options.shape:
        if F % options.experts:
            Console(stderr=True).print(f"error: F = {F} is not a multiple of {options.experts} experts")
            return 2
        ffn = FFN.random(D, F, options.experts, options.active, gated=D >= 2048)
        ready = plans(ffn, options.threads, options.plans)
        flops = 2 * D * F * (3 if ffn.gated else 2)
        for tokens in options.tokens:
            fed = feeds(ffn, tokens)
            runs = {name: (lambda run=run, feed=fed[kind]: run(feed)) for name, (kind, run) in ready.items()}
            seconds = interleaved(runs, options.rounds)
            best = min((name for name in DENSE if name in seconds), key=lambda name: statistics.median(seconds[name]))
            table = Table(title=f"D {D}, F {F}, E {ffn.num_experts}, K {ffn.num_active}, {tokens} tokens")
            for column in ("plan", "ms (median)", "ms (least)", f"x {best}", "GFLOP/s done"):
                table.add_column(column, justify="left" if column == "plan" else "right")
            for name, times in seconds.items():
                share = 1 if ready[name][0] in ("dense", "native dense") else ffn.num_active / ffn.num_experts
                ratio = statistics.median(a / b for a, b in zip(seconds[best], times, strict=True))
                row = (
                    name,
                    f"{1000 * statistics.median(times):.3f}",
                    f"{1000 * min(times):.3f}",
                    f"{ratio:.2f}",
                    f"{tokens * flops * share / min(times) / 1e9:.0f}",
                )
                table.add_row(*row)
                lines.append((f"{D}/{F}", str(tokens), best, *row))
            console.print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(_page(options, lines), encoding="utf-8")
    return 0


def _page(options: argparse.Namespace, lines: Sequence[Sequence[str]]) -> str:
    head = ("D/F", "tokens", "best dense", "plan", "ms (median)", "ms (least)", "x best dense", "GFLOP/s done")
    shapes = " ".join(f"{D}x{F}" for D, F in options.shape)
    return "\n".join(
        [
            "# One FFN: the fused experts operator beside the best dense plans",
            "",
            f"`python -m benchmarks.operator --shape {shapes} --tokens {' '.join(map(str, options.tokens))} "
            f"--threads {options.threads} --rounds {options.rounds}`; E = {options.experts}, K = {options.active}, "
            f"{options.threads} thread(s) of {os.cpu_count()} processors.",
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", type=_shape, default=[(384, 1536), (2048, 5632)], help="D x F")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128, 1024, 4096])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plans", nargs="+", help="those only")
    parser.add_argument("--out", type=Path, help="also write a page")
    return parser


def _shape(text: str) -> tuple[int, int]:
    try:
        D, F = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxFFN_WIDTH, for example 384x1536") from None
    return D, F


if __name__ == "__main__":
    sys.exit(main())
