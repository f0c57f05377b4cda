"""Show what `benchmarks.generation` measured: tables, and a plot of quality against speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.page import Grid, Page, about, some

LLAMA = "llama.cpp"
ENGINE_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
MARKERS: Mapping[str, str] = {"dense": "o", "pruned": "v", "mixture": "*"}
COLOURS = {LLAMA: "#d95f02", "ONNX Runtime": "#7570b3", "OpenVINO": "#1b9e77"}
PHASES = {"decode": "Decoding, tokens per second", "prefill": "Reading a prompt, tokens per second"}


@dataclass(frozen=True)
class Row:
    """One file at one number of threads, length of prompt and phase.

    Speeds are over the fastest dense file of the same bits, and over the fastest of all.
    """

    name: str
    threads: int
    prompt: int
    phase: str
    tokens_per_second: float
    same: str
    over_same: tuple[float, float, float]  # median and quartiles
    fastest: str
    over_fastest: tuple[float, float, float]
    rounds: int


def grids(result: Mapping[str, Any]) -> Iterator[Grid]:
    """Yield the tables of the page."""
    files = {one["name"]: one for one in result["files"]}
    best = min(one["perplexity"] for one in files.values() if one["role"] == "dense")
    rows = [Row(**row) for row in result["rows"]]
    cells = {(row.phase, row.threads, row.prompt, row.name): row for row in rows}
    shapes = list(dict.fromkeys((row.threads, row.prompt) for row in rows))
    columns = [f"{threads} x {prompt}" for threads, prompt in shapes]

    def about_file(name: str) -> list[str]:
        one = files[name]
        ratio = f"{one['perplexity']:.2f} ({one['perplexity'] / best:.3f}x)"
        return [name, one["engine"], f"{100 * one['active']:.0f} %", str(one["bits"]), ratio]

    header = ["file", "engine", "FFN active", "bits", "perplexity (of the best dense)", *columns]
    for phase, title in PHASES.items():
        found = {name: [cells[phase, *shape, name] for shape in shapes] for name in files}
        leading = [max(found, key=lambda name, at=at: found[name][at].tokens_per_second) for at in range(len(shapes))]
        table = []
        for name, across in found.items():
            figures = [f"{row.tokens_per_second:.1f}" for row in across]
            table.append(
                [*about_file(name), *(f"**{x}**" if leading[at] == name else x for at, x in enumerate(figures))]
            )
        yield Grid(title, header, table)
        for what in ("same", "fastest"):
            others = "the fastest dense file of the same bits" if what == "same" else "the fastest dense file"
            label = f"{'Decoding' if phase == 'decode' else 'Reading a prompt'}: speed over {others}"
            lines = [
                [name, *(_over(row, what) for row in across)]
                for name, across in found.items()
                if files[name]["role"] != "dense"
            ]
            if lines:
                yield Grid(label, ["file", *columns], lines)


def _over(row: Row, what: str) -> str:
    middle, low, high = row.over_same if what == "same" else row.over_fastest
    return f"{middle:.2f}x {row.same if what == 'same' else row.fastest} ({low:.2f} to {high:.2f})"


def page(result: Mapping[str, Any]) -> Page:
    """Return the page."""
    rounds = {row["rounds"] for row in result["rows"]}
    llama = f", {result['llama_cpp']}" if result["llama_cpp"] else ""
    return Page(
        "Language models: quality and speed of every file",
        [
            f"{about(result['machine'])}{llama}. {result['load']}",
            f"Columns are threads x tokens of the prompt; {result['tokens']} tokens are decoded after each, greedily. "
            f"Medians of {min(rounds)} interleaved rounds; a speed over another file is the median of the ratios in "
            "a round, with quartiles. Perplexity is that of the file's own quantised weights in its own engine, on "
            f"{result['judged']} tokens of {result['text']}, in blocks of {result['block']}.",
            "`ov-native` are our plans in OpenVINO with the operator, `qmoe` in ONNX Runtime; `dense4` and `dense8b` "
            "are the dense model with weights of 4 and 8 bits in blocks, `ov-dense4` and `ov-dense8b` the same in "
            "OpenVINO. GGUF files run in llama.cpp.",
        ],
        list(grids(result)),
        notes="\n\n".join(f"Not measured: `{name}` ({reason})." for name, reason in result["skipped"].items()),
        result=result,
        figure=lambda: figure(result),
    )


def figure(result: Mapping[str, Any]) -> Any:
    """Draw perplexity against decoding speed, on the fewest threads, after the prompt of middle length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    rows = [Row(**row) for row in result["rows"] if row["phase"] == "decode"]
    threads = min(row.threads for row in rows)
    prompts = sorted({row.prompt for row in rows})
    prompt = prompts[len(prompts) // 2]
    files = {one["name"]: one for one in result["files"]}
    drawn = Figure(figsize=(11, 7), layout="constrained")
    axes = drawn.add_subplot()
    labelled = set()
    shown = [row for row in rows if (row.threads, row.prompt) == (threads, prompt)]
    widest, beside = max(row.tokens_per_second for row in shown), 0
    for row in sorted(shown, key=lambda row: row.tokens_per_second):
        one = files[row.name]
        label = f"{one['role']}, {one['engine']}"
        axes.scatter(
            row.tokens_per_second,
            one["perplexity"],
            s=150 if one["role"] == "mixture" else 60,
            marker=MARKERS[one["role"]],
            color=COLOURS[one["engine"]],
            label=None if label in labelled else label,
        )
        labelled.add(label)
        crowded = any(
            0 < other.tokens_per_second - row.tokens_per_second < 0.15 * widest
            and abs(math.log(files[other.name]["perplexity"] / one["perplexity"])) < 0.05
            for other in shown
        )
        beside += crowded  # names to the left stand below and above their points in turns
        axes.annotate(
            row.name,
            (row.tokens_per_second, one["perplexity"]),
            ((-6, -10) if beside % 2 else (-6, 6)) if crowded else (5, 4),
            textcoords="offset points",
            ha="right" if crowded else "left",
            fontsize=7,
        )
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"tokens per second, {some(threads, 'thread')}, after {prompt} tokens")
    axes.set_ylabel("perplexity of the file")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return drawn
