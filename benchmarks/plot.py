"""Draw bars with quartiles for the pages of the benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.openvino_weights import COMPRESSED
from benchmarks.race import Spread
from ffn2moe.runtime.plans import PLANS

Panel = tuple[str, Mapping[str, Mapping[str, Spread]], Sequence[float]]


def bars(panels: Sequence[Panel], *, hollow: Collection[str], ylabel: str) -> Any:
    """Draw panels of (title, group -> name -> spread, the bound of each group); `hollow` names are hatched.

    A plan has the same colour in every plot.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn_names = {name for _, groups, _ in panels for group in groups.values() for name in group}
    known = [*PLANS.names(), *COMPRESSED]
    names = [name for name in known if name in drawn_names] + sorted(drawn_names.difference(known))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    wide = max(7.5, 1.2 + 0.16 * max(len(groups) for _, groups, _ in panels) * (len(names) + 1))
    figure = Figure(figsize=(wide * columns, 3.4 * lines + 0.8), layout="constrained")
    width = 0.86 / max(1, len(names))
    shown: dict[str, Any] = {}  # for the legend
    for place, (title, groups, limits) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, place + 1)
        for index, name in enumerate(names):
            spreads = {at: group[name] for at, group in enumerate(groups.values()) if name in group}
            shown[name] = axes.bar(
                [at + (index - (len(names) - 1) / 2) * width for at in spreads],
                [spread.median for spread in spreads.values()],
                0.92 * width,
                color=colormaps["tab20"]((known.index(name) if name in known else len(known)) % 20),
                hatch="//" if name in hollow else None,
                edgecolor="white",
                linewidth=0.3,
                yerr=[
                    [max(0.0, one.median - one.low) for one in spreads.values()],
                    [max(0.0, one.high - one.median) for one in spreads.values()],
                ],
                error_kw={"elinewidth": 0.8, "ecolor": "#222222"},
            )
        ends = [at - 0.45 for at in range(len(groups))], [at + 0.45 for at in range(len(groups))]
        shown["bound by FLOPs"] = axes.hlines(limits, *ends, colors="#888888", linestyles=":", linewidth=1.2)
        axes.axhline(1.0, color="#222222", linewidth=0.9)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    place_of_legend = {"loc": "outside upper center", "ncols": max(2, int(wide * columns / 1.7)), "frameon": False}
    figure.legend(list(shown.values()), list(shown), fontsize=9, **place_of_legend)
    return figure
