"""Plot the kept quality against the cost of a token: one panel for each stage, and for each judge once distilled."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


DODGE = 0.45  # octaves over which the groups of one share stand side by side


@dataclass(frozen=True)
class Point:
    """A row in a panel."""

    x: float
    y: float
    spread: float
    group: str
    title: str
    share: float


def draw(one: Mapping[str, Any], path: Path) -> None:
    """Draw the plot of a grid to a PNG file."""
    from matplotlib.figure import Figure

    rows = means(one)
    stages = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
    last = stages[-1]
    judges = [name for name in FIGURES if name in rows[0]["kept"] and name != "agreement"]
    figure = Figure(figsize=(14, 9.4 if len(judges) > 1 else 5.4), layout="constrained", dpi=150)
    places = figure.add_gridspec(2 if len(judges) > 1 else 1, 12, height_ratios=(5, 4) if len(judges) > 1 else None)
    for index, stage in enumerate(stages):
        wide = 12 // len(stages)
        axes = figure.add_subplot(places[0, wide * index : wide * (index + 1)])
        _panel(axes, STAGE_TITLES[stage], [row for row in rows if row["stage"] == stage], None)
    for index, judge in enumerate(judges if len(judges) > 1 else ()):
        wide = 12 // len(judges)
        axes = figure.add_subplot(places[1, wide * index : wide * (index + 1)])
        title = f"{STAGE_TITLES[last]}: {FIGURES[judge][0]}"
        _panel(axes, title, [row for row in rows if row["stage"] == last], judge)
    shown = [group for group in COLOURS if any(row["group"] == group for row in rows)]
    names = {"default": "ours, as by default", "baselines": "other compressors"}
    handles = [
        figure.axes[0].plot(
            [], [], MARKERS.get(group, "o"), color=COLOURS[group], markersize=9, label=names.get(group, group)
        )[0]
        for group in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(shown)), frameon=False)
    figure.suptitle(
        f"{one['model']}: share of the teacher that is kept, by the FLOPs of the FFNs that a token runs", fontsize=12
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _panel(axes: Any, title: str, rows: Sequence[Mapping[str, Any]], judge: str | None) -> None:
    """Draw each row as a dot with its spread, the default as a line, and the best at each cost as a thin line.

    The dots of one share stand side by side, by group; their common cost is at the middle.
    """
    points = [_point(row, judge) for row in rows]
    highest = max(100.0, *(point.y for point in points))
    lowest = min(highest - 1, _lowest([point.y for point in points]))
    height = highest - lowest
    groups = [group for group in COLOURS if any(point.group == group for point in points)]
    for place, group in enumerate(groups):
        dodge = 1.0 if group == "default" else 2 ** (DODGE * (place / max(1, len(groups) - 1) - 0.5))
        own = [point for point in points if point.group == group]
        _dots(axes, group, own, dodge, lowest, named=judge is None)
    _line(axes, [(point.x, point.y) for point in points if point.group == "default"], COLOURS["default"])
    _line(axes, _front([(point.x, point.y) for point in points]), "#bbbbbb")
    if judge is None:
        _name_the_best(axes, points)
    axes.axhline(100, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    ticks = sorted({100 * point.share for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0.7 * min(ticks), 1.9 * max(ticks))
    axes.minorticks_off()
    axes.set_ylim(lowest - 0.04 * height, highest + 0.06 * height)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("FLOPs of FFNs and routers, % of the teacher's", fontsize=8.5)
    axes.set_ylabel("% of the teacher kept", fontsize=8.5)
    axes.tick_params(labelsize=8.5)


def _point(row: Mapping[str, Any], judge: str | None) -> Point:
    """Return a row as a point: the mean over the judges, or one judge."""
    values = row["quality"] if judge is None else row["kept"][judge]
    spread = 100 * statistics.stdev(values) if len(values) > 1 else 0.0
    cost = 100 * statistics.mean(row["cost"]["ffn_flops"])
    return Point(cost, 100 * statistics.mean(values), spread, row["group"], row["title"], row["share"])


def _dots(axes: Any, group: str, own: Sequence[Point], dodge: float, lowest: float, *, named: bool) -> None:
    """Draw the points of a group; mark those below the axis at its edge, with their names if `named`."""
    default = group == "default"
    seen = [point for point in own if point.y >= lowest]
    style = {"color": COLOURS[group], "markeredgecolor": "black" if default else "white", "markeredgewidth": 0.5}
    axes.errorbar(
        [point.x * dodge for point in seen],
        [point.y for point in seen],
        yerr=[point.spread for point in seen],
        fmt=MARKERS.get(group, "o"),
        markersize=13 if default else 8 if group == "FactorLLM" else 6,
        elinewidth=1,
        zorder=5 if default else 3,
        **style,
    )
    for share in sorted({point.share for point in own}):
        below = [point for point in own if point.share == share and point.y < lowest]
        if not below:
            continue
        x = below[0].x * dodge
        axes.plot(x, lowest, "v", markersize=6, clip_on=False, zorder=4, **style)
        if named:
            values = ", ".join(f"{point.y:.0f}" for point in below)
            label = f"{below[0].title if len(below) == 1 else group} {values}"
            style_of_text = {"rotation": 90, "fontsize": 6.5, "ha": "center", "color": COLOURS[group]}
            axes.annotate(label, (x, lowest), xytext=(0, 6), textcoords="offset points", **style_of_text)


def _line(axes: Any, points: Sequence[tuple[float, float]], colour: str) -> None:
    if len(points) > 1:
        axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=1.2, zorder=2)


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


def _name_the_best(axes: Any, points: Sequence[Point]) -> None:
    """Name the best of ours and the best other compressor of each share."""
    for share in {point.share for point in points}:
        here = [point for point in points if point.share == share]
        ours = [point for point in here if point.group not in ("baselines", "FactorLLM")]
        others = [point for point in here if point.group == "baselines"]
        for those, up in ((ours, 1), (others, -1)):
            if not those:
                continue
            best = max(those, key=lambda point: point.y)
            axes.annotate(
                best.title,
                (best.x, best.y),
                xytext=(0, 12 * up) if up > 0 else (12, -2),
                textcoords="offset points",
                fontsize=6.8,
                ha="center" if up > 0 else "left",
                va="bottom" if up > 0 else "top",
                color="#333333",
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
                zorder=6,
            )
