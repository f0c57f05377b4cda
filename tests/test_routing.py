"""Routers: where they start, what they are trained towards, and that they find it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import benchmarks.ablation.methods  # noqa: F401 - registers selections whose number of experts varies
from ffn2moe.choices import GATES
from ffn2moe.decompose import oracle
from ffn2moe.decompose.evidence import RouterData
from ffn2moe.decompose.layer import dense_ffn, outputs
from ffn2moe.decompose.objectives import OBJECTIVES, Phase
from ffn2moe.decompose.objectives.oracle import router_loss, softmax_target
from ffn2moe.decompose.oracles import ORACLES
from ffn2moe.decompose.reconstruct import refit_outputs, relative_error
from ffn2moe.decompose.regret import draw_probabilities, independent_error
from ffn2moe.decompose.route import RouterSettings, fit_router, route_layer
from ffn2moe.decompose.router_fit import train_router
from ffn2moe.decompose.starts import STARTS, RouterStart
from ffn2moe.decompose.starts.ridge import ridge
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.fit import calibrate
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.moe.router import Router
from ffn2moe.spec import MoESpec
from tests.mixtures import flat_spec

SELECTIONS = ("topk", "threshold", "prefix")
WIDTH, EXPERTS, EACH = 16, 6, 8  # D, E and M of the toy
TRAINING = {"ridge": 1e-2, "steps": 60, "batch_tokens": 500, "learning_rate": 0.05, "seed": 0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy_spec(expert_width: int, *, gated: bool, shared: int, num_active: int = 2, **changes: Any) -> MoESpec:
    return flat_spec(
        width=WIDTH,
        ffn_width=EXPERTS * EACH,
        expert_width=expert_width,
        shared_width=shared,
        num_experts=EXPERTS,
        num_active=num_active,
        gated=gated,
        activation="silu" if gated else "gelu",
        **changes,
    )


def toy(*, gated: bool = False, shared: int = 0, num_active: int = 2, **changes: Any) -> MoEFFN:
    """A layer in whose FFN every expert answers to a direction of its own; with padding where S > 0."""
    routed, total = EXPERTS * EACH - shared, EXPERTS * EACH
    direction_ED = F.normalize(normal(EXPERTS, WIDTH, seed=1), dim=1)
    expert_of_neuron_F = torch.full((total,), -1)
    expert_of_neuron_F[shared:] = torch.arange(routed) * EXPERTS // routed
    rows_FD = direction_ED[expert_of_neuron_F.clamp(min=0)] + 0.1 * normal(total, WIDTH, seed=2)
    ffn = DenseFFN(
        w_in_FD=normal(total, WIDTH, seed=3) if gated else rows_FD,
        w_out_DF=normal(WIDTH, total, seed=4),
        activation="silu" if gated else "gelu",
        b_in_F=None if gated else -0.5 + 0.1 * normal(total, seed=5),
        b_out_D=None if gated else normal(WIDTH, seed=6),
        w_gate_FD=rows_FD if gated else None,
    )
    neurons_EM = neurons_by_expert(expert_of_neuron_F, EXPERTS)
    spec = toy_spec(neurons_EM.shape[1], gated=gated, shared=shared, num_active=num_active, **changes)
    shared_S = torch.arange(shared)
    return MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM, shared_S), neurons_EM, 0, shared_S).eval()


def tokens(count: int = 1500, seed: int = 7) -> Tensor:
    """Each in the direction of two experts, more or less."""
    direction_ED = F.normalize(normal(EXPERTS, WIDTH, seed=1), dim=1)
    share_TE = torch.rand(count, EXPERTS, generator=torch.Generator().manual_seed(seed)) ** 4
    return 4 * share_TE @ direction_ED + 0.2 * normal(count, WIDTH, seed=seed)


@pytest.fixture
def blank() -> Iterator[str]:
    """The name of a start at zeros, so that what is found is learnt."""
    zeros = (torch.zeros(EXPERTS, WIDTH), torch.zeros(EXPERTS))
    STARTS.register("blank", RouterStart("a control", lambda data, penalty: zeros, single_experts=False))
    yield "blank"
    STARTS.forget("blank")


def data_of(moe: MoEFFN, x_TD: Tensor) -> RouterData:
    return RouterData(moe, x_TD, x_TD, oracle.survey(moe, x_TD), 4096)


def fit(moe: MoEFFN, x_TD: Tensor, **changes: Any) -> list[float]:
    return fit_router(moe, x_TD, RouterSettings(**TRAINING | changes))


def recall(moe: MoEFFN, x_TD: Tensor) -> float:
    return oracle.diagnose(moe, x_TD)["router_recall"]


# --- where a router starts ------------------------------------------------------------------------------------------


def test_ridge_recovers_a_linear_map():
    x_TD = normal(400, WIDTH)
    weight_ED, bias_E = normal(5, WIDTH, seed=1), normal(5, seed=2)
    found_ED, found_E = ridge(x_TD, x_TD @ weight_ED.T + bias_E, penalty=1e-9)
    torch.testing.assert_close(found_ED, weight_ED, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_E, bias_E, rtol=1e-4, atol=1e-4)


def test_ridge_without_intercept_ranks_as_the_targets_do_and_has_no_bias():
    x_TD = normal(400, WIDTH)
    truth_ED = normal(4, WIDTH, seed=5)
    weight_ED, bias_E = ridge(x_TD, x_TD @ truth_ED.T + 7.0, 1e-6, intercept=False)
    assert bias_E.abs().max() == 0
    assert torch.equal((x_TD @ weight_ED.T).argmax(1), (x_TD @ truth_ED.T).argmax(1))


# --- the objective -------------------------------------------------------------------------------


def test_the_routers_target_has_the_entropy_of_k_equal_choices():
    q_TE = softmax_target(normal(200, 8), num_active=3)
    entropy = -(q_TE * q_TE.log()).sum(-1).mean().item()
    assert entropy == pytest.approx(math.log(3), abs=1e-3)
    assert softmax_target(normal(20, 8), num_active=1).sum(-1).eq(1).all()


def test_the_router_loss_is_zero_only_at_the_target():
    q_TE = softmax_target(normal(50, 8), num_active=2)
    assert router_loss(q_TE.log(), q_TE).item() == pytest.approx(0, abs=1e-6)
    assert router_loss(torch.zeros(50, 8), q_TE).item() > 0.1


@pytest.mark.parametrize("num_active", [1, 2, 5])
def test_the_expected_regret_is_0_for_the_best_choice_and_1_for_a_blind_one(num_active):
    moe, x_TD = toy(num_active=num_active), tokens(300)
    survey, rows = oracle.survey(moe, x_TD), torch.arange(300)
    loss = ORACLES["topk"].regret(moe, survey)
    assert loss(torch.zeros(300, EXPERTS), rows).item() == pytest.approx(1.0, rel=1e-4)
    scale = oracle.fit_scale(survey.grams, survey.chosen_TE).scale
    best_TE = oracle.oracle(survey.grams.gram_REE, num_active, scale).chosen_TE
    assert loss(1e4 * best_TE, rows).item() == pytest.approx(0.0, abs=1e-4)


def test_the_expected_error_of_independent_draws_is_the_mean_over_draws():
    gram_TEE = oracle.gram(normal(3, EXPERTS, WIDTH))
    p_TE = torch.rand(3, EXPERTS, generator=torch.Generator().manual_seed(0))
    total_T = torch.zeros(3)
    for count in range(EXPERTS + 1):
        m_CE = oracle.subsets(EXPERTS, count) if count else torch.zeros(1, EXPERTS)
        chance_TC = (p_TE.unsqueeze(1) * m_CE + (1 - p_TE).unsqueeze(1) * (1 - m_CE)).prod(2)
        total_T += (chance_TC * oracle.subset_errors(gram_TEE, m_CE, 1.2)).sum(1)
    torch.testing.assert_close(independent_error(gram_TEE, p_TE, 1.2), total_T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("together", [False, True])
def test_draws_add_up_to_k_and_stay_so_to_first_order(together):
    scores_TE = (3 * normal(9, EXPERTS)).double().requires_grad_(True)
    p_TE = draw_probabilities(scores_TE, 2, together=together)
    assert p_TE.sum().item() == pytest.approx(18, abs=1e-4)
    assert together or (p_TE.sum(1) - 2).abs().max() < 1e-4
    (gradient_TE,) = torch.autograd.grad(p_TE.sum(), scores_TE)
    assert gradient_TE.abs().max() < 1e-6


def test_above_so_many_subsets_the_choice_is_learnt_from_single_draws(monkeypatch, blank):
    moe, x_TD = toy(), tokens()
    monkeypatch.setattr("ffn2moe.decompose.oracles.topk.MAX_ENUMERATED", 10)
    losses = fit(moe, x_TD, start=blank)
    assert losses[-1] < 0.5 * losses[len(losses) // 3]
    assert recall(moe, tokens(seed=8)) > 0.75


# --- the training ---------------------------------------------------------------------------------------------------


def test_a_trained_router_finds_what_a_linear_map_can_find():
    x_TD, weight_ED = normal(2000, WIDTH), normal(6, WIDTH, seed=9)
    target_TE = softmax_target(x_TD @ weight_ED.T, num_active=2)
    router = Router(WIDTH, 6)
    whole = [Phase(1.0, lambda scores_BE, rows: router_loss(scores_BE, target_TE[rows]))]
    losses = list(train_router(router, x_TD, whole, steps=150, batch_rows=500, learning_rate=0.05, seed=0))
    assert losses[-1] < 0.05 * losses[0]
    chosen_TE = router.choose(router(x_TD), 2).indicator_TE(6)
    assert (chosen_TE * target_TE).sum() > 0.95 * target_TE.topk(2).values.sum()


@pytest.mark.parametrize("router_bias", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_a_router_learns_the_oracles_choice_and_changes_no_expert(gated, router_bias, blank):
    moe, x_TD = toy(gated=gated, router_bias=router_bias, shared=5), tokens()
    before = [moe.w_in.clone(), moe.w_out.clone()]
    losses = fit(moe, x_TD, start=blank)
    assert len(losses) == TRAINING["steps"]
    assert losses[-1] < losses[0]
    assert recall(moe, tokens(seed=8)) > 0.6
    assert router_bias or moe.router.bias.abs().max() == 0
    assert torch.equal(moe.w_in, before[0]) and torch.equal(moe.w_out, before[1])


def test_a_start_and_an_objective_that_do_not_exist_are_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown router start 'rigde'; did you mean 'ridge'\?"):
        fit(toy(), tokens(), start="rigde")
    with pytest.raises(ValueError, match=r"unknown router objective 'oracles'; did you mean 'oracle'\?"):
        fit(toy(), tokens(), objective="oracles")


@pytest.mark.parametrize("gate", GATES.names())
def test_with_every_gate_a_fitted_layer_is_nearer_to_the_dense_one_than_its_mean(gate):
    moe, x_TD = toy(gate=gate), tokens()
    dense_TD = moe.all_experts(x_TD)
    fit(moe, x_TD)
    left = (moe(x_TD) - dense_TD).square().sum()
    assert left < 0.7 * (dense_TD - dense_TD.mean(0)).square().sum()


def test_experts_that_are_all_alike_have_a_target_where_subnormal_numbers_are_zero():
    torch.set_flush_denormal(True)
    try:
        target_TE = softmax_target(torch.zeros(5, EXPERTS), 2)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(target_TE, torch.full((5, EXPERTS), 1 / EXPERTS))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_is_fitted_and_uses_k_experts_on_average(selection):
    moe, x_TD = toy(selection=selection), tokens()
    losses = fit_router(moe, x_TD, RouterSettings(**TRAINING))
    assert losses[-1] < losses[len(losses) // 3]
    found = oracle.diagnose(moe, x_TD)
    assert found["mean_active"] == pytest.approx(2, abs=0.02)
    blind = toy(selection=selection)
    blind.router.set(normal(EXPERTS, WIDTH, seed=11), torch.zeros(EXPERTS))
    calibrate(blind, x_TD)
    assert found["router_error"] < oracle.diagnose(blind, x_TD)["router_error"]


@pytest.mark.parametrize(
    ("selection", "num_active"),
    [("topk", 1), ("threshold", 1), *((selection, EXPERTS) for selection in SELECTIONS)],
)
def test_one_expert_or_all_of_them_are_fitted_too(selection, num_active):
    moe, x_TD = toy(selection=selection, num_active=num_active), tokens()
    losses = fit(moe, x_TD)
    assert torch.tensor(losses).isfinite().all() and moe.router.weight.isfinite().all()
    assert oracle.diagnose(moe, x_TD)["mean_active"] == pytest.approx(num_active, abs=0.02)


def test_the_last_phase_ends_better_by_the_criterion_than_the_first_alone():
    moe, x_TD = toy(), tokens()
    fit(moe, x_TD)
    found = oracle.diagnose(moe, tokens(seed=8))["router_error"]
    data = data_of(moe, x_TD)
    moe.router.set(*STARTS["ridge"].weights(data, 1e-2))
    convex = [Phase(1.0, OBJECTIVES["oracle"].phases(data)[0].loss)]
    list(train_router(moe.router, x_TD, convex, steps=60, batch_rows=500, learning_rate=0.05, seed=0))
    assert found < oracle.diagnose(moe, tokens(seed=8))["router_error"]


def test_the_temperature_falls_from_what_is_asked_to_1():
    seen = []

    def loss(scores_BE: Tensor, rows: Tensor) -> Tensor:
        seen.append(scores_BE.detach().std().item())
        return 0 * scores_BE.sum()

    router, x_RD = Router(WIDTH, EXPERTS), normal(50, WIDTH)
    router.set(normal(EXPERTS, WIDTH, seed=1), torch.zeros(EXPERTS))
    halves = [Phase(0.5, loss), Phase(0.5, loss)]
    training = {"steps": 11, "batch_rows": 10**6, "learning_rate": 0.1, "seed": 0}
    list(train_router(router, x_RD, halves, temperature=8.0, **training))
    annealed = seen.copy()
    seen.clear()
    list(train_router(router, x_RD, halves, **training))
    factor = [plain / cooled for plain, cooled in zip(seen, annealed, strict=True)]
    # Batches are drawn alike, so that the scores differ by the temperature alone.
    assert factor == pytest.approx([8 ** (1 - step / 10) for step in range(11)], rel=1e-4)


def test_annealing_changes_what_is_learnt_and_still_learns():
    plain, annealed = toy(), toy()
    fit(plain, tokens())
    fit(annealed, tokens(), temperature=4.0)
    assert not torch.equal(plain.router.weight, annealed.router.weight)
    assert recall(annealed, tokens(seed=8)) > 0.75


def test_no_steps_leave_the_start():
    moe, x_TD = toy(), tokens()
    assert fit(moe, x_TD, steps=0) == []
    weight_ED, bias_E = ridge(x_TD, oracle.survey(moe, x_TD).norm_TE, 1e-2)
    torch.testing.assert_close(moe.router.weight, weight_ED, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moe.router.bias, bias_E, rtol=1e-3, atol=1e-4)


# --- the whole of one layer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared", [0, 5])
def test_a_layer_is_routed_as_its_steps_one_by_one_would_do_it(gated, shared):
    settings = RouterSettings(**TRAINING, refit=0.1)
    moe, by_hand = toy(gated=gated, shared=shared), toy(gated=gated, shared=shared)
    x_TD, held_out_TD = tokens(), tokens(seed=8)
    found = route_layer(moe, x_TD, settings, held_out_TD=held_out_TD)
    ffn = dense_ffn(by_hand)
    losses = fit_router(by_hand, x_TD, settings)
    judged = oracle.diagnose(by_hand, held_out_TD)
    refit_outputs(by_hand, x_TD, outputs(ffn, x_TD), penalty=0.1)
    for name, one in moe.state_dict().items():  # alike, not to the bit: the experts' sum replaces the dense output
        torch.testing.assert_close(one, by_hand.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert found.losses == losses
    error = relative_error(moe, held_out_TD, outputs(ffn, held_out_TD))
    assert found.row == pytest.approx(judged | {"scale": moe.output_scale.item(), "refit_error": error}, rel=1e-4)
    assert error < found.row["router_error"]


def test_without_a_refit_and_held_out_tokens_the_experts_stay_and_the_same_tokens_judge():
    moe, x_TD = toy(), tokens()
    before = moe.w_out.clone()
    found = route_layer(moe, x_TD, RouterSettings(**TRAINING, refit=0.0))
    assert torch.equal(moe.w_out, before) and "refit_error" not in found.row
    assert found.row["router_error"] == oracle.diagnose(moe, x_TD)["router_error"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared", [0, 5])
def test_the_dense_ffn_of_a_decomposed_layer_comes_back_to_the_bit(gated, shared):
    moe = toy(gated=gated, shared=shared)
    ffn = dense_ffn(moe)
    again = MoEFFN.from_experts(
        toy_spec(moe.neurons.shape[1], gated=gated, shared=shared),
        slice_experts(ffn, moe.neurons, moe.shared_neurons),
        moe.neurons,
        0,
        moe.shared_neurons,
    )
    for name, tensor in moe.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
