"""Show a front: a picture of quality against speed, and the table of its page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import pareto
from tasks.front import Point, of_model, percent
from tasks.measures import SHOWN

KINDS = {  # of points: marker and colour
    "dense plans of the teacher": ("s", "#6b7280"),
    "without experts": ("o", "#d9822b"),
    "with experts": ("D", "#2563c9"),
}


HEAD = """# Depth, width and experts on one measured front

Which students keep most of their teacher at which speed: fewer layers, narrower FFNs, experts, or several at once?

```
make front                               # resumes where it was stopped; recipes/encoder.yaml has the table of recipes
python -m flows.sweep publish            # writes this page
```

- *Kept* is the mean over the judges of the plan's figure as a share of the teacher's; ± is the standard deviation over
  seeds.
- *Speed* is the median ratio over the fastest dense plan of the teacher, mean of the shapes. One session timed all
  plans in turn, those of the first seed; in brackets the 99 % interval. Plans are those of the engines that the table
  of recipes names: of ONNX Runtime alone in recipes/encoder-short.yaml.
- *Against the best baseline* is the difference in points from the best point without experts that is at least as fast
  (to 2 %); in brackets the 95 % interval of the paired difference over seeds (Student's t).
- *FLOPs* are a token's as a share of the teacher's. Memory is that of a process that runs the plan at the largest
  shape.
- Bold points are on the front: no other has more quality and more speed.
"""


def kind(point: Point) -> str:
    teacher, without, experts = KINDS
    return teacher if point.recipe is None else experts if point.experts else without


def shown(points: Sequence[Point]) -> list[Point]:
    """Return the points worth a look: of each recipe the plans that no other of its plans beats.

    Those slower than the best dense plan are left out, but for a recipe's fastest.
    """
    found = []
    for recipe in dict.fromkeys(point.recipe for point in points):
        own = [point for point in points if point.recipe == recipe]
        best = [own[place] for place in pareto.front([(point.quality, point.speed) for point in own])]
        found += [point for point in best if point.speed >= 1 or recipe is None or point == best[-1]]
    return sorted(found, key=lambda point: (-point.quality, -point.speed))


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw quality against speed, with names, error bars and the front; the ending of `path` sets the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    drawn = shown(points)
    for name, (marker, colour) in KINDS.items():
        own = [point for point in drawn if kind(point) == name]
        if own:
            axes.errorbar(
                [point.speed for point in own],
                [100 * point.quality for point in own],
                xerr=_either_side(own),
                yerr=[100 * (point.spread or 0.0) for point in own],
                fmt=marker,
                color=colour,
                markersize=6.5,
                elinewidth=0.8,
                label=name,
                zorder=3,
            )
    best = [point for point in points if point.on_front]
    axes.step(
        [point.speed for point in best],
        [100 * point.quality for point in best],
        where="pre",
        color="#1a7f4b",
        linewidth=1.4,
        alpha=0.7,
        label="front: no point beats these in both",
    )
    axes.axvline(1, color="#1b1f27", linewidth=1, linestyle=":")
    first = points[0]
    seeds = max(len(point.seeds) for point in points)
    axes.set_title(f"{title}: {first.model}, {'1 seed' if seeds == 1 else f'{seeds} seeds'}", loc="left", fontsize=11)
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    axes.set_xlabel(
        f"speed over the best dense plan, mean of {' and '.join(first.speeds)}, {threads} (right is faster)"
    )
    axes.set_ylabel(f"% of the teacher's quality kept, mean of {', '.join(judge_names(first))}")
    axes.grid(color="#dce0e7", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.margins(x=0.08, y=0.08)
    figure.draw_without_rendering()  # names are placed by the sizes of what is drawn
    _name(axes, drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _either_side(points: Sequence[Point]) -> list[list[float]]:
    """Return the lengths of the error bars of the speeds, below and above."""
    limits = [point.interval or (point.speed, point.speed) for point in points]
    pairs = list(zip(points, limits, strict=True))
    return [
        [max(0.0, point.speed - low) for point, (low, _) in pairs],
        [max(0.0, high - point.speed) for point, (_, high) in pairs],
    ]


def _name(axes: Any, points: Sequence[Point]) -> None:
    """Write the names beside the points, each where it covers no other name and no point."""
    places = ((7, 4), (7, -11), (-7, 4), (-7, -11), (7, 15), (-7, 15), (7, -22), (-7, -22), (7, 26), (7, -33))
    marks = [axes.transData.transform((point.speed, 100 * point.quality)) for point in points]
    inside, taken = axes.get_window_extent(), [axes.get_legend().get_window_extent()]

    def free(box: Any) -> bool:
        within = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 and box.y1 <= inside.y1
        return (
            within
            and not any(box.overlaps(other) for other in taken)
            and not any(box.padded(4).contains(*one) for one in marks)
        )

    for point in sorted(points, key=lambda point: (not point.on_front, -point.quality)):
        text = None
        for x, y in places:
            text = axes.annotate(
                point.name,
                (point.speed, 100 * point.quality),
                xytext=(x, y),
                textcoords="offset points",
                ha="left" if x > 0 else "right",
                fontsize=7.5,
                color=KINDS[kind(point)][1],
                fontweight="bold" if point.on_front else "normal",
            )
            if free(box := text.get_window_extent()):
                taken.append(box)
                break
            text.remove()


def judge_names(point: Point) -> list[str]:
    """Return the short names of the judges of a point."""
    known = {".".join(one.path): one.label.split(",")[0] for one in SHOWN}
    return [known.get(name, name) for name in point.judges]


def section(points: Sequence[Point], picture: str) -> str:
    """Return the part of the page about one model on one machine, in Markdown: what was measured, picture, table."""
    first = points[0]
    trained = " ".join(f"{key}={_setting(value)}" for key, value in first.training.items())
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    heads = [
        "recipe",
        "plan",
        "seeds",
        "kept",
        *judge_names(first),
        "speed",
        *first.speeds,
        "against the best baseline",
    ]
    heads += ["FLOPs", "parameters", "MiB on disk", "MiB of memory"]
    rows = [_cells(point) for point in points]
    settings = {point.recipe: " ".join(point.settings) for point in points if point.recipe is not None}
    return "\n".join(
        [
            f"## {first.model}, {first.machine}",
            "",
            f"{threads}; commit {first.commit}. Every recipe was trained with",
            "",
            "```",
            trained,
            "```",
            "",
            f"![quality kept against speed]({picture})",
            "",
            _row(heads),
            _row(["---"] * len(heads)),
            *map(_row, rows),
            "",
            "| recipe | settings |",
            "|---|---|",
            *(f"| {name} | `{text}` |" for name, text in settings.items()),
            "",
        ]
    )


def _cells(point: Point) -> list[str]:
    bold = "**" if point.on_front else ""
    return [
        f"{bold}{point.recipe or 'the teacher'}{bold}",
        f"`{point.plan}`",
        str(len(point.seeds)),
        f"{bold}{percent(point.quality, point.spread)}{bold}",
        *(percent(share) for share in point.judges.values()),
        f"{bold}{point.speed:.2f}x{bold}"
        + (f" ({point.interval[0]:.2f} to {point.interval[1]:.2f})" if point.interval else ""),
        *(f"{speed:.2f}x" for speed in point.speeds.values()),
        beside_baseline(point),
        percent(point.flops),
        f"{point.parameters / 1e6:.1f} M",
        f"{point.bytes / 2**20:.0f}",
        f"{point.memory_mib:.0f}",
    ]


def beside_baseline(point: Point) -> str:
    """Return how far a mixture is above the best baseline at its speed, in points; nothing for a baseline."""
    row = point.against
    if row is None:
        return "no baseline is as fast" if point.experts else ""
    found = f"{100 * row['difference']:+.2f}"
    if row["low"] is not None:
        found += f" ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})"
    return f"{found} from {row['recipe'] or 'the teacher'} ({row['plan']}) at {row['speed']:.2f}x"


def write_page(points: Sequence[Point], folder: Path) -> list[Path]:
    """Write front.md and a picture for each model on each machine into a folder; return the files."""
    written, sections = [], []
    for model, machine in dict.fromkeys((point.model, point.machine) for point in points):
        own = [point for point in points if (point.model, point.machine) == (model, machine)]
        name = model.removeprefix("package:") + (f"-{machine}" if machine != of_model(points, model)[0].machine else "")
        picture = folder / f"front-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
        draw(own, "quality against speed", picture)
        sections.append(section(own, picture.name))
        written.append(picture)
    page = folder / "front.md"
    page.write_text("\n".join([HEAD, *sections]), encoding="utf-8")
    return [page, *written]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _setting(value: object) -> str:
    return "null" if value is None else str(value).replace(" ", "") if isinstance(value, list | tuple) else str(value)
