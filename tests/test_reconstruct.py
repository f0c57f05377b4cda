"""The output matrices fitted in closed form: nearer to the dense FFN, whatever chooses and weighs the experts."""

from __future__ import annotations

import pytest
import torch

from ffn2moe.decompose import statistics as activations
from ffn2moe.decompose.reconstruct import _add, _inputs, _outputs, refit_outputs, relative_error
from ffn2moe.moe import fit
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.layer import MoEFFN
from tests.mixtures import flat_spec
from tests.test_selection import WAYS, D, E, F, make_ffn, make_moe, normal

TOKENS = normal(600, D, seed=7)
HELD_OUT = normal(600, D, seed=8)
WANTED, HELD_OUT_WANTED = make_ffn()(TOKENS), make_ffn()(HELD_OUT)


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_the_layer_is_linear_in_what_is_fitted(selection, gate, shared):
    moe = make_moe(selection=selection, gate=gate, shared=shared)
    fit.calibrate(moe, TOKENS)
    moe.set_scale(1.3)
    with torch.no_grad():
        linear_TD = whole(moe, HELD_OUT) @ _outputs(moe)
        torch.testing.assert_close(linear_TD, moe(HELD_OUT), rtol=1e-4, atol=1e-4)


def whole(moe, x_TD):
    """The inputs of the output matrices with their zeros, [T, P]."""
    h_TP = torch.zeros(len(x_TD), len(_outputs(moe)))
    for part in _inputs(moe, x_TD):
        h_TP[part.tokens_N, part.columns] = part.h_NM
    return h_TP


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_products_of_used_pairs_alone_are_those_of_all(selection, gate, shared):
    moe = make_moe(selection=selection, gate=gate, shared=shared)
    fit.calibrate(moe, TOKENS)
    with torch.no_grad():
        h_TP, weights_PD = whole(moe, TOKENS).double(), _outputs(moe)
        gram_PP = torch.zeros(h_TP.shape[1], h_TP.shape[1], dtype=torch.float64)
        cross_PD = torch.zeros(weights_PD.shape, dtype=torch.float64)
        _add(_inputs(moe, TOKENS), WANTED, weights_PD, gram_PP, cross_PD)
        torch.testing.assert_close(gram_PP.tril(), (h_TP.T @ h_TP).tril(), rtol=1e-5, atol=1e-4)
        wanted_PD = h_TP.T @ (WANTED.double() - h_TP @ weights_PD.double())
        torch.testing.assert_close(cross_PD, wanted_PD, rtol=1e-4, atol=1e-3)


def test_a_wide_layer_is_fitted_in_bfloat16_as_well_as_in_float32(monkeypatch):
    found = []
    for widest in (F, F - 1):
        monkeypatch.setattr(activations, "WIDEST_MOMENTS", widest)
        moe = make_moe()
        refit_outputs(moe, TOKENS, WANTED, penalty=1e-2)
        found.append(relative_error(moe, HELD_OUT, HELD_OUT_WANTED))
    assert found[1] == pytest.approx(found[0], rel=2e-3)


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_tokens_that_were_not_fitted_come_nearer_to_the_dense_ffn(selection, gate, shared):
    moe = make_moe(selection=selection, gate=gate, shared=shared)
    fit.calibrate(moe, TOKENS)
    fit.fit_scale_and_mean(moe, TOKENS)
    before = relative_error(moe, HELD_OUT, HELD_OUT_WANTED)
    refit_outputs(moe, TOKENS, WANTED, penalty=1e-2)
    assert relative_error(moe, HELD_OUT, HELD_OUT_WANTED) < 0.95 * before


def test_no_other_output_matrices_are_nearer_on_the_fitted_tokens():
    moe = make_moe()
    refit_outputs(moe, TOKENS, WANTED, penalty=1e-9)
    best = relative_error(moe, TOKENS, WANTED)
    generator = torch.Generator().manual_seed(0)
    for tensor in (moe.w_out, moe.b_out):
        for size in (1e-3, 1e-1):
            kept = tensor.detach().clone()
            with torch.no_grad():
                tensor += size * torch.randn(tensor.shape, generator=generator)
            assert relative_error(moe, TOKENS, WANTED) > best
            with torch.no_grad():
                tensor.copy_(kept)


def test_the_dense_ffn_is_left_as_it_is():
    moe = make_moe(num_active=E)
    before = moe.w_out.detach().clone()
    refit_outputs(moe, TOKENS, WANTED, penalty=1e-6)
    torch.testing.assert_close(moe.w_out.detach(), before, rtol=1e-4, atol=1e-4)


def test_fewer_tokens_than_neurons_change_only_what_they_show():
    moe = make_moe()
    before = relative_error(moe, TOKENS[:8], WANTED[:8])
    refit_outputs(moe, TOKENS[:8], WANTED[:8], penalty=1e-3)
    assert relative_error(moe, TOKENS[:8], WANTED[:8]) < 0.5 * before
    assert torch.isfinite(moe.w_out).all()


def test_padding_stays_zero():
    spec = flat_spec(num_experts=E, num_active=2, width=D, ffn_width=F, expert_width=F // E + 4)
    neurons_EM = neurons_by_expert(torch.arange(F) * E // F, E, F // E + 4)
    moe = MoEFFN.from_experts(spec, slice_experts(make_ffn(), neurons_EM), neurons_EM).eval()
    refit_outputs(moe, TOKENS, WANTED, penalty=1e-2)
    assert (moe.w_out.transpose(1, 2)[neurons_EM == -1] == 0).all()


def test_every_budget_gains():
    moe = make_moe(elastic=(1, 3))
    fit.fit_scale_and_mean(moe, TOKENS)
    before = {}
    for budget in moe.budgets:
        moe.set_active(budget)
        before[budget] = relative_error(moe, HELD_OUT, HELD_OUT_WANTED)
    moe.set_active(2)
    refit_outputs(moe, TOKENS, WANTED, penalty=1e-2)
    assert moe.num_active == 2
    for budget in moe.budgets:
        moe.set_active(budget)
        assert relative_error(moe, HELD_OUT, HELD_OUT_WANTED) < before[budget]


def test_a_penalty_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        refit_outputs(make_moe(), TOKENS, WANTED, penalty=0.0)
