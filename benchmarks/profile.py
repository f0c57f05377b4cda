"""Where the time of a plan goes: by kind of work, and the nodes that take most.

    python -m benchmarks.profile exports/minilm --plans dense8 sorted8 ov-dense ov-sorted --shapes 1x128 32x128 \\
        --texts data/corpus/evaluation.jsonl --out docs/results/profile.md

Times are those of ONNX Runtime's profiler and of OpenVINO's performance counts: a node's is its median over the runs,
and what a run takes beyond its nodes is `between nodes`. Both engines fuse nodes first; a fused one counts as what its
product is, and so does the node of a native plan, which holds a layer's router and norms as well. Profiled runs are
slower than others by some microseconds a node.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.inference import DEFAULT_TEXTS, read_texts, shape_of
from benchmarks.race import FEWEST_ROUNDS
from benchmarks.show import Rounds, about, complain
from ffn2moe.planning import timing
from ffn2moe.runtime.engines import openvino, openvino_precision
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import checked_files, read_manifest
from ffn2moe.runtime.plans import engine_of, form_of

LONGEST = 2.0  # seconds of runs for one plan and shape
MOST_RUNS = 100
BETWEEN = "between nodes"
# Kind of work -> the ops that it is, of ONNX, ONNX Runtime and OpenVINO. Products that belong to an FFN, an attention
# or a router are told apart by their names first (`_kind`).
KINDS: dict[str, tuple[str, ...]] = {
    "products": (
        *("Gemm", "MatMul", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat"),
        *("DynamicQuantizeMatMul", "FullyConnected", "MoE", "QMoE", "Experts", "Reference"),  # the last: an extension's
    ),
    "attention": ("Attention", "MultiHeadAttention", "GroupQueryAttention", "ScaledDotProductAttention", "SDPA"),
    "activations": ("Gelu", "Relu", "Sigmoid", "Silu", "Swish", "QuickGelu", "BiasGelu", "FastGelu", "Tanh", "Erf"),
    "norms and residuals": (
        *("LayerNormalization", "SkipLayerNormalization", "RMSNormalization", "Add", "MVN", "RMS", "LayerNorm"),
        *("Eltwise", "Subgraph", "Mul", "Multiply", "Div", "Sub", "Reduce", "ReduceL2"),
    ),
    "routing": (
        *("TopK", "ScatterElements", "NonZero", "OneHot", "CumSum", "ArgMax", "GatherElements", "ConstantOfShape"),
        *("ScatterElementsUpdate", "Range", "Compress", "GreaterOrEqual", "Where", "Softmax", "ReduceSum", "Size"),
    ),
    "gathering": ("Gather", "Split", "VariadicSplit", "Concat", "Concatenation", "ScatterND", "ScatterNDUpdate"),
    "quantising": ("DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Convert", "Cast"),
    "layout": ("Reshape", "Transpose", "Reorder", "Unsqueeze", "Squeeze", "Expand", "Broadcast", "Shape", "ShapeOf"),
}
_KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops}


@dataclass(frozen=True)
class Node:
    """One node of an open graph, and the microseconds that it takes in a run."""

    name: str  # of its first weight where it has one: engines rename nodes that they fuse
    op: str
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """One plan at one shape."""

    plan: str
    batch: int
    sequence: int
    runs: int
    microseconds: float  # of a whole run
    nodes: Sequence[Node]

    def by_kind(self) -> dict[str, tuple[float, int]]:
        """Microseconds and nodes of each kind of work, most first."""
        spent: dict[str, list[float]] = defaultdict(list)
        for node in self.nodes:
            spent[kind_of(node)].append(node.microseconds)
        found = {kind: (sum(times), len(times)) for kind, times in spent.items()}
        found[BETWEEN] = (max(0.0, self.microseconds - sum(node.microseconds for node in self.nodes)), 0)
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        profiles = measure(options, console)
    except (ValueError, OSError, RuntimeError) as error:
        return complain(error)
    for title, header, rows in grids(profiles):
        shown = Table(title=title, title_justify="left")
        for column in header:
            shown.add_column(column, justify="left" if column in ("work", "node", "op") else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(about())
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options, profiles), encoding="utf-8")
        console.print(f"written to {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="the export, for example exports/minilm")
    parser.add_argument("--plans", nargs="+", default=["dense8", "sorted8"])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(1, 128)], help="batch x sequence: 1x16 32x128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--top", type=int, default=8, help="nodes to show")
    parser.add_argument("--texts", type=Path, default=DEFAULT_TEXTS, help="JSON lines with a text each, or plain lines")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/profile.md")
    return parser


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, console: Console) -> list[Profile]:
    manifest = read_manifest(options.export)
    texts = read_texts(options.texts)
    if manifest["spec"]["head"] in ("causal", "seq2seq"):
        raise ValueError(f"{options.export} decodes: its graphs take a cache, which this profile has none of")
    for plan in options.plans:  # refuses what is not there, or cannot run here
        open_export(options.export, plan, options.threads)
    reader = open_export(options.export, "dense", options.threads)
    found = []
    with Rounds(console, len(options.plans) * len(options.shapes)) as rounds:
        for plan in options.plans:
            file = checked_files(options.export, manifest["plans"][plan])[0]
            for batch, sequence in options.shapes:
                batches = timing.full_batches(reader, texts, batch, sequence)
                inputs = [{"input_ids": ids_BL, "attention_mask": mask_BL} for ids_BL, mask_BL in batches]
                label = f"{plan}, {batch} x {sequence}"
                profiled = _openvino if engine_of(plan) == "openvino" else _onnxruntime
                runs, whole, nodes = profiled(file, plan, options.threads, inputs, partial(rounds.track, label))
                found.append(Profile(plan, batch, sequence, runs, whole, nodes))
    return found


Inputs = Sequence[Mapping[str, np.ndarray]]
Told = tuple[int, float, list[Node]]  # runs, microseconds of one, its nodes


def _runs(seconds: float) -> int:
    return max(FEWEST_ROUNDS, min(MOST_RUNS, int(LONGEST / max(seconds, 1e-9))))


def _onnxruntime(file: Path, plan: str, threads: int, inputs: Inputs, track: Callable[[range], Iterator[int]]) -> Told:
    """By ONNX Runtime's profiler, from the file that it writes."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "profile")
        settings.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        opened = ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        known = {value.name for value in opened.get_inputs()}
        fed = [{name: value for name, value in sample.items() if name in known} for sample in inputs]
        opened.run(None, fed[0])
        start = time.perf_counter()
        opened.run(None, fed[0])
        runs = _runs(time.perf_counter() - start)
        for index in track(range(runs)):
            opened.run(None, fed[index % len(fed)])
        events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
        names = _weights(Path(settings.optimized_model_filepath))
    whole = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])[-runs:]
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= whole[0]["ts"]:
            times[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"])
    nodes = [Node(names.get(name, name), op, median(spent)) for (name, op), spent in times.items()]
    return runs, median(event["dur"] for event in whole), nodes


def _weights(file: Path) -> dict[str, str]:
    """Of each node that multiplies by a constant matrix, that matrix's name."""
    import onnx_ir as ir

    graph = ir.load(file).graph
    return {
        node.name: value.name
        for node in graph
        if _KIND_OF.get(node.op_type) == "products"
        for value in list(node.inputs)[::-1]
        if node.name and value is not None and value.name and value.is_initializer() and len(value.shape or ()) > 1
    }


def _openvino(file: Path, plan: str, threads: int, inputs: Inputs, track: Callable[[range], Iterator[int]]) -> Told:
    """By OpenVINO's performance counts, after each run."""
    ov = openvino()
    core = ov.Core()
    if form_of(plan).startswith("ov-native"):
        from ffn2moe.runtime import native

        core.add_extension(str(native.library()))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[openvino_precision()],
        "PERF_COUNT": True,
    }
    request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    for sample in inputs:  # each number of rows that an expert gets is compiled when it is first seen
        request.infer(dict(sample))
    start = time.perf_counter()
    request.infer(dict(inputs[0]))
    runs = _runs(time.perf_counter() - start)
    whole, times = [], defaultdict(list)
    for index in track(range(runs)):
        start = time.perf_counter()
        request.infer(dict(inputs[index % len(inputs)]))
        whole.append(1e6 * (time.perf_counter() - start))
        for count in request.get_profiling_info():
            if "EXECUTED" in str(count.status):
                times[count.node_name, count.node_type].append(count.real_time.total_seconds() * 1e6)
    nodes = [Node(name, op, median(spent)) for (name, op), spent in times.items()]
    return runs, median(whole), nodes


