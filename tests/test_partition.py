"""Neurons to experts, and the best choice of experts: what each method promises."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import benchmarks.ablation.methods  # noqa: F401 - registers selections whose number of experts varies
from benchmarks.ablation.methods.prefix_oracle import prefix_choice, prefix_errors
from benchmarks.ablation.methods.threshold_oracle import budget_choice
from ffn2moe.decompose import budget, clustering, oracle
from ffn2moe.decompose import statistics as activations
from ffn2moe.decompose.layer import assign_neurons, decompose_layer, neuron_statistics
from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.moe import checkpoint, fit
from tasks import decompose, prepare
from tests.conftest import make_tiny_bert
from tests.test_core import random_ffn, random_moe, spec_for, tokens
from tests.texts import make_stage, make_texts, write_corpus

# --- partitions -----------------------------------------------------------------------------------


def test_a_partition_by_statistics_asks_for_text():
    ffn = random_ffn(24)
    with pytest.raises(ValueError, match="reads the neurons' activations, and there are none: give it cali"):
        assign_neurons(PARTITIONS["coactivation"], ffn, NeuronStatistics(24), 4, 0, torch.empty(0))
    with pytest.raises(ValueError, match=r"unknown partition 'coactivations'; did you mean 'coactivation'\?"):
        decompose_layer(ffn, tokens(), spec_for(ffn, 4, 2, partition="coactivations"), 0, seed=0)


def test_statistics_of_a_wide_ffn_in_bfloat16_partition_it_almost_as_in_float32(monkeypatch):
    ffn, x_TD = random_ffn(48), tokens(500)
    narrow = neuron_statistics(ffn, x_TD, "sums")
    monkeypatch.setattr(activations, "WIDEST_MOMENTS", 40)
    wide = neuron_statistics(ffn, x_TD, "sums")
    torch.testing.assert_close(wide.energy(ffn), narrow.energy(ffn), rtol=0.03, atol=0)


def test_the_oracle_of_a_wide_layer_in_bfloat16_chooses_almost_as_well_as_in_float32(monkeypatch):
    ffn, x_TD = random_ffn(48), tokens(500)
    moe = decompose_layer(ffn, x_TD, spec_for(ffn, 8, 2, partition="coactivation"), 0, seed=0)
    exact = oracle.survey(moe, x_TD)
    monkeypatch.setattr(activations, "WIDEST_MOMENTS", 40)
    rounded = oracle.survey(moe, x_TD)
    best, found = (oracle.fit_scale(exact.grams, survey.chosen_TE) for survey in (exact, rounded))
    assert found.error == pytest.approx(best.error, rel=1e-3)
    assert found.scale == pytest.approx(best.scale, rel=1e-2)


@given(st.integers(1, 5), st.integers(0, 15), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_no_assignment_into_experts_of_equal_size_is_cheaper(E, more, seed, guess):
    random = np.random.default_rng(seed)
    cost_EF = random.integers(0, 9, (E, E + more)).astype(float)  # of which many are the same
    labels_F, _ = clustering.balanced_assignment(cost_EF, guess * random.standard_normal(E))
    base, spare = divmod(E + more, E)
    assert sorted(np.bincount(labels_F, minlength=E)) == [base] * (E - spare) + [base + 1] * spare
    cheapest = np.inf
    for wider in combinations(range(E), spare):
        places = cost_EF[np.concatenate([np.repeat(np.arange(E), base), np.array(wider, dtype=int)])]
        cheapest = min(cheapest, places[linear_sum_assignment(places)].sum())
    assert cost_EF[labels_F, np.arange(E + more)].sum() == pytest.approx(cheapest)


def test_neurons_that_are_all_alike_are_shared_out_evenly():
    found_F = clustering.balanced_kmeans(torch.zeros(30, 4), 4, seed=0)
    assert sorted(torch.bincount(found_F).tolist()) == [7, 7, 8, 8]


def test_clusters_are_found_through_the_projection_of_wide_ffns(monkeypatch):
    monkeypatch.setattr(clustering, "WIDEST_MOMENTS", 40)
    monkeypatch.setattr(clustering, "MOST_DIMENSIONS", 16)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    points_FP = tokens(4, 60).repeat_interleave(12, 0)[order] + 0.2 * tokens(48, 60, seed=2)
    found_F = clustering.balanced_kmeans(points_FP, 4, seed=0)
    assert all(len(found_F[order // 12 == group].unique()) == 1 for group in range(4))


# --- the best choice for as many experts on average -----------------------------------------------


def random_gram(count: int, num_experts: int, seed: int = 0) -> Tensor:
    """Gram matrices of random outputs, some tokens louder than others."""
    outputs_TED = torch.randn(count, num_experts, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return oracle.gram(outputs_TED * torch.linspace(0.1, 3, count, dtype=torch.float64).view(-1, 1, 1))


def error(gram_TEE: Tensor, chosen_TE: Tensor) -> Tensor:
    left_TE = 1 - chosen_TE.to(gram_TEE)
    return torch.einsum("te,tef,tf->t", left_TE, gram_TEE, left_TE)


@given(count=st.integers(1, 20), num_experts=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_error_of_a_prefix_is_that_of_its_experts(count, num_experts, seed):
    gram_TEE = random_gram(count, num_experts, seed)
    found_TE = prefix_errors(gram_TEE)
    for n in range(1, num_experts + 1):
        chosen_TE = (torch.arange(num_experts) < n).expand(count, num_experts)
        torch.testing.assert_close(found_TE[:, n - 1], error(gram_TEE, chosen_TE), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(num_experts=st.integers(2, 7), data=st.data(), seed=st.integers(0, 1000))
def test_no_prefixes_of_the_same_mean_length_have_a_smaller_error(num_experts, data, seed):
    mean = data.draw(st.floats(1, num_experts))
    gram_TEE = random_gram(50, num_experts, seed)
    count_T = prefix_choice(gram_TEE, mean)
    assert mean - num_experts / 50 < count_T.double().mean() <= mean + 1e-6
    errors_TE = prefix_errors(gram_TEE)
    best = errors_TE.gather(1, count_T.unsqueeze(1) - 1).sum()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):  # the same numbers, dealt to other tokens; and one expert moved between two tokens
        dealt_T = count_T[torch.randperm(50, generator=generator)]
        moved_T = count_T.clone()
        one, other = torch.randperm(50, generator=generator)[:2].tolist()
        if moved_T[one] > 1 and moved_T[other] < num_experts:
            moved_T[one] -= 1
            moved_T[other] += 1
        for other_T in (dealt_T, moved_T):
            assert errors_TE.gather(1, other_T.unsqueeze(1) - 1).sum() >= best - 1e-9


@settings(deadline=None, max_examples=40)
@given(num_experts=st.integers(2, 6), data=st.data(), seed=st.integers(0, 1000))
def test_no_experts_of_the_same_mean_number_have_a_smaller_error(num_experts, data, seed):
    most = data.draw(st.integers(1, num_experts))
    mean = data.draw(st.floats(1, most))
    gram_TEE = random_gram(50, num_experts, seed)
    chosen_TE, price = budget_choice(gram_TEE, mean, most)
    number_T = chosen_TE.sum(1)
    assert price >= 0 and number_T.min() >= 1 and number_T.max() <= most
    assert number_T.mean() <= mean + 1e-6
    assert price == 0 or number_T.mean() > mean - num_experts / 50  # for nothing, all are taken that lower an error
    best = error(gram_TEE, chosen_TE).sum()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        order_TE = torch.rand(50, num_experts, generator=generator).argsort(1).argsort(1)
        other_TE = order_TE < number_T[torch.randperm(50, generator=generator)].unsqueeze(1)
        assert error(gram_TEE, other_TE).sum() >= best - 1e-9


def test_as_many_experts_for_every_token_are_never_better_than_as_many_on_average():
    gram_TEE = random_gram(200, 6)
    for K in range(1, 7):
        fixed = error(gram_TEE, oracle.oracle(gram_TEE, K).chosen_TE).sum()
        assert error(gram_TEE, budget_choice(gram_TEE, K)[0]).sum() <= fixed + 1e-9


def test_the_greedy_budget_is_close_to_the_exact_one(monkeypatch):
    moe = random_moe(random_ffn(64), 8, 3)
    gram_TEE = oracle.gram(oracle.expert_outputs(moe, tokens(200)))
    exact, _ = budget_choice(gram_TEE, 3)
    monkeypatch.setattr(oracle, "MAX_SUBSETS", 0)
    greedy, _ = budget_choice(gram_TEE, 3)
    best = error(gram_TEE, exact).sum()
    assert best <= error(gram_TEE, greedy).sum() <= 1.1 * best


@settings(deadline=None, max_examples=40)
@given(layers=st.integers(1, 6), num_experts=st.integers(1, 6), data=st.data(), seed=st.integers(0, 1000))
def test_no_k_per_layer_within_the_budget_loses_less_than_the_allocated_one(layers, num_experts, data, seed):
    num_active = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    errors_LE = torch.rand(layers, num_experts, generator=generator, dtype=torch.float64)
    errors_LE = errors_LE.sort(1, descending=True).values
    active = budget.allocate(errors_LE, num_active * layers)
    assert len(active) == layers and sum(active) <= num_active * layers
    assert all(1 <= K <= num_experts for K in active)

    def lost(other) -> float:
        return sum(errors_LE[layer, K - 1].item() for layer, K in enumerate(other))

    assert lost(active) <= lost([num_active] * layers)
    for _ in range(30):
        other = torch.randint(1, num_experts + 1, (layers,), generator=generator).tolist()
        assert sum(other) > num_active * layers or lost(active) <= lost(other) + 1e-12


# --- a layer, whatever its selection --------------------------------------------------------------

SELECTIONS = ("topk", "threshold", "prefix")


def layer(selection: str, num_active: int = 3, **changes: object):
    """A mixture with a random partition, and a router that chooses as many experts on average."""
    ffn = random_ffn(48)
    spec = spec_for(ffn, 6, num_active, selection=selection, **changes)
    moe = decompose_layer(ffn, tokens(300), spec, 0, seed=0)
    torch.nn.init.normal_(moe.router.weight, generator=torch.Generator().manual_seed(0))
    return moe


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_survey_gains_rank_the_experts_as_the_best_choice_does(selection):
    moe, x_TD = layer(selection), tokens(300)
    found = oracle.survey(moe, x_TD, chunk=70)
    chosen_TE = found.chosen_TE.bool()
    assert chosen_TE.sum(1).float().mean() == pytest.approx(3, abs=6 / 300)
    if selection == "prefix":
        number_T = found.gain_TE.argmax(1) + 1
        assert (number_T != chosen_TE.sum(1)).float().mean() < 0.02  # tokens at the price itself may differ
    else:
        worst_in = found.gain_TE.masked_fill(~chosen_TE, torch.inf).amin(1)
        best_out = found.gain_TE.masked_fill(chosen_TE, -torch.inf).amax(1)
        assert (worst_in >= best_out - 1e-6).float().mean() > (0.99 if selection == "topk" else 0.9)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_router_beats_the_best_choice_of_as_many_experts(selection):
    moe, x_TD = layer(selection), tokens(300)
    fit.calibrate(moe, x_TD)
    found = oracle.diagnose(moe, x_TD, chunk=70)
    assert 0 < found["oracle_error"] < found["router_error"]
    assert found["mean_active"] == pytest.approx(3, abs=0.1)
    assert found["captured_energy"] == pytest.approx(1 - found["router_error"] ** 2)
    assert 0 < found["router_recall"] < 1
    assert oracle.best_scale(moe, x_TD).error == pytest.approx(found["oracle_error"], rel=0.05)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_a_layer_loses_falls_with_every_expert_down_to_nothing(selection):
    errors_E = budget.errors_by_active(layer(selection), tokens(300))
    assert (errors_E.diff() < 0).all() and errors_E[-1] < 1e-6 < errors_E[-2]
    assert errors_E[2].sqrt().item() == pytest.approx(oracle.best_scale(layer(selection), tokens(300)).error)


# --- the stage ------------------------------------------------------------------------------------

SMALL = (
    "teacher.source=teacher",
    "data.corpus=texts.jsonl",
    "data.calibration_texts=40",
    "data.evaluation_pairs=30",
    "teacher.max_length=32",
    "decompose.calibration_tokens=400",
    "decompose.num_experts=4",
    "distill.batch_tokens=256",
    "train_router.batch_tokens=256",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    make_tiny_bert(root / "teacher", ffn_width=60)
    write_corpus(root / "texts.jsonl", make_texts(200))
    prepare.run(make_stage("prepare", root, *SMALL))
    return root


@pytest.mark.parametrize(
    "chosen",
    [
        ("shared_width=9",),
        ("active_per_layer=budget",),
        ("active_per_layer=[1, 3]",),
    ],
    ids=" ".join,
)
def test_decompose_makes_what_is_asked_and_all_experts_are_the_dense_model(chosen, prepared, tmp_path: Path):
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    decompose.run(make_stage("decompose", root, *SMALL, *(f"decompose.{setting}" for setting in chosen)))
    found = json.loads((root / "metrics/decompose.json").read_text())
    assert found["identity_max_abs"] <= 1e-5
    spec = checkpoint.load_spec(root / "models/decomposed")
    asked = dict(setting.split("=") for setting in chosen)
    assert spec.partition == "coactivation"
    rows = found["layers"]
    assert [row["num_active"] for row in rows] == [spec.active_of(0), spec.active_of(1)]
    if asked.get("active_per_layer") == "budget":
        assert len(spec.active_per_layer) == 2 and sum(spec.active_per_layer) <= 4
    if asked.get("active_per_layer") == "[1, 3]":
        assert spec.active_per_layer == (1, 3)
    assert spec.shared_width == int(asked.get("shared_width", 0))


def test_elastic_budgets_are_in_the_spec_in_order(prepared, tmp_path: Path):
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    decompose.run(make_stage("decompose", root, *SMALL, "distill.elastic=[4, 1]"))
    assert checkpoint.load_spec(root / "models/decomposed").elastic == (1, 4)
