"""Profile plans: the time by kind of work, and the nodes that take most.

    python -m benchmarks.profile models/exported --plans dense8 sorted8 ov-dense ov-sorted --shapes 1x128 32x128 \\
        --texts data/corpus/evaluation.jsonl --out docs/results/profile.md

The times come from the profiler of ONNX Runtime and from the performance counts of OpenVINO. The time of a node is its
median over the runs; `between nodes` is the rest of a run. Both engines fuse nodes first: a fused node counts as the
kind of its product. The node of a native plan also holds the router and the norms of its layer. A profiled run is some
microseconds a node slower than others.
"""

from __future__ import annotations

import argparse
import json
import re
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

from benchmarks.page import Grid, Page, about, add_texts, parser_of, read_texts, report, rounds_of, shape_of, some
from benchmarks.race import FEWEST_ROUNDS
from ffn2moe.planning import timing
from ffn2moe.runtime.engines.openvino import OpenVinoGraph
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import checked_files, read_manifest
from ffn2moe.runtime.plans import library_of, plan_of

LONGEST = 2.0  # seconds of runs for a plan and shape
MOST_RUNS = 100
BETWEEN = "between nodes"
# Kind of work -> its ops in ONNX, ONNX Runtime and OpenVINO. The names of products say whether they belong to an FFN,
# an attention or a router (`kind_of`).
KINDS = {
    "products": "Gemm MatMul FusedMatMul FusedGemm MatMulNBits MatMulInteger MatMulIntegerToFloat FullyConnected "
    "DynamicQuantizeMatMul MoE QMoE Experts Reference",  # the last one: an extension's
    "attention": "Attention MultiHeadAttention GroupQueryAttention ScaledDotProductAttention SDPA",
    "activations": "Gelu Relu Sigmoid Silu Swish QuickGelu BiasGelu FastGelu Tanh Erf",
    "norms and residuals": "LayerNormalization SkipLayerNormalization RMSNormalization Add MVN RMS LayerNorm Eltwise "
    "Subgraph Mul Multiply Div Sub Reduce ReduceL2",
    "routing": "TopK ScatterElements NonZero OneHot CumSum ArgMax GatherElements ConstantOfShape ScatterElementsUpdate "
    "Range Compress GreaterOrEqual Where Softmax ReduceSum Size",
    "gathering": "Gather Split VariadicSplit Concat Concatenation ScatterND ScatterNDUpdate",
    "quantising": "DynamicQuantizeLinear QuantizeLinear DequantizeLinear FakeQuantize Convert Cast",
    "layout": "Reshape Transpose Reorder Unsqueeze Squeeze Expand Broadcast Shape ShapeOf",
}
_KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops.split()}


@dataclass(frozen=True)
class Node:
    """Hold a node of an open graph and its microseconds in a run."""

    name: str  # the name of its first weight, if any: engines rename fused nodes
    op: str
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """Hold one plan at one shape."""

    plan: str
    batch: int
    sequence: int
    runs: int
    microseconds: float  # a whole run
    nodes: Sequence[Node]

    def by_kind(self) -> dict[str, tuple[float, int]]:
        """Return microseconds and nodes of each kind of work, largest first."""
        spent: dict[str, list[float]] = defaultdict(list)
        for node in self.nodes:
            spent[kind_of(node)].append(node.microseconds)
        found = {kind: (sum(times), len(times)) for kind, times in spent.items()}
        found[BETWEEN] = (max(0.0, self.microseconds - sum(node.microseconds for node in self.nodes)), 0)
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.profile", __doc__)
    parser.add_argument("export", type=Path, help="the export, for example models/exported, which has every plan")
    parser.add_argument("--plans", nargs="+", default=["dense8", "sorted8"])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(1, 128)], help="batch x sequence: 1x16 32x128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--top", type=int, default=8, help="nodes to show of each plan")
    add_texts(parser)
    return report(parser, lambda options, console: page(options, measure(options, console)), arguments)


def measure(options: argparse.Namespace, console: Console) -> list[Profile]:
    """Return a profile for each plan and shape."""
    manifest = read_manifest(options.export)
    texts = read_texts(options.texts)
    if manifest["spec"]["head"] in ("causal", "seq2seq"):
        raise ValueError(
            f"{options.export} decodes, and this profile cannot feed the cache of its graphs: name another export"
        )
    for plan in options.plans:  # raises if the plan is missing or cannot run here
        open_export(options.export, plan, options.threads)
    reader = open_export(options.export, "dense", options.threads)
    found = []
    with rounds_of(console) as track:
        for plan in options.plans:
            file = checked_files(options.export, manifest["plans"][plan])[0]
            for batch, sequence in options.shapes:
                batches = timing.full_batches(reader, texts, batch, sequence)
                inputs = [{"input_ids": ids_BL, "attention_mask": mask_BL} for ids_BL, mask_BL in batches]
                label = f"{plan}, {batch} x {sequence}"
                profiled = _openvino if plan_of(plan).engine == "openvino" else _onnxruntime
                runs, whole, nodes = profiled(file, plan, options.threads, inputs, partial(track, label))
                found.append(Profile(plan, batch, sequence, runs, whole, nodes))
    return found


