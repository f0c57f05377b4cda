"""Experts regrouped and merged: `ffn2moe shrink` offers neither, but the grid runs both by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ablation.methods import merge, regroup
from ffn2moe import cli
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.shrinking import SHRINK_METHODS, Layer
from ffn2moe.shrinking.model import require_shrinkable, shrink_model
from ffn2moe.shrinking.usage import most_used, usage
from ffn2moe.spec import MoESpec
from tests.mixtures import carve, flat_spec
from tests.test_shrink import (
    KINDS,
    D,
    E,
    check_command,
    check_kind,
    check_language_model,
    make_layer,
    saved,
    task,
    texts,
)

__all__ = ["saved", "texts"]  # fixtures
METHODS = ("regroup", "merge")


def regrouped(moe: MoEFFN, spec: MoESpec, keep: int, x_TD: Tensor) -> MoEFFN:
    """The layer before anything is fitted."""
    shape = replace(spec.stacks[0], expert_width=-(-64 // keep))
    smaller = replace(spec, num_experts=keep, stacks=(shape,), shrunk="regroup")
    use_E = usage(moe, x_TD)
    with torch.no_grad():
        return regroup.make(Layer(moe, smaller, 0, most_used(use_E, keep), use_E, x_TD)).eval()


def test_regrouping_loses_no_neuron() -> None:
    moe, x_TD = make_layer(flat_spec()), task(seed=2).inputs[0]
    made = regrouped(moe, flat_spec(), 3, x_TD)
    assert made.w_in.shape[1] == 22  # 64 neurons in 3 experts
    assert made.neurons[made.neurons >= 0].sort().values.tolist() == list(range(64))
    torch.testing.assert_close(made.all_experts(x_TD), moe.all_experts(x_TD), atol=1e-4, rtol=1e-4)


def test_regrouping_into_as_many_experts_as_a_token_uses_is_the_sum_of_all() -> None:
    """With every neuron in use nothing is lost."""
    moe, x_TD = make_layer(flat_spec()), task(seed=2).inputs[0]
    made = regrouped(moe, flat_spec(), 2, x_TD)
    made.set_scale(1.0)
    torch.testing.assert_close(made(x_TD), moe.all_experts(x_TD), atol=1e-4, rtol=1e-4)


def test_neurons_go_to_the_expert_that_their_tokens_go_to() -> None:
    """Tokens of one kind used experts 0 and 2, those of the other 1 and 3: what 2 and 3 did, 0 and 1 do then."""
    spec = flat_spec(num_active=2)
    moe = make_layer(spec)
    kind_T = torch.arange(300) % 2
    x_TD = torch.randn(300, D, generator=torch.Generator().manual_seed(0)) * 0.1
    x_TD[:, 0] = 2.0 * kind_T - 1
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
        moe.router.bias.copy_(torch.tensor([0.1, 0.1, 0.0, 0.0]))
        moe.router.weight[0, 1] = 1e-3  # the order of 0 and 2 is theirs alone
    narrow = replace(spec, num_active=1, num_experts=2, stacks=(replace(spec.stacks[0], expert_width=32),))
    with torch.no_grad():
        kept_K, use_E = torch.tensor([0, 1]), usage(moe, x_TD)
        made = regroup.make(Layer(moe, replace(narrow, shrunk="regroup"), 0, kept_K, use_E, x_TD))
    assert sorted(made.neurons[0].tolist()) == [*range(16), *range(32, 48)]
    assert sorted(made.neurons[1].tolist()) == [*range(16, 32), *range(48, 64)]


def test_merging_identical_experts_is_exact(tiny_teacher: Path) -> None:
    """Twins, the neurons of one in another order: a token that would use either uses the one that is left."""
    model, spec = carve(tiny_teacher, num_active=1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for moe in moe_layers(model):
        with torch.no_grad():
            for stacked in (moe.w_in, moe.b_in):
                stacked[3] = stacked[1][order]
            moe.w_out[3] = moe.w_out[1][:, order]
            moe.router.weight[3] = moe.router.weight[1]
            moe.router.bias[3] = moe.router.bias[1]
            moe.router.balance_bias.zero_()
            # Twins are used alike, and more than one other is not: so that one of the two goes.
            moe.router.bias[[0, 2]] += 0.5
    before, x_TD = moe_layers(model), task(seed=2).inputs[0]
    with torch.no_grad():
        for moe in before:
            moe.router.balance_bias[3] = -1e-6  # of two equal scores the first
    shrink_model(model, spec, task(), task(seed=1), keep=3, method="merge")
    for old, new in zip(before, moe_layers(model), strict=True):
        torch.testing.assert_close(new(x_TD), old(x_TD), atol=1e-4, rtol=1e-4)


def test_neurons_are_matched_whatever_their_order() -> None:
    moe = make_layer(flat_spec())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for stacked in (moe.w_in, moe.b_in):
            assert stacked is not None
            stacked[1] = stacked[0][order]
        moe.w_out[1] = moe.w_out[0][:, order]
    assert torch.equal(order[merge.matched(moe, 0, 1)], torch.arange(16))


def test_a_merged_expert_is_the_mean_by_use(tiny_teacher: Path) -> None:
    model, spec = carve(tiny_teacher)
    old, x_TD = moe_layers(model)[0], task().inputs[0]
    _, reports = shrink_model(model, spec, task(), task(seed=1), keep=3, method="merge")
    new, report = moe_layers(model)[0], reports[0]
    changed = [index for index in range(3) if not torch.equal(new.w_in[index], old.w_in[report.kept[index]])]
    assert len(changed) == 1
    kept, gone = report.kept[changed[0]], ({*range(E)} - {*report.kept}).pop()
    place_M = merge.matched(old, kept, gone)
    use_E = usage(old, x_TD)
    wanted = (use_E[kept] * old.w_in[kept] + use_E[gone] * old.w_in[gone][place_M]) / (use_E[kept] + use_E[gone])
    torch.testing.assert_close(new.w_in[changed[0]], wanted.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", KINDS)
def test_every_kind_of_mixture_can_be_shrunk(
    method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_kind(method, changes, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_in_order_of_importance_are_not_mixed(method: str) -> None:
    with pytest.raises(ValueError, match="use drop, which takes the last blocks away"):
        require_shrinkable(flat_spec(selection="prefix"), 3, method)


@pytest.mark.parametrize("method", METHODS)
def test_the_command_takes_a_registered_method(
    method: str, saved: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert method in SHRINK_METHODS
    check_command(method, saved, texts, tmp_path, capsys, graphs=method == "regroup")


def test_what_was_shrunk_can_be_merged_again(saved: Path, texts: Path, tmp_path: Path) -> None:
    half, less = tmp_path / "a/half", tmp_path / "b/less"
    options = ["--method", "merge", "--no-onnx", "--out"]
    assert cli.main(["shrink", str(saved), str(texts), "--keep", "3", *options, str(half)]) == 0
    assert cli.main(["shrink", str(half), str(texts), "--keep", "2", *options, str(less)]) == 0
    assert checkpoint.load_spec(less / "checkpoint").num_experts == 2


def test_a_language_model_without_output_bias_can_be_regrouped(tmp_path: Path, texts: Path) -> None:
    check_language_model("regroup", 16, tmp_path, texts)
