"""Draw the figures of the report as inline SVG that takes its colours from the page, light or dark.

matplotlib draws with placeholder colours; each becomes a CSS variable (`--teacher`, `--line`, ...), so that one drawing
serves both themes. Figures are narrow, so that their text stays readable on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# Name of a colour -> the placeholder that matplotlib draws it with.
_PLACEHOLDERS = {
    "ink": "#010203",
    "line": "#040506",
    "teacher": "#070809",
    "training_free": "#0a0b0c",
    "student": "#0d0e0f",
    "dense": "#101112",
    "accent": "#131415",
}
_WIDTH = 4.9  # inches


@contextmanager
def _canvas(height: float, rows: int = 1) -> Iterator[tuple[Any, Any, list[str]]]:
    """Give a figure, its axes, and a list that holds the SVG at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    colours = _PLACEHOLDERS
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ffn2moe",  # identifiers that are the same every time
        "font.size": 10,
        "axes.edgecolor": colours["line"],
        "axes.labelcolor": colours["ink"],
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["line"],
        "grid.linewidth": 0.6,
        "text.color": colours["ink"],
        "xtick.color": colours["line"],
        "ytick.color": colours["line"],
        "xtick.labelcolor": colours["ink"],
        "ytick.labelcolor": colours["ink"],
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
        svg: list[str] = []
        yield figure, (axes[0] if rows == 1 else axes), svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg.append(_themed(buffer.getvalue()))


