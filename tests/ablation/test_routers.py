"""Router starts and objectives of the ablation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.ablation.methods.objectives import activation_mass, prior_approximate_loss, prior_label
from ffn2moe.choices import GATES
from ffn2moe.decompose import oracle
from ffn2moe.decompose.objectives import OBJECTIVES
from ffn2moe.decompose.starts import STARTS
from tests.test_routing import EXPERTS, TRAINING, WIDTH, data_of, fit, normal, recall, tokens, toy

NAMES = ("centroid", "mean_row", "representative", "ridge", "zeros")


@pytest.fixture(autouse=True)
def _no_gradients():
    """Starts are computed without gradients, as `fit_router` does it."""
    with torch.no_grad():
        yield


def test_the_ablation_has_every_start_and_objective_by_name():
    assert set(NAMES) <= set(STARTS) and {"factorllm", "mass", "norm", "oracle"} <= set(OBJECTIVES)


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("router_bias", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", NAMES)
def test_every_start_is_finite_has_the_routers_shape_and_knows_more_than_chance(method, gated, router_bias, shared):
    moe, x_TD = toy(gated=gated, router_bias=router_bias, shared=shared), tokens()
    weight_ED, bias_E = STARTS[method].weights(data_of(moe, x_TD), 1e-2)
    assert weight_ED.shape == moe.router.weight.shape and bias_E.shape == moe.router.bias.shape
    assert weight_ED.isfinite().all() and bias_E.isfinite().all()
    assert router_bias or bias_E.abs().max() == 0
    moe.router.set(weight_ED, bias_E)
    if method != "zeros":
        assert recall(moe, x_TD) > 0.5  # chance is 2 in 6


@pytest.mark.parametrize("method", ["centroid", "representative", "mean_row"])
def test_scores_of_a_start_from_rows_are_apart_by_one(method):
    moe, x_TD = toy(), 50 * tokens()
    weight_ED, bias_E = STARTS[method].weights(data_of(moe, x_TD), 1e-2)
    scores_TE = F.linear(x_TD, weight_ED, bias_E)
    assert (scores_TE - scores_TE.mean(1, keepdim=True)).square().mean() == pytest.approx(1.0, rel=1e-4)


def test_mean_row_and_centroid_leave_out_what_fills_an_expert_up():
    moe, x_TD = toy(shared=5), tokens()  # 43 neurons for 6 experts of 8
    assert (moe.neurons < 0).any()
    for method, rows_EMD in (("mean_row", moe.w_in), ("centroid", F.normalize(moe.w_in, dim=2))):
        weight_ED, _ = STARTS[method].weights(data_of(moe, x_TD), 1e-2)
        real_EM = (moe.neurons >= 0).float()
        mean_ED = (rows_EMD * real_EM.unsqueeze(2)).sum(1) / real_EM.sum(1, keepdim=True)
        torch.testing.assert_close(F.normalize(weight_ED.flatten(), dim=0), F.normalize(mean_ED.flatten(), dim=0))


def test_a_representative_is_a_neuron_of_the_expert_that_fires_as_the_others_do():
    moe, x_TD = toy(), tokens()
    with torch.no_grad():
        moe.w_in[:, 0] = -moe.w_in[:, 0]  # fires on other tokens
        moe.w_in[:, 1] = 0.0  # never fires
    weight_ED, _ = STARTS["representative"].weights(data_of(moe, x_TD), 1e-2)
    for row_D, rows_MD in zip(weight_ED, moe.w_in.detach(), strict=True):
        assert int(F.cosine_similarity(row_D, rows_MD).argmax()) >= 2
        assert F.cosine_similarity(row_D, rows_MD).max() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("num_active", [1, 2, 5])
def test_factorllms_label_marks_the_experts_nearest_to_their_share_of_the_output(num_active):
    outputs_TED = normal(60, EXPERTS, WIDTH)
    target_T1D = outputs_TED.sum(1, keepdim=True) / (EXPERTS / num_active)
    error_TE = (outputs_TED - target_T1D).square().mean(-1)
    label_TE = prior_label(oracle.gram(outputs_TED), num_active)
    assert label_TE.sum(1).eq(num_active).all()
    inside, outside = error_TE.masked_fill(label_TE == 0, -1), error_TE.masked_fill(label_TE == 1, math.inf)
    assert (inside.amax(1) <= outside.amin(1)).all()


def test_factorllms_label_names_idle_experts_where_the_useful_ones_have_nothing_in_common():
    """Of y = E_0 + E_1, orthogonal, E_0 is further from y / 3 than nothing is: one reason why the oracle took over."""
    outputs_1ED = torch.eye(EXPERTS, WIDTH).unsqueeze(0)
    outputs_1ED[:, 2:] *= 1e-3
    gram_1EE = oracle.gram(outputs_1ED)
    assert prior_label(gram_1EE, 2)[0, :2].sum() == 0
    assert oracle.oracle(gram_1EE, 2).chosen_TE[0, :2].sum() == 2


def test_factorllms_loss_is_the_reverse_divergence_to_the_softmax_of_the_label():
    outputs_TED, scores_TE = normal(60, EXPERTS, WIDTH), normal(60, EXPERTS, seed=1)
    p_TE, q_TE = scores_TE.softmax(1), prior_label(oracle.gram(outputs_TED), 2).softmax(1)
    expected = (p_TE * (p_TE / q_TE).log()).sum(1).mean()
    torch.testing.assert_close(prior_approximate_loss(scores_TE, outputs_TED, 2), expected)


def test_the_mass_of_an_expert_is_the_sum_of_its_positive_activations():
    moe, x_TD = toy(), tokens(40)
    h_EM = F.gelu(torch.einsum("emd,d->em", moe.w_in, x_TD[3]) + moe.b_in)
    torch.testing.assert_close(activation_mass(moe, x_TD)[3], h_EM.relu().sum(1).detach())


@pytest.mark.parametrize("router_bias", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("objective", ["factorllm", "mass", "norm"])
def test_every_objective_lowers_its_loss_and_finds_the_experts_it_names(objective, gated, router_bias):
    moe, x_TD = toy(gated=gated, router_bias=router_bias, shared=5), tokens()
    before = [moe.w_in.clone(), moe.w_out.clone()]
    losses = fit(moe, x_TD, start="zeros", objective=objective)
    assert len(losses) == TRAINING["steps"]
    assert losses[-1] < losses[0]
    judged_TD = tokens(seed=8)
    if objective == "factorllm":
        label_TE = prior_label(oracle.survey(moe, judged_TD).grams.gram_REE, moe.num_active)
        chosen_TE = moe.router.choose(moe.router(judged_TD), moe.num_active).indicator_TE(EXPERTS)
        assert (chosen_TE * label_TE).sum() / label_TE.sum() > 0.6  # chance is 2 in 6
    else:
        assert recall(moe, judged_TD) > 0.6
    assert router_bias or moe.router.bias.abs().max() == 0
    assert torch.equal(moe.w_in, before[0]) and torch.equal(moe.w_out, before[1])


@pytest.mark.parametrize("gate", GATES.names())
@pytest.mark.parametrize("start", NAMES)
def test_with_every_gate_a_fitted_layer_is_nearer_to_the_dense_one_than_its_mean(start, gate):
    moe, x_TD = toy(gate=gate), tokens()
    dense_TD = moe.all_experts(x_TD)
    fit(moe, x_TD, start=start)
    left = (moe(x_TD) - dense_TD).square().sum()
    assert left < 0.7 * (dense_TD - dense_TD.mean(0)).square().sum()


@pytest.mark.parametrize(("key", "value"), [("start", "centroid"), ("objective", "norm"), ("objective", "factorllm")])
def test_scores_of_single_experts_are_refused_where_scores_rate_numbers_of_experts(key, value):
    with pytest.raises(ValueError, match=f"{key} '{value}' rates single experts"):
        fit(toy(selection="prefix"), tokens(), **{key: value})
