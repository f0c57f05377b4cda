"""dvc.yaml names everything a stage depends on: what is left out would make a stale result look fresh."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from tasks.params import legal_keys
from tests.imports import closure

PROJECT = Path(__file__).parent.parent
GRAPH = YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())
STAGES = GRAPH["stages"]
SERVED = {"tasks/served_model.py"}  # run by MLflow
EVERY = pytest.mark.parametrize("stage", STAGES)


def names(entries: list) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def outs(stage: str) -> list[str]:
    return names(STAGES[stage].get("outs", []) + STAGES[stage].get("metrics", []))


def covered(path: str, by: list[str]) -> bool:
    return any(path == one or path.startswith(f"{one}/") for one in by)


def test_the_stages_are_there_in_order():
    order = "inputs prepare decompose train_router distill evaluate export benchmark report register"
    assert list(STAGES) == order.split()


@EVERY
def test_every_module_a_stage_imports_is_a_dep(stage):
    missing = sorted(path for path in closure(f"tasks.{stage}") if not covered(path, STAGES[stage]["deps"]))
    assert not missing, f"add to deps of {stage} in dvc.yaml: {', '.join(missing)}"


@EVERY
def test_no_stage_imports_another(stage):
    others = {f"tasks/{name}.py" for name in STAGES} - {f"tasks/{stage}.py"}
    assert not others & closure(f"tasks.{stage}")


@EVERY
def test_no_module_is_a_dep_that_is_not_imported(stage):
    code = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py") or dep.startswith("ffn2moe")} - SERVED
    imported = closure(f"tasks.{stage}")
    needless = sorted(dep for dep in code if not any(covered(path, [dep]) for path in imported))
    assert not needless, f"remove from deps of {stage} in dvc.yaml: {', '.join(needless)}"


@EVERY
def test_every_dep_is_a_file_of_the_project_or_made_by_an_earlier_stage(stage):
    earlier = [out for name in list(STAGES)[: list(STAGES).index(stage)] for out in outs(name)]
    for dep in STAGES[stage]["deps"]:
        assert covered(dep, earlier) or (PROJECT / dep).exists(), f"{stage}: nothing makes {dep}"


@EVERY
def test_every_file_a_stage_names_is_a_dep_or_an_out(stage):
    text = (PROJECT / "tasks" / f"{stage}.py").read_text()
    named = set(re.findall(r"""["'/]((?:data|models|metrics|reports)/[\w./]+)""", text))
    known = [*STAGES[stage]["deps"], *outs(stage)]
    for path in (name.rstrip("/") for name in named):
        # A folder that is named stands for the files in it that are deps.
        assert covered(path, known) or any(one.startswith(f"{path}/") for one in known), f"{stage}: {path}"


@EVERY
def test_every_parameter_a_stage_reads_is_listed(stage):
    listed = STAGES[stage]["params"]
    free = {"compute.threads"} if stage == "prepare" else set()  # how many read files changes no text
    for key in parameters_read(PROJECT / "tasks" / f"{stage}.py") - free:
        # A section that is taken apart further on counts as read where one of its keys is listed.
        found = any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in listed)
        assert found, f"add {key} to the params of {stage} in dvc.yaml"


def parameters_read(path: Path) -> set[str]:
    """Keys, or sections taken as a whole, that a file reads as `params.SECTION.KEY`."""
    legal = set(legal_keys())
    sections = {key.split(".")[0] for key in legal}
    found = set()
    for chain in re.findall(r"\bparams\.([a-z_.]*[a-z_])", path.read_text()):
        parts = chain.replace("model_name", "register").replace("register_", "register").split(".")
        key = ".".join(parts[:2])
        if parts[0] in sections:
            found.add(key if key in legal else parts[0])
    return found


def test_every_listed_parameter_exists():
    keys = legal_keys()
    for stage, entry in STAGES.items():
        for param in entry.get("params", []):
            known = param in keys or any(key.startswith(f"{param}.") for key in keys)
            assert known, f"{stage} lists {param}, which params.yaml does not have"


def test_what_is_measured_in_time_comes_after_what_is_reproducible():
    timed = {"benchmark", "report", "register"}
    for stage in set(STAGES) - timed:
        sources = [out for name in timed for out in outs(name)]
        assert not any(covered(dep, sources) for dep in STAGES[stage]["deps"])


def test_every_plot_shows_an_out():
    tables = {path for stage in STAGES for path in outs(stage) if path.endswith(".csv")}
    shown = set(re.findall(r"metrics/plots/\w+\.csv", str(GRAPH["plots"])))
    assert shown == tables


# Full versions of the Pythons that `make run` accepts: the first and the last release of each, as markers see them.
PYTHONS = [f"3.{minor}.{patch}" for minor in (11, 12, 13) for patch in (0, 99)]
# Extras that the lock leaves out: `eval` has an environment of its own, and `cpu` stands for `gpu`, which is locked.
UNLOCKED_EXTRAS = {"eval", "cpu"}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_every_requirement_and_what_these_require(python):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    lock = [Requirement(line) for line in lines if line and not line.startswith("#")]
    locked = {canonicalize_name(one.name): one.specifier for one in lock if applies(one, frozenset(), python)}
    installed = {canonicalize_name(one.name) for one in lock if one.marker is None or one.marker.evaluate()}
    extras = {name: group for name, group in project["optional-dependencies"].items() if name not in UNLOCKED_EXTRAS}
    todo = [Requirement(text) for group in (project["dependencies"], *extras.values()) for text in group]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in seen or name == project["name"]:  # an extra that names others
            continue
        seen.add((name, wanted))
        assert name in locked, f"{name} is not in constraints.txt"
        version = str(locked[name]).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"
        if name not in installed or name == "torch":  # another Python's; torch's own requirements differ by platform
            continue
        further = [Requirement(text) for text in metadata.requires(name) or []]
        todo += [one for one in further if applies(one, wanted, python)]


def test_the_declared_pythons_are_those_of_the_lock_and_the_makefile():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    minors = sorted({python.rsplit(".", 1)[0] for python in PYTHONS})
    declared = [one.split(" :: ")[-1] for one in project["classifiers"] if one.startswith("Programming Language")]
    assert declared == ["3", *minors]
    assert project["requires-python"] == f">={minors[0]}"
    pythons = re.search(r"^PYTHONS := (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert pythons is not None and pythons[1].split() == minors


def applies(requirement: Requirement, extras: frozenset[str], python: str) -> bool:
    """Return whether this full version of Python needs the requirement."""
    if requirement.marker is None:
        return True
    known = {"python_full_version": python, "python_version": python.rsplit(".", 1)[0]}
    return any(requirement.marker.evaluate(known | {"extra": extra}) for extra in extras | {""})
