"""Read a table of recipes: named settings that a front compares, each with several seeds.

common: benchmark.rounds=8                                   settings of every recipe
recipes:
  l4: decompose.keep_layers=4 decompose.num_experts=1        name: its own settings, which win
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

from flows.axes import Axis, parse
from flows.workspace import FlowError

RECIPE = "recipe"  # the axis of a sweep whose values are names of recipes
DENSE = "dense"  # the name under which a front has the plans of the teacher
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,31}")
_FORM = "write `recipes:` and below it a line for each, NAME: KEY=VALUE KEY=VALUE"


def read_recipes(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, Axis]]:
    """Return the settings of each recipe by its name, and the axes of the settings that all have in common.

    FlowError with the cause and the remedy where the file cannot be read.
    """
    if not path.is_file():
        raise FlowError(f"--recipes {path} is not a file; recipes/encoder.yaml shows its form")
    try:
        table = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise FlowError(f"{path} is not valid YAML: {getattr(error, 'problem', error)}; {_FORM}") from None
    if not isinstance(table, dict) or not isinstance(table.get("recipes"), dict) or set(table) - {"common", "recipes"}:
        raise FlowError(f"{path} has no table of recipes; {_FORM}, and `common:` for what all have in common")
    recipes = {str(name): _settings(path, str(name), text) for name, text in table["recipes"].items()}
    for name in recipes:
        if not _NAME.fullmatch(name) or name == DENSE:
            raise FlowError(
                f"{path}: {name!r} cannot name a recipe; use at most 32 letters, digits, '.', '_', '+' or '-', and not "
                f"{DENSE}, which is the teacher"
            )
    by_settings: dict[tuple[str, ...], str] = {}
    for name, settings in recipes.items():
        if (same := by_settings.setdefault(tuple(sorted(settings)), name)) != name:
            raise FlowError(f"{path}: {name} and {same} have the same settings; remove one")
    return recipes, parse(_settings(path, "common", table.get("common") or ""))


def _settings(path: Path, name: str, text: object) -> tuple[str, ...]:
    settings = tuple(text.split()) if isinstance(text, str) else ()
    if not settings and name != "common":
        raise FlowError(f"{path}: {name} has no settings; {_FORM}")
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals or key in ("name", "seed"):
            raise FlowError(f"{path}: cannot use {setting!r} of {name}: {_FORM}; names and seeds are given elsewhere")
    return settings


def axes_of(
    recipes: Mapping[str, Sequence[str]], common: Mapping[str, Axis], seeds: str, keys: Sequence[str]
) -> dict[str, Axis]:
    """Return the axes of a front: its seeds, the settings that all recipes have, and the recipes.

    Seeds come first, so that every recipe runs with the first seed before any runs with the second. `keys` are settings
    from the command line; they win over common ones. FlowError where a recipe sets the same key.
    """
    given = parse(keys)
    for name, settings in recipes.items():
        if twice := sorted(given.keys() & {setting.partition("=")[0] for setting in settings}):
            raise FlowError(f"{twice[0]} is given here and in the recipe {name}; remove one of them")
    axes: dict[str, Axis] = {**parse([f"seed={seeds}"]), **common, **given}
    if several := [
        key for key, axis in axes.items() if key != "seed" and not (isinstance(axis, tuple) and len(axis) == 1)
    ]:
        raise FlowError(
            f"{several[0]}: every recipe has the same value of it in a front; give one, or make it a recipe"
        )
    return {**axes, RECIPE: tuple(recipes)}