# --- telling --------------------------------------------------------------------------------------------------------


def kind_of(node: Node) -> str:
    """The kind of work of a node: products by where they are in the model, others by their op."""
    if node.op == "Subgraph" and node.name.startswith("ScaledDotProductAttention"):  # OpenVINO's fused attention
        return "attention"
    kind = _KIND_OF.get(node.op, "other")
    if kind != "products":
        return kind
    if re.search(r"router", node.name):
        return "routing"
    if node.op in ("MoE", "QMoE", "Experts", "Reference") or re.search(
        r"experts|\.moe\b|mlp|ffn|intermediate", node.name
    ):
        return "FFN products"
    if re.search(r"attention|attn|query|key|value|[qkvo]_proj", node.name):
        return "attention's products"
    return "FFN products" if re.search(r"output\.dense|fc[12]|lin[12]|\bw[io]\b", node.name) else "other products"


def grids(profiles: Sequence[Profile]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table: the plans of a shape side by side, then the top nodes of each."""
    for shape in dict.fromkeys((profile.batch, profile.sequence) for profile in profiles):
        here = [profile for profile in profiles if (profile.batch, profile.sequence) == shape]
        kinds = [profile.by_kind() for profile in here]
        most: dict[str, float] = defaultdict(float)
        for found in kinds:
            for kind, (spent, _) in found.items():
                most[kind] = max(most[kind], spent)
        rows = [
            [
                kind,
                *(
                    f"{found[kind][0]:.0f} ({100 * found[kind][0] / profile.microseconds:.0f} %), {found[kind][1]}"
                    if kind in found
                    else ""
                    for found, profile in zip(kinds, here, strict=True)
                ),
            ]
            for kind in sorted(most, key=lambda kind: -most[kind])
        ]
        rows.append(["in all", *(f"{profile.microseconds:.0f}, {len(profile.nodes)}" for profile in here)])
        title = f"{shape[0]} x {shape[1]}: microseconds (share), nodes"
        yield title, ["work", *(profile.plan for profile in here)], rows


def top_nodes(profile: Profile, count: int) -> list[list[str]]:
    found = sorted(profile.nodes, key=lambda node: -node.microseconds)[:count]
    return [[node.name, node.op, f"{node.microseconds:.0f}"] for node in found]


def page(options: argparse.Namespace, profiles: Sequence[Profile]) -> str:
    """The tables as Markdown, under the command that made them."""
    words = ["python -m benchmarks.profile", str(options.export), "--plans", *options.plans, "--shapes"]
    words += [f"{batch}x{sequence}" for batch, sequence in options.shapes]
    words += ["--threads", str(options.threads), "--texts", shlex.quote(str(options.texts)), "--out", str(options.out)]
    runs = [profile.runs for profile in profiles]
    lines = [
        "# Where the time goes",
        "",
        f"`{options.export.name}`, {options.threads} {'thread' if options.threads == 1 else 'threads'}, medians over "
        f"{min(runs)} to {max(runs)} runs. {about()}.",
        "",
        "From ONNX Runtime's profiler and OpenVINO's performance counts; a fused node counts as what its product is, "
        f"and `{BETWEEN}`",
        "is what a run takes beyond its nodes. Profiled runs are slower than others by some microseconds a node.",
        "",
        "```",
        " ".join(words),
        "```",
        "",
    ]
    for title, header, rows in grids(profiles):
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += [""]
    for profile in profiles:
        lines += [f"## Top nodes: {profile.plan}, {profile.batch} x {profile.sequence}", ""]
        lines += ["| node | op | microseconds |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in top_nodes(profile, options.top)]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
