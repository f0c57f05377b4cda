"""Partitions of the ablation, the guard for super neurons, and the gradients of a whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.ablation.methods import gradient, guard, partitions
from benchmarks.ablation.methods.prefix_oracle import prefix_errors
from ffn2moe.data.batches import in_order
from ffn2moe.decompose import oracle
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import assign_neurons, decompose_layer, most_energetic, neuron_statistics
from ffn2moe.decompose.partition import PARTITIONS, Partition
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.sentence import embed
from tests.conftest import make_tiny_bert, make_tiny_llama
from tests.test_core import random_ffn, spec_for, tokens

METHODS = ("coactivation", "contiguous", "gradient", "nested", "random", "weights")


def row_of(method: str, x_TD: Tensor) -> Partition:
    """A row; `gradient` is bound to random gradients."""
    return gradient.for_layers([x_TD], [tokens(len(x_TD), seed=2)])[0] if method == "gradient" else PARTITIONS[method]


def assign(
    method: str, ffn: DenseFFN, num_experts: int, shared_width: int = 0, guarded: Tensor | None = None
) -> Tensor:
    """The expert of each neuron of an FFN, by random tokens and gradients."""
    x_TD = tokens(120)
    row = row_of(method, x_TD)
    found = neuron_statistics(ffn, x_TD, "sums" if row.reads == "weights" else row.reads)
    shared_S = most_energetic(ffn, found, shared_width)
    if guarded is not None and shared_width:
        shared_S = guard.shared_with_guard(ffn, x_TD, row, shared_width, guarded)
    return assign_neurons(row, ffn, found, num_experts, 0, shared_S)


def unit_columns(ffn_width: int) -> DenseFFN:
    """An FFN whose neurons' energy is that of their activations."""
    return replace(random_ffn(ffn_width), w_out_DF=torch.ones(1, ffn_width))


def test_the_ablation_has_every_partition_by_name():
    assert set(METHODS) <= set(PARTITIONS)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=10)
@given(ffn_width=st.integers(12, 50), num_experts=st.integers(1, 8), gated=st.booleans(), data=st.data())
def test_every_method_shares_out_every_neuron_once_and_evenly(method, ffn_width, num_experts, gated, data):
    shared_width = data.draw(st.integers(0, ffn_width - num_experts))
    expert_of_neuron_F = assign(method, random_ffn(ffn_width, gated=gated), num_experts, shared_width)
    assert (expert_of_neuron_F == -1).sum() == shared_width
    widths = torch.bincount(expert_of_neuron_F[expert_of_neuron_F >= 0], minlength=num_experts)
    assert len(widths) == num_experts and widths.sum() == ffn_width - shared_width
    assert widths.max() - widths.min() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens_and_seed_give_the_same_partition(method):
    assert torch.equal(assign(method, random_ffn(40), 4, 5), assign(method, random_ffn(40), 4, 5))


def test_another_seed_gives_another_random_partition():
    ffn, nothing = random_ffn(48), NeuronStatistics(48)
    first, second = (partitions.random(ffn, nothing, 6, seed) for seed in (5, 6))
    assert not torch.equal(first, second)


@given(
    energy=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=4, max_size=40), num_experts=st.integers(1, 4)
)
def test_nested_experts_stand_in_the_order_of_their_neurons_energy(energy, num_experts):
    energy_F = torch.tensor(energy, dtype=torch.float64)
    statistics = NeuronStatistics(len(energy_F), profiles=False)
    statistics.tokens, statistics.square_F = 1, energy_F
    expert_of_neuron_F = partitions.nested(unit_columns(len(energy_F)), statistics, num_experts, seed=0)
    for expert in range(num_experts - 1):
        assert energy_F[expert_of_neuron_F == expert].min() >= energy_F[expert_of_neuron_F == expert + 1].max()


def test_nested_prefixes_lose_less_than_prefixes_of_any_other_partition():
    ffn, x_TD = random_ffn(64), tokens(300)

    def lost(method: str) -> Tensor:
        spec = spec_for(ffn, 8, 2, partition=method)
        moe = decompose_layer(ffn, x_TD, spec, 0, seed=0, partition=row_of(method, x_TD))
        return prefix_errors(oracle.grams(moe, x_TD).gram_REE).mean(0)[:-1]

    nested = lost("nested")
    for method in METHODS:
        assert method == "nested" or (nested < lost(method)).all()


