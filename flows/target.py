"""Take the known best recipe of the committed front for `target.keeps` or `target.speedup`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import front
from tasks import params as parameters
from tasks.front import FRONT, Point
from tasks.params import Params, ParamsError


@dataclass(frozen=True)
class Resolved:
    """The recipe for a target, and what a user of it must know."""

    point: Point
    lines: list[str]


def resolve(raw: dict[str, Any], root: Path, given: Collection[str]) -> Resolved | None:
    """Put the settings of the recipe for the target into `raw`, and remove the target; None where there is none.

    `given` are the keys that the user set for this run. ParamsError where no recipe reaches the target, with the
    nearest ones, where the user sets a key of the recipe himself, or where there is no front.
    """
    wanted = parameters.validate(raw, source="the settings").target.wanted
    if not wanted:
        return None
    model = str(raw["teacher"]["source"])
    found = chosen(front.committed(root), model, wanted)
    keys = [setting.partition("=")[0] for setting in found.settings]
    own = sorted(key for key in given if key in keys or key.startswith("decompose."))
    if own:
        raise ParamsError(
            f"{own[0]} is set beside {_named(wanted)}, whose recipe {found.recipe} sets what the student is made of "
            f"({' '.join(found.settings)}): leave out {own[0]}, or leave out the target and give all of these settings"
        )
    raw["decompose"] = {**raw["decompose"], **found.decompose}
    parameters.override(raw, found.settings)
    raw["target"] = dict.fromkeys(raw["target"])
    return Resolved(found, _lines(found, wanted, model, parameters.validate(raw, source="the settings")))


def lines(root: Path, overrides: Sequence[str]) -> list[str]:
    """Return what a run with these settings says about the recipe that it takes; nothing without a target."""
    raw = parameters.override(parameters.read(root / "params.yaml"), overrides)
    found = resolve(raw, root, [item.partition("=")[0] for item in overrides])
    return found.lines if found else []


def committed(root: Path) -> list[str]:
    """Return the target of params.yaml itself as settings of a run: the recipe needs a workspace of its own."""
    wanted = parameters.load_params(root / "params.yaml").target.wanted
    return [f"target.{key}={value}" for key, value in wanted.items()]


def chosen(points: list[Point], model: str, wanted: dict[str, float]) -> Point:
    """Return the point for a target among the recipes that were measured on this model, or else on the first one."""
    if not points:
        raise ParamsError(f"{_named(wanted)} needs a measured front, and {FRONT} has no point: {front.MEASURE}")
    own = front.of_model(points, model) or front.of_model(points, points[0].model)
    recipes = [point for point in own if point.recipe is not None]
    if found := front.choose(recipes, **wanted):
        return found
    near = "; ".join(map(str, front.nearest(recipes, **wanted)))
    raise ParamsError(f"no recipe of {FRONT} reaches {_named(wanted)} on {own[0].model}; the nearest: {near}")


def _named(wanted: dict[str, float]) -> str:
    return " ".join(f"target.{key}={value:g}" for key, value in wanted.items())


def _lines(point: Point, wanted: dict[str, float], model: str, params: Params) -> list[str]:
    lines = [f"{_named(wanted)}: the recipe {point.recipe} ({' '.join(point.settings)})", f"measured: {point}"]
    lines.append(f"on {point.machine}; {FRONT.with_suffix('.md')} has all recipes")
    if point.model != model:
        lines.append(
            f"these figures are of another model, {point.model}: {model} may keep more or less, and be faster or slower"
        )
    flat, trained = params.flat(), json.loads(json.dumps(point.training))
    differs = [key for key, value in trained.items() if key in flat and front.without_path(key, flat[key]) != value]
    if differs:
        texts = ", ".join(f"{key}={trained[key]} (here {front.without_path(key, flat[key])})" for key in differs)
        lines.append(f"trained there with {texts}")
    return lines
