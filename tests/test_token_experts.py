"""Experts for clusters of tokens: neurons in several experts, and nearer to the dense FFN than pruning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffn2moe.decompose.elimination import most_needed
from ffn2moe.decompose.layer import decompose_layer, outputs
from ffn2moe.decompose.reconstruct import relative_error
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.decompose.token_experts import cluster_tokens
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import FFNShape, MoESpec

D, F, E = 12, 48, 3
SETTINGS = RouterSettings(steps=60, batch_tokens=256, seed=0)


def make_ffn(gated: bool = True, seed: int = 0) -> DenseFFN:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return DenseFFN(
        w_in_FD=random(F, D),
        w_out_DF=random(D, F),
        activation="silu" if gated else "gelu",
        b_in_F=None if gated else random(F),
        b_out_D=None if gated else random(D),
        w_gate_FD=random(F, D) if gated else None,
    )


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [T, D] in three clusters, and the cluster of each."""
    generator = torch.Generator().manual_seed(seed)
    centre_ED = 3 * torch.randn(E, D, generator=torch.Generator().manual_seed(7))
    cluster_T = torch.randint(E, (count,), generator=generator)
    return centre_ED[cluster_T] + 0.5 * torch.randn(count, D, generator=generator), cluster_T


def spec_for(width: int, shared: int, *, experts: int = E, active: int = 1, gated: bool = True) -> MoESpec:
    return MoESpec(
        family="llama",
        model_class="LlamaForCausalLM",
        head="causal",
        stacks=(FFNShape("layers", 1, D, F, width, shared, gated, "silu" if gated else "gelu"),),
        num_experts=experts,
        num_active=active,
        gate="unit",
        router_bias=True,
        container=None,
        partition="token_clusters",
        teacher="toy",
        sentence=None,
        max_length=32,
    )


def filled(spec: MoESpec, ffn: DenseFFN, settings: RouterSettings = SETTINGS) -> tuple[MoEFFN, dict[str, float]]:
    x_TD, _ = tokens(2000, seed=1)
    moe = decompose_layer(ffn, x_TD, spec, 0, seed=0)
    found = route_layer(moe, x_TD, settings, partition=spec.partition, held_out_TD=tokens(1000, seed=2)[0])
    return moe, found.row


def pruned_error(ffn: DenseFFN, kept: int) -> float:
    """The error of the best neurons for all tokens on held-out tokens, refitted by plain least squares."""
    x_TD, held_out_TD = tokens(2000, seed=1)[0], tokens(1000, seed=2)[0]
    h_TF, judged_TF = ffn.neurons(x_TD), ffn.neurons(held_out_TD)
    neurons_S = most_needed(h_TF.T @ h_TF, ffn.w_out_DF, kept)
    fitted_SD = torch.linalg.lstsq(h_TF[:, neurons_S], h_TF @ ffn.w_out_DF.T).solution
    wanted_TD = judged_TF @ ffn.w_out_DF.T
    return ((judged_TF[:, neurons_S] @ fitted_SD - wanted_TD).norm() / wanted_TD.norm()).item()


@pytest.mark.parametrize(("width", "shared"), [(16, 0), (12, 12)])
def test_where_tokens_have_clusters_it_is_nearer_to_the_dense_ffn_than_pruning(width, shared):
    ffn = make_ffn()
    moe, row = filled(spec_for(width, shared), ffn)
    held_out_TD, _ = tokens(1000, seed=2)
    error = relative_error(moe, held_out_TD, outputs(ffn, held_out_TD))
    assert error == pytest.approx(row["router_error"], rel=1e-4)
    assert error < 0.8 * pruned_error(ffn, width + shared)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("width", "shared"), [(16, 0), (20, 0), (10, 18)])
def test_each_expert_holds_rows_of_the_dense_ffn_and_a_neuron_may_stand_in_several(gated, width, shared):
    ffn = make_ffn(gated)
    moe, _ = filled(spec_for(width, shared, gated=gated), ffn)
    assert moe.neurons.shape == (E, width) and len(moe.shared_neurons) == shared
    for index in range(E):
        neurons_M = moe.neurons[index]
        assert len(set(neurons_M.tolist()) | set(moe.shared_neurons.tolist())) == width + shared
        assert torch.equal(moe.w_in[index], ffn.w_in_FD[neurons_M])
        assert moe.w_gate is None or torch.equal(moe.w_gate[index], ffn.w_gate_FD[neurons_M])
    assert len(moe.neurons.unique()) < moe.neurons.numel()


def test_under_weights_the_experts_have_the_neurons_that_the_model_feels():
    """Where the first output alone counts, the layer is nearer in it than with neurons that serve all outputs."""
    ffn, x_TD = make_ffn(), tokens(2000, seed=1)[0]
    fisher_DD = torch.zeros(D, D)
    fisher_DD[0, 0] = 1.0
    errors = []
    for weights in (None, fisher_DD):
        moe = decompose_layer(ffn, x_TD, spec_for(16, 0), 0, seed=0)
        route_layer(moe, x_TD, SETTINGS, partition="token_clusters", fisher_DD=weights)
        errors.append((moe(x_TD) - ffn(x_TD))[:, 0].norm().item())
    assert errors[1] < 0.8 * errors[0]


def test_places_that_no_neuron_is_left_for_are_empty():
    ffn = make_ffn()
    moe, row = filled(spec_for(40, 16), ffn)
    assert (moe.neurons[:, :32] >= 0).all() and (moe.neurons[:, 32:] == -1).all()
    assert not moe.w_in[:, 32:].any() and row["router_error"] < 1e-2


def test_the_router_finds_the_clusters_and_the_oracle_is_the_best_expert():
    ffn = make_ffn()
    x_TD, cluster_T = tokens(2000, seed=1)
    found_T = cluster_tokens(ffn, x_TD, E, seed=0)
    for cluster in range(E):
        assert torch.bincount(found_T[cluster_T == cluster], minlength=E).max() > 0.95 * (cluster_T == cluster).sum()
    _, row = filled(spec_for(16, 0), ffn)
    assert row["router_recall"] > 0.95
    assert row["oracle_error"] <= row["router_error"] and row["gap"] < 0.01


def test_the_same_seed_gives_the_same_layer():
    (one, _), (other, _) = (filled(spec_for(16, 0), make_ffn()) for _ in range(2))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        (spec_for(16, 0, active=2), SETTINGS, "one expert each"),
        (spec_for(16, 0), RouterSettings(steps=5, batch_tokens=64, seed=0, refit=0.0), "refit"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_remedy(spec, settings, message):
    with pytest.raises(ValueError, match=message):
        filled(spec, make_ffn(), settings)


def test_a_neuron_that_others_can_replace_goes_first_however_strong_it_is():
    generator = torch.Generator().manual_seed(0)
    h_TF = torch.randn(500, 4, generator=generator)
    h_TF = torch.cat([h_TF, 10 * h_TF[:, :1] + 10 * h_TF[:, 1:2]], dim=1)  # neuron 4 is a sum of 0 and 1
    assert {2, 3} <= set(most_needed(h_TF.T @ h_TF, torch.eye(5), 4).tolist())


def test_neurons_that_must_stay_do():
    generator = torch.Generator().manual_seed(0)
    h_TF = torch.randn(500, F, generator=generator)
    w_out_DF = make_ffn().w_out_DF.clone()
    w_out_DF[:, :5] *= 1e-3
    kept_S = most_needed(h_TF.T @ h_TF, w_out_DF, 20, torch.arange(3))
    assert kept_S[:3].tolist() == [0, 1, 2] and not {3, 4} & set(kept_S.tolist()) and len(kept_S) == 20
