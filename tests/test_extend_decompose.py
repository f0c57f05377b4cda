"""The examples of docs/extend/partition.md and router-objective.md run, and their rows appear without another edit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest

from ffn2moe.decompose import objectives, partition
from ffn2moe.table import Table
from tasks.params import Settings, load_params
from tests.pages import examples
from tests.texts import PARAMS


@dataclass(frozen=True)
class Added:
    """A row that a page adds."""

    name: str
    page: str
    package: ModuleType
    table: Table
    section: str  # of params.yaml
    key: str
    setting: str  # of a conversion
    field: str  # of an ablation method


ADDED = (
    Added(
        "striped",
        "extend/partition.md",
        partition,
        partition.PARTITIONS,
        "decompose",
        "partition",
        "partition",
        "partition",
    ),
    Added(
        "best_expert",
        "extend/router-objective.md",
        objectives,
        objectives.OBJECTIVES,
        "train_router",
        "objective",
        "router_objective",
        "objective",
    ),
)


@pytest.fixture(params=ADDED, ids=lambda added: added.name)
def added(request, tmp_path, monkeypatch) -> Iterator[Added]:
    """Put the page's file where the other rows are, as far as Python can see."""
    row, _ = examples(request.param.page)
    (tmp_path / f"{request.param.name}.py").write_text(row)
    monkeypatch.setattr(request.param.package, "__path__", [*request.param.package.__path__, str(tmp_path)])
    yield request.param
    request.param.table.forget(request.param.name)


def test_the_file_and_the_test_on_the_page_work(added):
    _, proof = examples(added.page)
    exec(proof, {})


def test_the_row_appears_in_the_parameters(added):
    chosen = load_params(PARAMS, [f"{added.section}.{added.key}={added.name}"])
    assert getattr(getattr(chosen, added.section), added.key) == added.name
    kind = "".join(part.title() for part in added.section.split("_")) + "Settings"
    assert added.name in Settings.model_json_schema()["$defs"][kind]["properties"][added.key]["anyOf"][0]["enum"]


def test_the_row_appears_on_the_command_line(added, capsys):
    from ffn2moe import cli
    from ffn2moe.conversion.settings import Settings as Conversion

    assert getattr(Conversion(**{added.setting: added.name}), added.setting) == added.name
    with pytest.raises(ValueError, match=rf"did you mean '{added.name}'\?"):
        Conversion(**{added.setting: added.name[:-1]})
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    assert f"--{added.setting.replace('_', '-')}" in capsys.readouterr().out


def test_the_row_is_a_method_of_the_ablation(added):
    from benchmarks.ablation.methods import methods_of

    assert getattr(methods_of("embedding")[added.name], added.field) == added.name