@settings(deadline=None, max_examples=25)
@given(num_experts=st.integers(1, 5), ffn_width=st.integers(5, 30), seed=st.integers(0, 100))
def test_no_expert_would_rather_have_a_neuron_that_matters_more_to_it_than_to_its_own(num_experts, ffn_width, seed):
    importance_EF = torch.rand(num_experts, ffn_width, generator=torch.Generator().manual_seed(seed))
    expert_of_neuron_F = gradient.by_importance(importance_EF)
    here_F = importance_EF.gather(0, expert_of_neuron_F.unsqueeze(0)).squeeze(0)
    there_FF = importance_EF[expert_of_neuron_F]  # of the neuron in the column, at the expert of that in the row
    assert not ((there_FF > here_F) & (here_F < there_FF.T) & (there_FF > here_F.unsqueeze(1))).any()


def test_neurons_that_matter_to_one_kind_of_token_share_its_expert():
    kind_T = torch.arange(400) % 4
    x_TD = torch.nn.functional.one_hot(kind_T, 16).float() * 5 + 0.1 * tokens(400)
    importance_TF = 0.1 + torch.nn.functional.one_hot(kind_T, 4).float().repeat_interleave(6, 1)
    groups_T = gradient.token_groups(x_TD, 4, seed=0)
    assert all(len(groups_T[kind_T == kind].unique()) == 1 for kind in range(4))
    importance = gradient.Importance(24, groups=4)
    for h_TF, group_T in zip(importance_TF.split(90), groups_T.split(90), strict=True):
        importance.update(h_TF, torch.ones_like(h_TF), group_T)
    found_F = gradient.by_importance(importance.mean())
    assert all(len(found_F[6 * kind : 6 * kind + 6].unique()) == 1 for kind in range(4))


def test_importance_does_not_depend_on_how_the_tokens_are_cut():
    h_TF, gradient_TF, group_T = tokens(100, 12), tokens(100, 12, seed=2), torch.arange(100) % 3
    found = []
    for size in (100, 33):
        importance = gradient.Importance(12, groups=3)
        parts = (part.split(size) for part in (h_TF, gradient_TF, group_T))
        for part in zip(*parts, strict=True):
            importance.update(*part)
        found.append(importance.mean())
    torch.testing.assert_close(found[0].float(), found[1].float())
    torch.testing.assert_close(found[0][1].float(), (h_TF * gradient_TF).abs()[1::3].mean(0))


def test_a_partition_by_statistics_asks_for_text_and_gradients():
    ffn = random_ffn(24)
    with pytest.raises(ValueError, match="reads the neurons' activations, and there are none"):
        assign_neurons(PARTITIONS["nested"], ffn, NeuronStatistics(24), 4, 0, torch.empty(0))
    spec = spec_for(ffn, 4, 2, partition="gradient")
    with pytest.raises(ValueError, match=r"backward pass through the whole model.* use coactivation"):
        decompose_layer(ffn, tokens(), spec, 0, seed=0)
    with pytest.raises(ValueError, match="3 calibration tokens do not make 4 groups"):
        decompose_layer(ffn, tokens(3), spec, 0, seed=0, partition=row_of("gradient", tokens(3)))


# --- the guard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=10)
@given(guarded=st.sets(st.integers(0, 29), max_size=6), more=st.integers(0, 4))
def test_guarded_neurons_are_in_the_shared_expert_whatever_the_method(method, guarded, more):
    guarded_G = torch.tensor(sorted(guarded)).long()
    expert_of_neuron_F = assign(method, random_ffn(30), 4, len(guarded) + more, guarded_G)
    assert guarded <= set(torch.nonzero(expert_of_neuron_F == -1).flatten().tolist())
    assert (expert_of_neuron_F == -1).sum() == len(guarded) + more


def test_a_guard_that_finds_nothing_changes_nothing():
    nobody = torch.tensor([], dtype=torch.int64)
    for shared_width in (0, 5):
        plain = assign("coactivation", random_ffn(30), 4, shared_width)
        assert torch.equal(plain, assign("coactivation", random_ffn(30), 4, shared_width, nobody))