def _themed(svg: str) -> str:
    """Return the drawing without prologue and metadata, as wide as its place, in the colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)\s(?:width="[^"]*"\s|height="[^"]*"\s)', r"\1 ", svg)
    svg = re.sub(r'^(<svg [^>]*?)(?:\s(?:width|height)="[^"]*")', r"\1", svg)
    svg = re.sub(r"font: (?:\d+ )?([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    for name, colour in _PLACEHOLDERS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()


def retention(rows: Sequence[Mapping[str, Any]], wanted: float) -> str:
    """Draw what each mixture keeps of the teacher: dots with 95 % intervals, a row for each benchmark."""
    with _canvas(1.1 + 0.55 * len(rows)) as (figure, axes, svg):
        lowest = 1.0
        for place, row in enumerate(rows):
            for model, shift in (("training_free", 0.14), ("student", -0.14)):
                value, low, high = (100 * row[model][key] for key in ("value", "low", "high"))
                lowest = min(lowest, low / 100)
                y, colour = len(rows) - 1 - place + shift, _PLACEHOLDERS[model]
                label = {"training_free": "training-free", "student": "distilled"}[model] if not place else None
                axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
                axes.plot([value], [y], "o", color=colour, markersize=6, label=label)
        axes.axvline(100, color=_PLACEHOLDERS["teacher"], linewidth=1.4)
        axes.axvline(100 * wanted, color=_PLACEHOLDERS["ink"], linewidth=1, linestyle=":")
        axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("% of the teacher kept")
        figure.legend(loc="outside upper right", ncols=2)
    return svg[0]


def speed(plans: Sequence[Mapping[str, Any]], shapes: Sequence[str], bound: float) -> str:
    """Draw the speed of every plan over dense float32 at every shape as bars, and the Amdahl bound as a line."""
    import matplotlib.patches as patches

    with _canvas(0.9 + len(shapes) * (0.16 * len(plans) + 0.22)) as (figure, axes, svg):
        thick = 0.82 / len(plans)
        for index, plan in enumerate(plans):
            y = [len(shapes) - 1 - place + 0.41 - (index + 0.5) * thick for place in range(len(shapes))]
            colour = _PLACEHOLDERS["dense" if plan["dense"] else "student"]
            for height, value, chosen in zip(y, plan["speedups"], plan["chosen_at"], strict=True):
                bar = axes.barh([height], [value], thick * 0.86, color=colour, alpha=1 if chosen else 0.5)
                weight = "bold" if chosen else "normal"
                axes.bar_label(bar, [f"{plan['name']} {value:.2f}"], padding=3, fontsize=7.5, fontweight=weight)
        axes.axvline(1, color=_PLACEHOLDERS["ink"], linewidth=1)
        axes.axvline(bound, color=_PLACEHOLDERS["accent"], linewidth=1.4, linestyle="--")
        axes.set_yticks(range(len(shapes)), list(reversed(shapes)))
        axes.set_xlim(0, 1.22 * max(bound, *(value for plan in plans for value in plan["speedups"])))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("speed over dense float32")
        handles = [
            patches.Patch(color=_PLACEHOLDERS["dense"], label="dense"),
            patches.Patch(color=_PLACEHOLDERS["student"], label="student"),
            axes.plot([], [], "--", color=_PLACEHOLDERS["accent"], label=f"Amdahl bound {bound:.2f}")[0],
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return svg[0]


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str) -> str:
    """Draw losses over steps and their running means; a name marks the end of each of several curves."""
    with _canvas(2.7) as (_, axes, svg):
        everything = [loss for _, losses in series.values() for loss in losses]
        for index, (name, (steps, losses)) in enumerate(series.items()):
            window = max(1, len(losses) // 20)
            mean = [
                sum(losses[max(0, end - window) : end]) / (end - max(0, end - window))
                for end in range(1, len(losses) + 1)
            ]
            alpha = 1 - 0.6 * index / len(series)
            axes.plot(steps, losses, color=_PLACEHOLDERS["student"], alpha=0.25 * alpha, linewidth=0.8)
            axes.plot(steps, mean, color=_PLACEHOLDERS["student"], alpha=alpha, linewidth=1.6)
            if len(series) > 1:
                end = (steps[-1], mean[-1])
                axes.annotate(name, end, xytext=(3, 0), textcoords="offset points", fontsize=7.5, va="center")
        if min(everything) > 0 and max(everything) > 5 * min(everything):
            axes.set_yscale("log")
        axes.set_xlabel("step" + (" (a line per layer)" if len(series) > 1 else ""))
        axes.set_ylabel(label)
    return svg[0]


def layers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the relative error of every layer with the oracle as bars, and what the router adds on top."""
    with _canvas(2.9) as (figure, axes, svg):
        place = range(len(rows))
        oracle = [100 * row["oracle_error"] for row in rows]
        gap = [100 * max(0.0, row["gap"]) for row in rows]
        axes.bar(place, oracle, 0.62, color=_PLACEHOLDERS["teacher"], label="oracle: the partition")
        axes.bar(place, gap, 0.62, bottom=oracle, color=_PLACEHOLDERS["training_free"], label="gap: the router")
        for index, row in enumerate(rows):
            top = oracle[index] + gap[index]
            axes.annotate(
                f"{100 * row['router_recall']:.0f} %",
                (index, top),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_xticks(place, [str(row["layer"]) for row in rows])
        axes.set_ylim(0, 1.18 * max(a + b for a, b in zip(oracle, gap, strict=True)) or 1)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("layer (above the bars: recall of the oracle's choice)")
        axes.set_ylabel("relative error, %")
        figure.legend(loc="outside upper right", ncols=2)
    return svg[0]


def load(shares: Sequence[Sequence[float]], names: Sequence[str] | None = None) -> str:
    """Draw how often each expert is chosen as a heat map, 1 for an even share; rows are layers, or `names`."""
    experts = len(shares[0])
    with _canvas(0.9 + 0.34 * len(shares)) as (_, axes, svg):
        for layer, row in enumerate(shares):
            for expert, share in enumerate(row):
                fair = share * experts
                axes.barh(
                    layer,
                    0.96,
                    0.92,
                    left=expert - 0.48,
                    color=_PLACEHOLDERS["student"],
                    alpha=min(1.0, 0.04 + 0.4 * fair),
                )
                if experts <= 16:
                    axes.text(expert, layer, f"{fair:.1f}", ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, experts - 0.5)
        axes.set_ylim(len(shares) - 0.5, -0.5)
        step = max(1, experts // 16)
        axes.set_xticks(range(0, experts, step))
        axes.set_yticks(range(len(shares)), names)
        axes.grid(visible=False)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer" if names is None else "")
    return svg[0]
