"""Draw bars with quartiles for the pages of the benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.race import Spread

# A plan has the same colour in every plot. OpenVINO is blue, ONNX Runtime is warm.
_COLOURS = {
    "dense": "#8a8f98",
    "dense8": "#6b5b4b",
    "dense4": "#a08a70",
    "fused": "#f2c14e",
    "qmoe8": "#f0a35e",
    "qmoe4": "#e98a6b",
    "sorted": "#d96c47",
    "sorted8": "#b3361e",
    "ov-dense": "#5a6b85",
    "ov-dense8": "#3d4c66",
    "ov-dense4": "#7d8ba3",
    "ov-sorted": "#7fb3e6",
    "ov-native": "#2f7fd1",
    "ov-native8": "#1557a0",
    "ov-native8a8": "#123f7d",
    "ov-native4": "#0b2f66",
    "ov-weights8": "#3d4c66",
    "ov-weights8-bf16": "#5f6f8c",
    "ov-weights4": "#7d8ba3",
    "ov-weights4-bf16": "#a3b0c4",
}

Panel = tuple[str, Mapping[str, Mapping[str, Spread]], Sequence[float]]


def bars(panels: Sequence[Panel], *, hollow: Collection[str], ylabel: str) -> Any:
    """Draw panels of (title, group -> name -> spread, the bound of each group); `hollow` names are hatched."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for _, groups, _ in panels for group in groups.values() for name in group))
    known = [name for name in _COLOURS if name in names] + [name for name in names if name not in _COLOURS]
    columns = 1 if len(panels) == 1 else 2
    lines = -(-len(panels) // columns)
    wide = max(7.5, 1.2 + 0.16 * max(len(groups) for _, groups, _ in panels) * (len(known) + 1))
    drawn = Figure(figsize=(wide * columns, 3.4 * lines + 0.8), layout="constrained")
    for place, (title, groups, limits) in enumerate(panels):
        axes = drawn.add_subplot(lines, columns, place + 1)
        width = 0.86 / max(1, len(known))
        for group, (spreads, limit) in enumerate(zip(groups.values(), limits, strict=True)):
            for index, name in enumerate(known):
                if name not in spreads:
                    continue
                spread, x = spreads[name], group + (index - (len(known) - 1) / 2) * width
                axes.bar(
                    x,
                    spread.median,
                    0.92 * width,
                    color=_COLOURS.get(name, "#444444"),
                    hatch="//" if name in hollow else None,
                    edgecolor="white",
                    linewidth=0.3,
                    yerr=[[max(0.0, spread.median - spread.low)], [max(0.0, spread.high - spread.median)]],
                    error_kw={"elinewidth": 0.8, "ecolor": "#222222"},
                )
            axes.plot([group - 0.45, group + 0.45], [limit, limit], color="#888888", linestyle=":", linewidth=1.2)
        axes.axhline(1.0, color="#222222", linewidth=0.9)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles: list[Any] = [
        Patch(
            facecolor=_COLOURS.get(name, "#444444"),
            hatch="//" if name in hollow else None,
            edgecolor="white",
            label=name,
        )
        for name in known
    ]
    handles.append(Line2D([], [], color="#888888", linestyle=":", linewidth=1.2, label="bound by FLOPs"))
    drawn.legend(
        handles=handles, loc="outside upper center", ncols=max(2, int(wide * columns / 1.7)), frameon=False, fontsize=9
    )
    return drawn
