"""The example of docs/extend/plan.md works as it stands, and its row appears everywhere without another edit."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from ffn2moe.moe import checkpoint
from ffn2moe.onnx.verify import verify
from ffn2moe.runtime import plans
from tasks.params import Settings, load_params
from tests.conftest import make_tiny_bert
from tests.mixtures import carve
from tests.pages import examples
from tests.texts import PARAMS


@pytest.fixture
def sorted4(tmp_path, monkeypatch):
    """Put the page's file where other plans may be, as far as Python can see."""
    row, _ = examples("extend/plan.md")
    (tmp_path / "added").mkdir()
    (tmp_path / "added/sorted4.py").write_text(row)
    monkeypatch.setattr(plans, "__path__", [*plans.__path__, str(tmp_path / "added")])
    yield "sorted4"
    plans.PLANS.forget("sorted4")


def test_the_file_on_the_page_is_a_plan_that_is_exported_verified_and_opened(sorted4, tmp_path):
    teacher = make_tiny_bert(tmp_path / "teacher", num_hidden_layers=1)
    student, spec = carve(teacher)
    checkpoint.save(student, None, spec, tmp_path / "export/checkpoint")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "export/tokenizer")
    _, proof = examples("extend/plan.md")
    exec(proof.replace('"EXPORT', f'"{tmp_path / "export"}').replace('"OUT"', repr(str(tmp_path / "out"))), {})
    assert all(check.passed for check in verify(tmp_path / "out", plans=["sorted", "sorted4"], texts=4, threads=1))


def test_the_row_appears_in_the_parameters(sorted4):
    assert load_params(PARAMS, ["export.more_plans=[sorted4]"]).export.more_plans == ("sorted4",)
    schema = str(Settings.model_json_schema()["$defs"]["ExportSettings"]["properties"]["more_plans"])
    assert sorted4 in schema and "ov-native8a8" in schema


def test_every_row_of_the_table_can_be_made():
    for plan in plans.PLANS.rows():
        shared = plans.PLANS[plan.same_graph_as or plan.name]
        assert shared.steps or shared.name in ("dense", "student"), f"{plan.name} has no step that computes a mixture"
        assert plan.heads or plan.on_request, f"no model ever gets {plan.name}"
        if plan.operator is not None:
            assert callable(plans.resolve(plan.operator.self_test))
            assert plan.operator.library is None or callable(plans.resolve(plan.operator.library))
        for step in plan.steps:
            assert callable(plans.resolve(step))


@pytest.mark.parametrize(
    ("name", "form", "graph"),
    [
        ("sorted", "sorted", "sorted"),
        ("ov-sorted-k1", "ov-sorted", "sorted-k1"),
        ("ov-dense", "ov-dense", "dense"),
        ("sorted8-d0-2.5", "sorted8", "sorted8-d0-2.5"),
        ("ov-native8a8-k2", "ov-native8a8", "ov-native8a8-k2"),
    ],
)
def test_a_variant_belongs_to_a_row_and_a_plan_of_another_engine_shares_its_file(name, form, graph):
    assert (plans.form_of(name), plans.graph_of(name)) == (form, graph)


def test_an_unknown_plan_or_engine_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown plan 'sortd8'; did you mean 'sorted8'\?"):
        plans.plan_of("sortd8")
