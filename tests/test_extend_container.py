"""The example of docs/extend/container.md works as it stands, and its row appears everywhere without another edit."""

from __future__ import annotations

import pytest

from ffn2moe.containers import architectures
from ffn2moe.containers.table import CONTAINERS
from tasks.params import Settings, load_params
from tests.conftest import make_tiny_llama
from tests.pages import examples
from tests.texts import PARAMS


@pytest.fixture
def granitemoe(tmp_path, monkeypatch):
    """Put the page's file where the other architectures are, as far as Python can see."""
    row, _ = examples("extend/container.md")
    (tmp_path / "granitemoe.py").write_text(row)
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path)])
    yield "granitemoe"
    CONTAINERS.forget("granitemoe")


def test_the_file_on_the_page_is_a_container_that_gives_the_dense_logits(granitemoe, tmp_path):
    make_tiny_llama(tmp_path / "dense", ffn_width=48)
    _, proof = examples("extend/container.md")
    exec(proof.replace('"DENSE"', repr(str(tmp_path / "dense"))), {})


def test_the_row_appears_in_the_parameters_and_on_the_command_line(granitemoe):
    from ffn2moe.conversion.settings import Settings as Conversion

    chosen = load_params(PARAMS, ["decompose.container=granitemoe", "teacher.head=causal"])
    assert chosen.decompose.container == granitemoe
    schema = Settings.model_json_schema()["$defs"]["DecomposeSettings"]["properties"]["container"]
    assert granitemoe in schema["anyOf"][0]["enum"]
    assert Conversion(container=granitemoe).container == granitemoe
    with pytest.raises(ValueError, match=r"unknown container 'granitmoe'; did you mean 'granitemoe'\?"):
        Conversion(container="granitmoe")
