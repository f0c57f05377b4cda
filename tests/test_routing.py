"""Routers: where they start, what they are trained towards, and that they find it."""

from __future__ import annotations

import math

import pytest
import torch

from ffn2moe.router import Router
from ffn2moe.routing import ridge, router_loss, softmax_target, train_router
from tests.test_core import tokens


def test_the_routers_target_has_the_entropy_of_k_equal_choices():
    q_TE = softmax_target(tokens(200, 8), num_active=3)
    entropy = -(q_TE * q_TE.log()).sum(-1).mean().item()
    assert entropy == pytest.approx(math.log(3), abs=1e-3)
    assert softmax_target(tokens(20, 8), num_active=1).sum(-1).eq(1).all()


def test_the_router_loss_is_zero_only_at_the_target():
    q_TE = softmax_target(tokens(50, 8), num_active=2)
    assert router_loss(q_TE.log(), q_TE).item() == pytest.approx(0, abs=1e-6)
    assert router_loss(torch.zeros(50, 8), q_TE).item() > 0.1


def test_a_trained_router_finds_what_a_linear_map_can_find():
    x_TD, weight_ED = tokens(2000), tokens(6, seed=9)
    target_TE = softmax_target(x_TD @ weight_ED.T, num_active=2)
    router = Router(16, 6)
    losses = list(train_router(router, x_TD, target_TE, steps=150, batch_tokens=500, learning_rate=0.05, seed=0))
    assert losses[-1] < 0.05 * losses[0]
    agree = router.choose(router(x_TD), 2).experts_TK.sort().values == target_TE.topk(2).indices.sort().values
    assert agree.float().mean() > 0.95


def test_ridge_recovers_a_linear_map():
    x_TD = tokens(400)
    weight_ED, bias_E = tokens(5), tokens(1, 5).flatten()
    found_ED, found_E = ridge(x_TD, x_TD @ weight_ED.T + bias_E, penalty=1e-9)
    torch.testing.assert_close(found_ED, weight_ED, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_E, bias_E, rtol=1e-4, atol=1e-4)


def test_ridge_without_intercept_ranks_as_the_targets_do_and_has_no_bias():
    x_TD = tokens(400)
    truth_ED = tokens(4, 16, seed=5)
    weight_ED, bias_E = ridge(x_TD, x_TD @ truth_ED.T + 7.0, 1e-6, intercept=False)
    assert bias_E.abs().max() == 0
    assert torch.equal((x_TD @ weight_ED.T).argmax(1), (x_TD @ truth_ED.T).argmax(1))
