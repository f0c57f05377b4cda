"""The selections that left the core, `threshold` and `prefix`: each is chosen, trained and kept by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks.ablation.methods  # noqa: F401 - registers the selections
from ffn2moe.choices import GATES
from ffn2moe.moe import fit
from ffn2moe.moe.router import Router
from tests import test_selection as core
from tests.mixtures import flat_spec
from tests.test_selection import D, E, make_moe, normal

WAYS = [*(("threshold", gate) for gate in GATES), ("prefix", "unit")]
KINDS = [
    {"selection": "threshold", "max_active": 3},
    {"selection": "threshold", "gate": "softmax"},
    {"selection": "prefix"},
]


# --- as every selection (tests/test_selection.py) ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_the_grouped_layer_is_the_reference(selection, gate, shared, training):
    core.test_the_grouped_layer_is_the_reference_however_experts_are_chosen(selection, gate, shared, training)


@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_all_experts_with_equal_scores_give_the_dense_ffn(selection, gate):
    core.test_a_router_that_scores_all_alike_and_all_experts_give_the_dense_ffn(selection, gate)


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(
    ("selection", "gate", "num_active"),
    # A prefix of 1 is refused: its router has nothing to choose.
    [*((*way, active) for way in WAYS[:-1] for active in (1, 2, 3)), ("prefix", "unit", 2)],
)
def test_every_parameter_learns_from_the_loss(selection, gate, num_active, shared):
    core.test_every_parameter_learns_from_the_loss(selection, gate, num_active, shared)


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_inner_products_give_the_scales_that_outputs_give(selection, gate, shared):
    core.test_inner_products_give_the_scales_that_outputs_give(selection, gate, shared)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_gives_every_model_back_bit_for_bit(tiny_teacher, tmp_path, kind):
    core.test_a_checkpoint_gives_every_model_back_bit_for_bit(tiny_teacher, tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_every_expert_the_model_is_its_teacher(tiny_teacher, kind):
    core.test_with_every_expert_the_model_is_its_teacher(tiny_teacher, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_distillation_reaches_every_router(tiny_teacher, kind):
    core.test_distillation_reaches_every_router(tiny_teacher, kind)


# --- their own definitions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "prefix", "gate": "softmax"}, "use the gate unit"),
        ({"selection": "prefix", "num_active": 1}, "the router has nothing to choose"),
        ({"selection": "threshold", "max_active": 1}, "must be between num_active = 2"),
        ({"selection": "threshold", "active_per_layer": (1, 3)}, "use selection topk, or leave active_per_layer out"),
        ({"selection": "threshold", "elastic": (1,)}, "use selection topk, or leave elastic out"),
        ({"container": "mixtral", "selection": "threshold"}, "use container none"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        flat_spec(**{"num_experts": E, "num_active": 2} | changes)


@settings(deadline=None, max_examples=60)
@given(
    selection=st.sampled_from(["threshold", "prefix"]),
    num_active=st.integers(1, E),
    most=st.integers(1, E),
    seed=st.integers(0, 99),
)
def test_calibrated_tokens_use_k_experts_on_average(selection, num_active, most, seed):
    max_active = max(num_active, most) if selection == "threshold" else None
    router = Router(D, E, selection=selection, max_active=max_active)
    scores_TE = normal(500, E, seed=seed)
    router.calibrate(scores_TE, num_active)
    choice = router.choose(scores_TE, num_active)
    count_T = choice.count_T()
    assert abs(count_T.double().mean() - num_active) <= 0.01
    assert count_T.min() >= 1 and count_T.max() <= (max_active or E)


def test_threshold_uses_the_experts_within_the_margin_of_the_best_and_no_others():
    router = Router(D, E, selection="threshold", max_active=4)
    scores_TE = normal(200, E, seed=7)
    router.calibrate(scores_TE, 2)
    p_TE = scores_TE.softmax(-1)
    share = math.exp(-router.margin.item())  # 1 - tau of D2DMoE
    wanted_TE = p_TE >= share * p_TE.amax(1, keepdim=True)
    few_T = wanted_TE.sum(1) <= 4
    used_TE = router.choose(scores_TE, 2).indicator_TE(E).bool()
    assert few_T.any() and torch.equal(used_TE[few_T], wanted_TE[few_T])
    best_TK = scores_TE.topk(4).indices
    assert torch.equal(used_TE[~few_T], torch.zeros_like(used_TE).scatter(1, best_TK, True)[~few_T])


def test_a_balance_bias_moves_the_choice_of_threshold():
    router = Router(D, E, selection="threshold")
    scores_TE = normal(50, E, seed=7)
    router.balance_bias[3] = 100.0
    assert router.choose(scores_TE, 2).indicator_TE(E).sum(0).argmax() == 3
    router.balance(torch.tensor([0, 0, 0, 50, 0, 0]), step=1.0)
    assert router.balance_bias[3] < 100.0


def test_prefix_uses_the_first_experts_up_to_the_number_that_scores_highest():
    router = Router(D, E, selection="prefix")
    scores_TE = normal(200, E, seed=8)
    router.calibrate(scores_TE, 3)
    price_E = -router.balance_bias
    torch.testing.assert_close(price_E, price_E[0] * torch.arange(1.0, E + 1))
    count_T = (scores_TE - price_E).argmax(1) + 1
    choice = router.choose(scores_TE, 3)
    assert torch.equal(choice.count_T(), count_T)
    assert torch.equal(choice.indicator_TE(E), (torch.arange(E) < count_T.unsqueeze(1)).float())


def test_balancing_leaves_the_price_of_a_prefix_alone():
    router = Router(D, E, selection="prefix")
    router.balance(torch.arange(E), step=1.0)
    assert not router.balance_bias.any()


@pytest.mark.parametrize("selection", ["threshold", "prefix"])
def test_following_reaches_what_calibration_finds(selection):
    scores_TE = normal(300, E, seed=9)
    calibrated, followed = (Router(D, E, selection=selection) for _ in range(2))
    calibrated.calibrate(scores_TE, 2)
    for _ in range(200):
        followed.follow(scores_TE, 2, rate=0.1)
    for name, buffer in followed.named_buffers():
        torch.testing.assert_close(buffer, calibrated.get_buffer(name))


@pytest.mark.parametrize("gate", GATES.names())
def test_a_pair_that_is_not_used_has_gate_0(gate):
    router = Router(D, E, gate, selection="threshold")
    scores_TE = normal(100, E, seed=9)
    router.calibrate(scores_TE, 2)
    choice = router.choose(scores_TE, 2)
    assert choice.used_TK is not None and not choice.used_TK.all()
    for training in (False, True):
        gate_TK = router.weigh(scores_TE, choice, training)
        assert not gate_TK[~choice.used_TK].any() and (gate_TK[choice.used_TK] > 0).all()


def test_a_prefix_passes_the_probability_that_it_reaches_each_expert_straight_through():
    router = Router(D, E, selection="prefix")
    scores_TE = normal(30, E, seed=10).requires_grad_(True)
    router.calibrate(scores_TE.detach(), 3)
    choice = router.choose(scores_TE, 3)
    value_TE = normal(30, E, seed=11)
    (router.weigh(scores_TE, choice, training=True) * value_TE).sum().backward()
    found = scores_TE.grad
    again_TE = scores_TE.detach().requires_grad_(True)
    p_TE = (again_TE + router.balance_bias).softmax(-1)
    reached_TE = torch.stack([p_TE[:, n:].sum(1) for n in range(E)], dim=1)
    (reached_TE * choice.indicator_TE(E) * value_TE).sum().backward()
    torch.testing.assert_close(found, again_TE.grad)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "unit"])
def test_the_scale_of_the_gates_leaves_the_choice_of_threshold_alone(gate):
    moe = make_moe(selection="threshold", gate=gate)
    x_TD = normal(300, D, seed=6)
    fit.calibrate(moe, x_TD)
    before = moe.router.choose(moe.router(x_TD), 2)
    fit.fit_router_scale(moe, x_TD)
    after = moe.router.choose(moe.router(x_TD), 2)
    assert moe.router.scale != 1
    assert torch.equal(before.indicator_TE(E), after.indicator_TE(E))


@pytest.mark.parametrize("selection", ["threshold", "prefix"])
def test_training_keeps_the_mean_number_of_experts_and_ends_at_it(tiny_teacher, selection):
    model, _ = core.carve(tiny_teacher, num_experts=8, num_active=3, selection=selection)
    for step in core.distiller(tiny_teacher, model, 60, learning_rate=3e-3).run():
        if step.step == 59:
            assert core.mean_active(model) == pytest.approx([3, 3], abs=0.5)
    assert core.mean_active(model) == pytest.approx([3, 3], abs=0.1)  # one of these 82 tokens may change by 7 at once