Inputs = Sequence[Mapping[str, np.ndarray]]
Profiled = tuple[int, float, list[Node]]  # runs, microseconds of one, its nodes


def _runs(seconds: float) -> int:
    return max(FEWEST_ROUNDS, min(MOST_RUNS, int(LONGEST / max(seconds, 1e-9))))


def _onnxruntime(
    file: Path, plan: str, threads: int, inputs: Inputs, track: Callable[[range], Iterator[int]]
) -> Profiled:
    """Profile a plan by the file that the profiler of ONNX Runtime writes."""
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
    """Return for each node that multiplies by a constant matrix the name of that matrix."""
    import onnx_ir as ir

    graph = ir.load(file).graph
    return {
        node.name: value.name
        for node in graph
        if _KIND_OF.get(node.op_type) == "products"
        for value in list(node.inputs)[::-1]
        if node.name and value is not None and value.name and value.is_initializer() and len(value.shape or ()) > 1
    }


def _openvino(file: Path, plan: str, threads: int, inputs: Inputs, track: Callable[[range], Iterator[int]]) -> Profiled:
    """Profile a plan by the performance counts of OpenVINO after each run."""
    request = OpenVinoGraph(file, threads=threads, extension=library_of(plan_of(plan))).profiled()
    for sample in inputs:  # OpenVINO compiles for a number of rows of an expert when it first sees it
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


def kind_of(node: Node) -> str:
    """Return the kind of work of a node: by its place in the model for products, else by its op."""
    if node.name.startswith("ScaledDotProductAttention"):  # OpenVINO's fused attention, or the operator's
        return "attention"
    kind = _KIND_OF.get(node.op, "other")
    if kind != "products":
        return kind
    if re.search(r"router", node.name):
        return "routing"
    if node.op in ("MoE", "QMoE", "RoutedExperts", "Reference") or re.search(
        r"experts|\.moe\b|mlp|ffn|intermediate", node.name
    ):
        return "FFN products"
    if re.search(r"attention|attn|query|key|value|[qkvo]_proj", node.name):
        return "attention's products"
    return "FFN products" if re.search(r"output\.dense|fc[12]|lin[12]|\bw[io]\b", node.name) else "other products"


def grids(profiles: Sequence[Profile], top: int) -> Iterator[Grid]:
    """Yield a table for each shape with its plans side by side, then the `top` nodes of each profile."""
    for shape in dict.fromkeys((profile.batch, profile.sequence) for profile in profiles):
        here = [profile for profile in profiles if (profile.batch, profile.sequence) == shape]
        kinds = [profile.by_kind() for profile in here]
        most: dict[str, float] = defaultdict(float)
        for found in kinds:
            for kind, (spent, _) in found.items():
                most[kind] = max(most[kind], spent)
        rows = [
            [kind, *(_cell(found.get(kind), profile) for found, profile in zip(kinds, here, strict=True))]
            for kind in sorted(most, key=lambda kind: -most[kind])
        ]
        rows.append(["in all", *(f"{profile.microseconds:.0f}, {len(profile.nodes)}" for profile in here)])
        title = f"{shape[0]} x {shape[1]}: microseconds (share), nodes"
        yield Grid(title, ["work", *(profile.plan for profile in here)], rows)
    for profile in profiles if top else ():
        nodes = sorted(profile.nodes, key=lambda node: -node.microseconds)[:top]
        rows = [[node.name, node.op, f"{node.microseconds:.0f}"] for node in nodes]
        title = f"Top nodes: {profile.plan}, {profile.batch} x {profile.sequence}"
        yield Grid(title, ["node", "op", "microseconds"], rows)


def _cell(found: tuple[float, int] | None, profile: Profile) -> str:
    if found is None:
        return ""
    spent, count = found
    return f"{spent:.0f} ({100 * spent / profile.microseconds:.0f} %), {count}"


def page(options: argparse.Namespace, profiles: Sequence[Profile]) -> Page:
    """Return the page."""
    runs = [profile.runs for profile in profiles]
    return Page(
        "Where the time goes",
        [
            f"`{options.export.name}`, {some(options.threads, 'thread')}, medians over {min(runs)} to {max(runs)} "
            f"runs. {about()}.",
            "The times come from ONNX Runtime's profiler and OpenVINO's performance counts. A fused node counts as the "
            f"kind of its product; `{BETWEEN}` is the rest of a run. A profiled run is slower.",
        ],
        list(grids(profiles, options.top)),
    )


if __name__ == "__main__":
    sys.exit(main())
