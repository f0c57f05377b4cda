"""Plot the kept quality against the cost of a token: a panel for each stage, and for each judge of the last stage."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.method import STAGE_TITLES, STAGES
from benchmarks.ablation.rows import FIGURES, means

COLOURS = {  # by Okabe and Ito: colour-blind readers can tell them apart
    "default": "#000000",
    "FactorLLM": "#D55E00",
    "partition": "#0072B2",
    "router start": "#56B4E9",
    "router objective": "#009E73",
    "reconstruction": "#A6761D",
    "gates": "#F0E442",
    "selection": "#CC79A7",
    "distillation": "#E69F00",
    "after conversion": "#8C6BB1",
    "baselines": "#888888",
}
MARKERS = {"default": "*", "FactorLLM": "X", "baselines": "s", "after conversion": "D"}
NAMES = {"default": "ours, as by default", "baselines": "other compressors"}
DODGE = 0.45  # octaves over which the groups of one share stand side by side


def draw(one: Mapping[str, Any], path: Path) -> None:
    """Draw the plot of a grid to a PNG file."""
    from matplotlib.figure import Figure

    rows = means(one)
    stages = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
    judges = [name for name in FIGURES if name in rows[0]["kept"] and name != "agreement"]
    panels = [[(STAGE_TITLES[stage], stage, None) for stage in stages]]
    if len(judges) > 1:
        panels.append([(f"{STAGE_TITLES[stages[-1]]}: {FIGURES[judge][0]}", stages[-1], judge) for judge in judges])
    figure = Figure(figsize=(14, 1.4 + 4 * len(panels)), layout="constrained", dpi=150)
    parts = figure.subfigures(len(panels), squeeze=False)[:, 0]
    for part, line in zip(parts, panels, strict=True):
        for axes, (title, stage, judge) in zip(part.subplots(1, len(line), squeeze=False)[0], line, strict=True):
            axes.set_title(title, fontsize=10)
            _panel(axes, [row for row in rows if row["stage"] == stage], judge)
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{one['model']}: share of the teacher that is kept, by the FLOPs of the FFNs that a token runs")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], judge: str | None) -> None:
    """Draw each row as a dot with its spread, the default as a line, and the best at each cost as a thin line.

    The dots of one share stand side by side, by group; their common cost is at the middle. Outliers stand at the edge.
    """
    quality = [_percents(row["quality"] if judge is None else row["kept"][judge]) for row in rows]
    cost = [100 * statistics.mean(row["cost"]["ffn_flops"]) for row in rows]
    highest = max(100.0, *(mean for mean, _ in quality))
    lowest = min(highest - 1, _lowest([mean for mean, _ in quality]))
    groups = [group for group in COLOURS if any(row["group"] == group for row in rows)]
    for place, group in enumerate(groups):
        default = group == "default"
        dodge = 1.0 if default else 2 ** (DODGE * (place / max(1, len(groups) - 1) - 0.5))
        own = [index for index, row in enumerate(rows) if row["group"] == group]
        axes.errorbar(
            [cost[index] * dodge for index in own],
            [max(lowest, quality[index][0]) for index in own],
            yerr=[quality[index][1] if quality[index][0] >= lowest else 0.0 for index in own],
            fmt=MARKERS.get(group, "o"),
            color=COLOURS[group],
            label=NAMES.get(group, group),
            markersize=13 if default else 6,
            markeredgecolor="black" if default else "white",
            markeredgewidth=0.5,
            elinewidth=1,
            zorder=5 if default else 3,
        )
    points = [(x, mean, row["group"]) for x, (mean, _), row in zip(cost, quality, rows, strict=True)]
    own = sorted((x, y) for x, y, group in points if group == "default")
    for line, colour in ((own, COLOURS["default"]), (_front([(x, y) for x, y, _ in points]), "#bbbbbb")):
        axes.plot([x for x, _ in line], [y for _, y in line], color=colour, linewidth=1.2, zorder=2)
    ticks = sorted({100 * row["share"] for row in rows})
    axes.axhline(100, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.7 * min(ticks), 1.9 * max(ticks))
    axes.set_ylim(lowest - 0.04 * (highest - lowest), highest + 0.06 * (highest - lowest))
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("FLOPs of FFNs and routers, % of the teacher's", fontsize=8.5)
    axes.set_ylabel("% of the teacher kept (outliers at the edge)", fontsize=8.5)


def _percents(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation in percent."""
    return 100 * statistics.mean(values), 100 * statistics.stdev(values) if len(values) > 1 else 0.0


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats at the same or a lower cost, by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _lowest(values: Sequence[float]) -> float:
    """Return the start of the axis. Outliers by Tukey's rule go to its edge, so that the others stay apart."""
    if len(values) < 4:
        return min(values)
    low, _, high = statistics.quantiles(values, n=4)
    return max(min(values), low - 1.5 * (high - low))
