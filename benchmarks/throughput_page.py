"""Write the page of `benchmarks.throughput`: tables, and a plot of the texts per second."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.page import Grid, Page, about, some, verdict
from benchmarks.race import Samples, Spread
from ffn2moe.planning import timing
from ffn2moe.runtime.plans import PLANS, is_dense

TARGET = 1.4  # texts per second over the best of the others
COMPARED = 32  # texts whose vectors are compared
REFERENCE = "torch float32"
IN_ORDER = ", text order"
DEFAULT = "default"  # the export opened without a plan: what was chosen for lists, or by shape


def page(
    rows: Sequence[Mapping[str, Any]],
    cosines: Mapping[str, float],
    left_out: Mapping[str, str],
    options: argparse.Namespace,
    spec: Mapping[str, Any],
) -> Page:
    """Return the page of finished rounds."""
    names = list(rows[0]["seconds"])
    sets = list(dict.fromkeys(row["set"] for row in rows))
    samples = {name: samples_of([row for row in rows if row["set"] == name]) for name in sets}
    best = {name: one.fastest(_others(names)) for name, one in samples.items()}
    table = [
        [
            encoder,
            f"{cosines[encoder]:.4f}",
            *(_cell(samples[name], encoder, best[name], rows[0]["texts"]) for name in sets),
        ]
        for encoder in names
    ]
    calls = f"calls of {options.at_once} texts" if options.at_once else "one call a round"
    loads = [row["load"] for row in rows]
    reference = REFERENCE if REFERENCE in names else names[0]
    return Page(
        "Texts per second, end to end",
        [
            f"`{options.export.name}`, {spec['num_active']} of {spec['num_experts']} experts active. {about()}. "
            f"{some(options.threads, 'thread')}, {len(rows) // len(sets)} interleaved rounds of {rows[0]['texts']} new "
            f"texts, {calls}, tokenisation included. Load average {min(loads):.1f} to {max(loads):.1f}.",
            "Median texts per second, and the speed over the best of the others in the same rounds: median and "
            "quartiles. The others are the dense plans of the export, in the same batches as the mixture, and "
            "sentence-transformers (torch, onnx, openvino) and fastembed, each in the fastest of several batch sizes. "
            + ("`default` is the export opened without a plan. " if DEFAULT in names else "")
            + f"`cosine`: the mean cosine of {COMPARED} vectors with those of {reference}.",
        ],
        [
            Grid("Texts per second", ["encoder", "cosine", *sets], table),
            Grid(
                "Mixture against the best of the others",
                ["set", "mixture", "speed", "target"],
                _verdicts(samples, best),
            ),
        ],
        notes="\n".join(f"Left out: {name} ({reason})." for name, reason in left_out.items()),
        result={"machine": timing.machine(), "cosines": cosines, "left_out": left_out, "rows": list(rows)},
        figure=lambda: figure(samples, best, rows[0]["texts"]),
    )


def samples_of(rows: Sequence[Mapping[str, Any]]) -> Samples:
    """Return the seconds of each encoder, round by round, of the rows of one set."""
    return Samples({name: [row["seconds"][name] for row in rows] for name in rows[0]["seconds"]})


def is_mixture(name: str) -> bool:
    """Return whether an encoder is a plan of the mixture, in our own batches or in text order."""
    plan = name.removesuffix(IN_ORDER)
    return plan in PLANS and not is_dense(plan)


def _others(names: Sequence[str]) -> list[str]:
    return [name for name in names if name != DEFAULT and not is_mixture(name)]


def _cell(samples: Samples, encoder: str, best: str, texts: int) -> str:
    rate = f"{texts / samples.median(encoder):.0f}"
    if encoder == best:
        return f"**{rate}, best of the others**"
    text = f"{rate}, {samples.speed(encoder, best)}x"
    return f"**{text}**" if encoder == samples.fastest(samples.seconds) else text


def _verdicts(samples: Mapping[str, Samples], best: Mapping[str, str]) -> list[list[str]]:
    found = []
    for name, one in samples.items():
        mixtures = [encoder for encoder in one.seconds if is_mixture(encoder)]
        if mixtures:
            fastest = one.fastest(mixtures)
            speed = one.speed(fastest, best[name])
            found.append([name, f"{fastest} against {best[name]}", f"{speed}x", verdict(speed, TARGET)])
    return found


def figure(samples: Mapping[str, Samples], best: Mapping[str, str], texts: int) -> Any:
    """Draw the texts per second of every encoder, a panel for each set, with the quartiles of the rounds."""
    from matplotlib.figure import Figure

    names = list(next(iter(samples.values())).seconds)[::-1]
    drawn = Figure(figsize=(4.2 * len(samples) + 1, 0.3 * len(names) + 1.2), layout="constrained")
    panels = drawn.subplots(1, len(samples), sharey=True, squeeze=False)[0]
    for axes, (name, one) in zip(panels, samples.items(), strict=True):
        rates = [Spread.of([texts / seconds for seconds in one.seconds[encoder]]) for encoder in names]
        axes.barh(
            names,
            [rate.median for rate in rates],
            color=["#1f77b4" if encoder == DEFAULT or is_mixture(encoder) else "#b0b0b0" for encoder in names],
            xerr=[[rate.median - rate.low for rate in rates], [rate.high - rate.median for rate in rates]],
            error_kw={"elinewidth": 0.8, "ecolor": "#222222"},
        )
        axes.axvline(texts / one.median(best[name]), color="#222222", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("texts per second (dotted: best of the others)", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn
