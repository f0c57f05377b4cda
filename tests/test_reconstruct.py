"""Output matrices in closed form: the neurons in use stand in for those that are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffn2moe.moe import MoEFFN
from ffn2moe.refit import Moments, leading, neurons, refit_output
from tests.mixtures import flat_spec

KINDS = [
    {},
    {"gate": "softmax"},
    {"gate": "sigmoid"},
    {"gated": True, "activation": "silu"},
    {"shared_width": 4, "expert_width": 15},
    {"selection": "threshold"},
    {"selection": "prefix"},
    {"routing": "sequence"},
]


def make(*, b_out: bool = True, **changes: object) -> tuple[MoEFFN, Tensor, Tensor]:
    """A layer with random weights, tokens, and the sum of all experts on them."""
    generator = torch.Generator().manual_seed(0)
    moe = MoEFFN(flat_spec(**changes), b_in=True, b_out=b_out).eval()
    with torch.no_grad():
        for parameter in moe.parameters():
            if parameter.dim():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    x_TD = torch.randn(400, 32, generator=generator) * torch.linspace(0.1, 2, 32) + 0.2
    moe.calibrate(x_TD, x_TD if moe.routing == "sequence" else None)
    return moe, x_TD, moe.all_experts(x_TD)


def run(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    return moe(x_TD, x_TD if moe.routing == "sequence" else None).detach()


def refit(moe: MoEFFN, x_TD: Tensor, target_TD: Tensor, shrinkage: float = 1e-3) -> None:
    route_TD = x_TD if moe.routing == "sequence" else None
    refit_output(moe, x_TD, target_TD, route_TD=route_TD, shrinkage=shrinkage)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("b_out", [False, True])
def test_it_is_better_than_the_best_scale_and_mean(changes: dict[str, object], b_out: bool) -> None:
    moe, x_TD, y_TD = make(b_out=b_out, **changes)
    moe.fit_scale_and_mean(x_TD, route_TD=x_TD if moe.routing == "sequence" else None)
    before = (run(moe, x_TD) - y_TD).square().sum()
    refit(moe, x_TD, y_TD)
    assert (run(moe, x_TD) - y_TD).square().sum() < 0.8 * before


@pytest.mark.parametrize("shrinkage", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("b_out", [False, True])
def test_with_any_shrinkage_it_is_no_worse_on_its_tokens(shrinkage: float, b_out: bool) -> None:
    moe, x_TD, y_TD = make(b_out=b_out)
    before = (run(moe, x_TD) - y_TD).square().sum()
    refit(moe, x_TD, y_TD, shrinkage)
    assert (run(moe, x_TD) - y_TD).square().sum() <= before


@pytest.mark.parametrize("changes", KINDS)
def test_what_is_right_already_stays(changes: dict[str, object]) -> None:
    moe, x_TD, _ = make(**changes)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    refit(moe, x_TD, run(moe, x_TD))
    for name, tensor in moe.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-4, rtol=1e-3)


def test_padding_stays_zero() -> None:
    moe, x_TD, y_TD = make()
    with torch.no_grad():
        for tensor in (moe.w_in, moe.b_in):
            assert tensor is not None
            tensor[2, 15] = 0
        moe.w_out[2, :, 15] = 0
    refit(moe, x_TD, y_TD)
    assert not moe.w_out[2, :, 15].any()


def test_neurons_are_what_the_output_matrix_multiplies() -> None:
    for changes in ({}, {"gated": True, "activation": "silu"}):
        moe, x_TD, _ = make(**changes)
        torch.testing.assert_close(neurons(moe, 1, x_TD) @ moe.w_out[1].T, moe.expert(1, x_TD))


def test_the_fit_is_the_solution_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI, y_TO = torch.randn(90, 7, generator=generator), torch.randn(90, 3, generator=generator)
    moments = Moments.of(x_TI, y_TO, torch.zeros(3, 7), shrinkage=1e-9)
    weight_OI = moments.weight()
    with_ones = torch.cat([x_TI, torch.ones(90, 1)], dim=1).double()
    wanted = torch.linalg.lstsq(with_ones, y_TO.double()).solution
    torch.testing.assert_close(weight_OI, wanted[:7].T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments.bias(weight_OI), wanted[7], atol=1e-5, rtol=1e-4)


def test_the_leading_directions_come_first() -> None:
    gram = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    assert leading(gram, 2).abs().argmax(0).tolist() == [1, 2]
