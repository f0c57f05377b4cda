"""A classifier's problem decides how it is judged: every figure tells a right student from a constant one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ffn2moe import metrics
from ffn2moe.choices import HEADS, PROBLEMS, problem_of
from ffn2moe.spec import MoESpec
from tests.mixtures import flat_spec

LABELS = {"single_label": 3, "multi_label": 4, "regression": 2, "one_label": 1}


def logits(problem: str, texts: int = 400) -> torch.Tensor:
    """Logits of a teacher: most texts get one label, as in a set where little is rare."""
    generator = torch.Generator().manual_seed(0)
    found_NC = torch.randn(texts, LABELS[problem], generator=generator, dtype=torch.float64)
    found_NC[:, 0] += 2.5
    return found_NC


@pytest.mark.parametrize("problem", PROBLEMS.names())
def test_a_right_student_keeps_all_and_a_constant_one_nothing(problem):
    teacher_NC = logits(problem)
    right = metrics.fidelity(problem, teacher_NC, teacher_NC.clone())
    assert right[metrics.KEPT] == pytest.approx(1)
    constant_NC = teacher_NC.mean(0).expand_as(teacher_NC)
    constant = metrics.fidelity(problem, teacher_NC, constant_NC)
    assert constant[metrics.KEPT] == pytest.approx(0, abs=1e-12)
    for name in ("kappa", "correlation", "rank_correlation"):
        assert (right.get(name), constant.get(name)) in [(None, None), (pytest.approx(1), pytest.approx(0))]
    if problem == "single_label":
        assert constant["agreement"] > 0.85, "agreement alone takes a constant student for a good one"
    shuffled_NC = teacher_NC[torch.randperm(len(teacher_NC), generator=torch.Generator().manual_seed(1))]
    assert abs(metrics.fidelity(problem, teacher_NC, shuffled_NC)[metrics.KEPT]) < 0.2


def test_values_of_another_scale_or_offset_are_not_kept():
    teacher_NC = logits("regression")
    for student_NC in (3 * teacher_NC, teacher_NC + 2):
        found = metrics.fidelity("regression", teacher_NC, student_NC)
        assert found["correlation"] == pytest.approx(1) and found[metrics.KEPT] < 0.7


def test_concordance_is_lins_and_its_interval_holds_it():
    teacher_N, student_N = torch.randn(2, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    student_N = teacher_N + 0.5 * student_N
    t, s = teacher_N.numpy(), student_N.numpy()
    expected = 2 * np.cov(t, s, bias=True)[0, 1] / (t.var() + s.var() + (t.mean() - s.mean()) ** 2)
    teacher_NC, student_NC = teacher_N.unsqueeze(1), student_N.unsqueeze(1)
    assert metrics.concordance(teacher_NC, student_NC) == pytest.approx(expected, rel=1e-12)
    narrow = metrics.concordance_interval("regression", teacher_NC, student_NC, rounds=200)
    assert narrow.low < expected < narrow.high
    tokens = metrics.concordance_interval(
        "regression", teacher_NC.repeat(5, 1), student_NC.repeat(5, 1), text_N=torch.arange(300).repeat(5), rounds=200
    )
    assert tokens.high - tokens.low == pytest.approx(narrow.high - narrow.low, rel=1e-9), "copies add nothing"


def test_a_teacher_that_gives_every_text_the_same_has_figures_that_are_defined():
    teacher_NC = torch.zeros(5, 2)
    assert metrics.fidelity("single_label", teacher_NC, teacher_NC)[metrics.KEPT] == 1.0
    found = metrics.fidelity("regression", teacher_NC, torch.randn(5, 2))
    assert found == {metrics.KEPT: pytest.approx(0, abs=1e-6)}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_labels": 3}, "single_label"),
        ({"num_labels": 1}, "one_label"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi_label"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "one_label"),
        ({"num_labels": 2, "problem_type": "regression"}, "regression"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.Identity"}}, "regression"),
        ({"num_labels": 1, "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "regression"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}}, "one_label"),
        ({"num_labels": 3, "sentence_transformers": {"activation_fn": "torch.nn.Identity"}}, "single_label"),
        ({"num_labels": 3, "sentence_transformers": {"version": "4.0.1"}}, "single_label"),
    ],
)
def test_the_problem_is_what_the_config_declares(config, problem):
    assert problem_of(SimpleNamespace(**config)) == problem


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_labels": 2, "problem_type": "multi_label"}, "'multi_label'; known: multi_label_class"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, "applies torch.nn.Tanh"),
    ],
)
def test_what_has_no_row_is_refused_by_its_name(config, message):
    with pytest.raises(ValueError, match=message):
        problem_of(SimpleNamespace(**config))


def test_a_spec_of_an_older_version_is_of_labels_that_exclude_each_other():
    spec = flat_spec(head="classification", sentence=None, problem="multi_label")
    written = spec.to_dict()
    assert MoESpec.from_dict(written).problem == "multi_label"
    del written["problem"]
    assert MoESpec.from_dict(written).problem == "single_label"
    with pytest.raises(ValueError, match="belongs to heads that classify"):
        replace(spec, head="features")


def test_every_head_that_classifies_is_judged_by_its_logits():
    assert {head.name for head in HEADS.rows() if head.classifies} == {"classification", "token_classification"}
    assert all(head.output == "logits" for head in HEADS.rows() if head.classifies or head.generates)