def test_a_shared_expert_that_is_too_narrow_for_the_guarded_is_refused():
    with pytest.raises(ValueError, match="3 neurons are guarded and the shared expert holds 2"):
        assign("random", random_ffn(30), 4, 2, torch.arange(3))


def test_super_neurons_are_few_of_all_the_model_and_near_the_largest():
    quiet = [1 + 0.1 * tokens(1, 3000, seed=layer)[0].abs() for layer in range(3)]
    quiet[1][[7, 70]] = torch.tensor([900.0, 400.0])
    assert [found.tolist() for found in guard.super_neurons(quiet)] == [[], [7, 70], []]
    quiet[1][70] = 80.0  # less than a tenth of the largest
    assert [found.tolist() for found in guard.super_neurons(quiet)] == [[], [7], []]
    assert all(len(found) == 0 for found in guard.super_neurons([torch.ones(2000)]))


def test_the_largest_contribution_of_a_neuron_is_the_largest_it_ever_makes():
    ffn, x_TD = random_ffn(20, gated=True), tokens(300)
    each_TFD = ffn.neurons(x_TD).unsqueeze(2) * ffn.w_out_DF.T
    torch.testing.assert_close(
        guard.largest_contributions(ffn, x_TD), each_TFD.norm(dim=2).amax(0), rtol=1e-5, atol=1e-6
    )


def test_a_massive_neuron_of_a_model_is_found(tiny_teacher):
    teacher, _ = load_dense(str(tiny_teacher))
    with torch.no_grad():
        teacher.encoder.layer[0].output.dense.weight[:, 7] *= 1000
    ffns, inputs = [read_ffn(teacher, index) for index in range(2)], [torch.randn(100, 32) for _ in range(2)]
    first, second = guard.guarded_neurons(ffns, inputs)
    assert first.tolist() == [7] and len(second) == 0
    row = PARTITIONS["coactivation"]
    assert 7 in guard.shared_with_guard(ffns[0], inputs[0], row, 2, first)


# --- the gradient of the whole model --------------------------------------------------------------


def texts_of_ids(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 90, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(("make", "head"), [(make_tiny_bert, "embedding"), (make_tiny_llama, "causal")])
def test_the_gradient_says_how_the_loss_changes_when_a_neuron_is_left_out(make, head, tmp_path: Path):
    model, _ = load_dense(str(make(tmp_path / "teacher")))
    batches = list(in_order(head, texts_of_ids((7, 12, 9))))
    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = gradient.output_gradients(model, batches, head=head, max_tokens=100, seed=3)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == kept
    inputs = layer_inputs(model, batches, max_tokens=100)
    assert [g.shape for g in found] == [x.shape for x in inputs]

    def loss() -> float:
        batch = batches[0]
        if head == "causal":
            logits, ids = model(**batch.inputs).logits[:, :-1], batch.inputs["input_ids"][:, 1:]
            real = batch.mask[:, 1:].bool()
            return torch.nn.functional.cross_entropy(logits[real], ids[real], reduction="sum").item()
        embedding = embed(model, model(**batch.inputs)[0], batch.mask)
        signs = torch.randint(2, embedding.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
        return (embedding * signs).sum().item()

    ffn = read_ffn(model, 1)
    gradient_F = (ffn.neurons(inputs[1]) * (found[1] @ ffn.w_out_DF)).sum(0)
    neuron, step = int(gradient_F.abs().argmax()), 0.05
    block = (model.base_model.encoder.layer if head == "embedding" else model.base_model.layers)[1]
    w_out = (block.output.dense if head == "embedding" else block.mlp.down_proj).weight
    with torch.no_grad():
        before = loss()
        w_out[:, neuron] *= 1 + step
        assert (loss() - before) / step == pytest.approx(gradient_F[neuron].item(), rel=0.05)


def test_gradients_are_those_of_the_first_tokens_however_many_texts_there_are(tmp_path: Path):
    model, _ = load_dense(str(make_tiny_llama(tmp_path / "teacher")))
    ids = texts_of_ids((8, 8, 8, 8))
    some, all_of_them = (
        gradient.output_gradients(
            model, in_order("causal", ids, batch_texts=size), head="causal", max_tokens=16, seed=0
        )
        for size in (1, 4)
    )
    for one, other in zip(some, all_of_them, strict=True):
        assert one.shape == other.shape == (16, one.shape[1])
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
