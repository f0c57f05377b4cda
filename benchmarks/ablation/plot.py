"""Quality kept against what a token costs, a panel for each stage, and for each judge once distilled."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.methods import STAGE_TITLES, STAGES, Stage
from benchmarks.ablation.rows import FIGURES, means

COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "default": "#000000",
    "FactorLLM": "#D55E00",
    "partition": "#0072B2",
    "router start": "#56B4E9",
    "router objective": "#009E73",
    "gates": "#F0E442",
    "selection": "#CC79A7",
    "distillation": "#E69F00",
    "after conversion": "#8C6BB1",
    "rivals": "#888888",
}
MARKERS = {"default": "*", "FactorLLM": "X", "rivals": "s", "after conversion": "D"}


def draw(one: Mapping[str, Any], path: Path) -> None:
    """The plot of a grid as PNG."""
    from matplotlib.figure import Figure

    rows = means(one)
    stages = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
    last = stages[-1]
    judges = [name for name in FIGURES if name in rows[0]["kept"] and name != "agreement"]
    panels: list[tuple[str, Stage, str | None]] = [(STAGE_TITLES[stage], stage, None) for stage in stages]
    if len(judges) > 1:
        panels += [(f"{STAGE_TITLES[last]}: {FIGURES[name][0]}", last, name) for name in judges]
    columns = min(3, len(panels)) if len(judges) <= 1 else max(3, len(stages))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.9 * lines + 0.5), layout="constrained", dpi=160)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for place, (title, stage, judge) in zip(axes, panels, strict=False):
        _panel(place, title, [row for row in rows if row["stage"] == stage], judge)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    shown = [group for group in COLOURS if any(row["group"] == group for row in rows)]
    names = {"default": "ours, as by default", "rivals": "rival compressors"}
    handles = [
        axes[0].plot(
            [], [], MARKERS.get(group, "o"), color=COLOURS[group], markersize=9, label=names.get(group, group)
        )[0]
        for group in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(shown)), frameon=False)
    figure.suptitle(
        f"{one['model']}: what is kept of the teacher, by the FLOPs of the FFNs that a token runs", fontsize=12
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _panel(axes: Any, title: str, rows: Sequence[Mapping[str, Any]], judge: str | None) -> None:
    """Each row as a dot with its spread, the default as a line, and the best of all as a thin one."""
    points = []
    for row in rows:
        values = row["quality"] if judge is None else row["kept"][judge]
        x = 100 * statistics.mean(row["cost"]["ffn_flops"])
        y = 100 * statistics.mean(values)
        spread = 100 * statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((x, y, spread, row))
    front = _front([(x, y) for x, y, _, row in points if row["group"] != "FactorLLM"])
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=1.2, zorder=1)
    own = sorted((x, y) for x, y, _, row in points if row["group"] == "default")
    if len(own) > 1:
        axes.plot(*zip(*own, strict=True), color=COLOURS["default"], linewidth=1.2, zorder=2)
    for x, y, spread, row in points:
        group = row["group"]
        default = group == "default"
        axes.errorbar(
            x,
            y,
            yerr=spread or None,
            fmt=MARKERS.get(group, "o"),
            color=COLOURS[group],
            markersize=13 if default else 6,
            markeredgecolor="white" if not default else "black",
            markeredgewidth=0.5,
            elinewidth=1,
            alpha=1 if default else 0.85,
            zorder=5 if default else 3,
        )
    _name_the_ends(axes, points)
    axes.axhline(100, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    ticks = sorted({round(200 * row["share"]) / 2 for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0.72 * min(ticks), 1.6 * max(ticks))
    axes.minorticks_off()
    lowest = _lowest([y for _, y, _, _ in points])
    below = sum(y < lowest for _, y, _, _ in points)
    highest = max([100.0, *(y for _, y, _, _ in points)])
    axes.set_ylim(lowest - 0.04 * (highest - lowest), highest + 0.06 * (highest - lowest))
    if below:
        axes.annotate(
            f"{below} below", (0.98, 0.02), xycoords="axes fraction", ha="right", fontsize=7.5, color="#666666"
        )
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("FLOPs of the FFNs with routers, % of the teacher's", fontsize=9)
    axes.set_ylabel("% of the teacher kept", fontsize=9)
    axes.tick_params(labelsize=8.5)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that none is better than at the same or a lower cost, by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _lowest(values: Sequence[float]) -> float:
    """Where the axis begins: what is far below nearly all others is not shown, so that these can be told apart."""
    ordered = sorted(values)
    tenth = ordered[len(ordered) // 10]
    return max(ordered[0], tenth - 1.0 * (ordered[-1] - tenth))


def _name_the_ends(axes: Any, points: Sequence[tuple[float, float, float, Mapping[str, Any]]]) -> None:
    """The best method, the best rival and the best FactorLLM of each share by name."""
    for share in {row["share"] for _, _, _, row in points}:
        here = [point for point in points if point[3]["share"] == share]
        named = []
        for belongs in (
            lambda row: row["group"] not in ("rivals", "FactorLLM"),
            lambda row: row["group"] == "rivals",
            lambda row: row["group"] == "FactorLLM",
        ):
            those = [point for point in here if belongs(point[3])]
            if those:
                named.append(max(those, key=lambda point: point[1]))
        for x, y, _, row in named:
            axes.annotate(
                row["title"],
                (x, y),
                xytext=(7, 0),
                textcoords="offset points",
                fontsize=6.8,
                va="center",
                color="#333333",
                annotation_clip=True,
            )
