"""Other FFN compressors: their cost, what they must keep, and that they train like mixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.ablation.compressors import COMPRESSORS, build, compress, mixture_flops
from benchmarks.ablation.least_squares import Moments
from benchmarks.ablation.linear_maps import CompressedFFN
from benchmarks.ablation.methods import block_diagonal
from benchmarks.ablation.methods.pruned import pruned
from benchmarks.ablation.methods.sparse_factors import DenseSparse, sparse_basis
from ffn2moe.data.batches import Batch, Batches
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.objectives import FeaturesObjective, LogitsObjective
from ffn2moe.metrics import ffn_flops

D, WIDTH, TOKENS = 16, 64, 600
KINDS = [(gated, bias) for gated in (False, True) for bias in (False, True)]


def make_ffn(*, gated: bool = False, bias: bool = True, seed: int = 0) -> DenseFFN:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

    return DenseFFN(
        w_in_FD=draw(WIDTH, D),
        w_out_DF=draw(D, WIDTH),
        activation="silu" if gated else "gelu",
        b_in_F=draw(WIDTH) if bias else None,
        b_out_D=draw(D) if bias else None,
        w_gate_FD=draw(WIDTH, D) if gated else None,
        b_gate_F=draw(WIDTH) if gated and bias else None,
    )


def make_inputs(tokens: int = TOKENS, seed: int = 1) -> Tensor:
    """Inputs that vary more in some directions than in others, about a mean that is not 0: [T, D]."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(7))).Q
    return (torch.randn(tokens, D, generator=generator) * torch.linspace(0.1, 2, D) + 0.3) @ turn


def error(made: torch.nn.Module, ffn: DenseFFN, x_TD: Tensor) -> float:
    with torch.no_grad():
        return ((made(x_TD) - ffn(x_TD)).norm() / ffn(x_TD).norm()).item()


@pytest.mark.parametrize("name", COMPRESSORS.names())
@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_compressor_costs_at_most_the_mixture(name: str, gated: bool, bias: bool, share: float) -> None:
    made = build(name, make_ffn(gated=gated, bias=bias), make_inputs(), share, num_experts=4)
    limit = mixture_flops(D, WIDTH, gated=gated, active_share=share, num_experts=4)
    one_rank = 2 * 4 * (D + WIDTH)  # four blocks of one rank each: the coarsest step there is
    assert limit - one_rank < made.flops() <= limit


def test_flops_are_those_of_the_matrix_products() -> None:
    """Counted by torch itself, which sees the sparse factor with its zeros filled in."""
    from torch.utils.flop_counter import FlopCounterMode

    for name in COMPRESSORS:
        made, x_TD = build(name, make_ffn(gated=True), make_inputs(), 0.6), make_inputs(tokens=10)
        with FlopCounterMode(display=False) as counter:
            made(x_TD)
        zeros = 0
        for part in made.modules():
            if isinstance(part, DenseSparse):
                zeros += 2 * (
                    len(part.values) * min(part.basis.shape[0 if part.into else 1], WIDTH) - part.values.numel()
                )
        assert counter.get_total_flops() == 10 * (made.flops() + zeros), name


def test_the_mixture_that_compressors_are_measured_by_includes_its_router() -> None:
    dense = ffn_flops(D, WIDTH, gated=False)
    assert mixture_flops(D, WIDTH, gated=False, active_share=0.25, num_experts=8) == dense // 4 + 2 * D * 8


@pytest.mark.parametrize("name", COMPRESSORS.names())
@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_the_whole_budget_reproduces_the_dense_ffn(name: str, gated: bool, bias: bool) -> None:
    ffn = make_ffn(gated=gated, bias=bias)
    made = build(name, ffn, make_inputs(), 1.0)
    torch.testing.assert_close(made(make_inputs(seed=5)), ffn(make_inputs(seed=5)), atol=1e-5, rtol=1e-5)
    assert made.flops() == ffn_flops(D, WIDTH, gated=gated)


def test_pruning_that_can_keep_every_neuron_changes_nothing() -> None:
    ffn = make_ffn()
    made = pruned(ffn, make_inputs(), ffn_flops(D, WIDTH, gated=False))
    assert error(made, ffn, make_inputs(seed=5)) < 1e-4


def test_a_matrix_of_full_rank_is_reproduced_by_its_factors() -> None:
    ffn, x_TD = make_ffn(), make_inputs()
    moments = Moments.of_matrix(x_TD, ffn.w_in_FD, ffn.b_in_F, torch.rand(WIDTH) + 0.5)
    left_OR, right_RI = moments.low_rank(D)
    torch.testing.assert_close((left_OR @ right_RI).float(), ffn.w_in_FD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_refitted_pruning_is_no_worse_than_plain_pruning(gated: bool, bias: bool, share: float) -> None:
    ffn, x_TD = make_ffn(gated=gated, bias=bias), make_inputs()
    made = build("pruned", ffn, x_TD, share)
    width = made.w_in.flops() // (2 * D)
    energy_F = ffn.neurons(x_TD).square().mean(0) * ffn.w_out_DF.square().sum(0)
    plain_TD = ffn.narrow(energy_F.topk(width).indices)(x_TD)
    if ffn.b_out_D is not None:
        plain_TD = plain_TD + ffn.b_out_D
    plain_error = ((plain_TD - ffn(x_TD)).norm() / ffn(x_TD).norm()).item()
    assert error(made, ffn, x_TD) <= plain_error


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_the_weighted_factors_are_no_worse_than_the_plain_svd(gated: bool, bias: bool) -> None:
    ffn, x_TD = make_ffn(gated=gated, bias=bias), make_inputs()
    made = build("low_rank", ffn, x_TD, 0.5)

    def cut(matrix: Tensor, rank: int) -> Tensor:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank] * s[:rank] @ v[:rank]

    rank = mixture_flops(D, WIDTH, gated=gated, active_share=0.5, num_experts=8) // (2 * (D + WIDTH) * (2 + gated))
    plain = DenseFFN(
        cut(ffn.w_in_FD, rank),
        cut(ffn.w_out_DF, rank),
        ffn.activation,
        ffn.b_in_F,
        ffn.b_out_D,
        None if ffn.w_gate_FD is None else cut(ffn.w_gate_FD, rank),
        ffn.b_gate_F,
    )
    plain_error = ((plain(x_TD) - ffn(x_TD)).norm() / ffn(x_TD).norm()).item()
    assert error(made, ffn, x_TD) <= plain_error


def test_idle_neurons_fitted_by_a_linear_map_are_no_worse_than_neurons_let_through() -> None:
    """RePaViT's own start: the idle neurons' activation is left out."""
    ffn, x_TD = make_ffn(), make_inputs()
    made = build("idle_linear", ffn, x_TD, 0.5)
    width = made.w_in.flops() // (2 * D)
    pre_TF = torch.nn.functional.linear(x_TD, ffn.w_in_FD, ffn.b_in_F)
    through_TF = torch.cat([torch.nn.functional.gelu(pre_TF[:, :width]), pre_TF[:, width:]], dim=1)
    plain_TD = torch.nn.functional.linear(through_TF, ffn.w_out_DF, ffn.b_out_D)
    assert error(made, ffn, x_TD) <= ((plain_TD - ffn(x_TD)).norm() / ffn(x_TD).norm()).item()


def test_block_sweeps_lower_the_error_of_block_by_block_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, x_TD = make_ffn(), make_inputs()
    moments = Moments.of_matrix(x_TD, ffn.w_in_FD, ffn.b_in_F, torch.ones(WIDTH))
    wanted_TF = torch.nn.functional.linear(x_TD, ffn.w_in_FD, ffn.b_in_F)
    found = []
    for sweeps in (0, 1, 4):
        monkeypatch.setattr(block_diagonal, "BLOCK_SWEEPS", sweeps)
        fitted = block_diagonal.BlockDenseStructure(4).into(moments, 1600)
        found.append((fitted(x_TD) - wanted_TF).square().sum().item())
    assert found[0] > found[1] > found[2]


def test_a_sparse_basis_with_all_coefficients_is_the_best_matrix_of_its_rank() -> None:
    signals_FD = torch.randn(WIDTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis_RD, values_FN, places_FN = sparse_basis(signals_FD, 6, 6)
    mixed_FD = torch.zeros(WIDTH, 6, dtype=torch.float64).scatter(1, places_FN, values_FN) @ basis_RD
    best = torch.linalg.svdvals(signals_FD)[6:].square().sum()
    torch.testing.assert_close((mixed_FD - signals_FD).square().sum(), best)


def test_a_sparse_factor_has_so_many_non_zeros_a_neuron() -> None:
    made = build("sparse_factors", make_ffn(), make_inputs(), 0.4)
    for part in (made.w_in, made.w_out):
        assert isinstance(part, DenseSparse)
        assert part.flops() == 2 * (part.basis.numel() + part.values.numel())
        assert all(len(set(row)) == len(row) for row in part.places.tolist())


@pytest.mark.parametrize("name", COMPRESSORS.names())
@pytest.mark.parametrize("gated", [False, True])
def test_every_parameter_of_a_compressor_gets_a_gradient(name: str, gated: bool) -> None:
    made = build(name, make_ffn(gated=gated), make_inputs(), 0.6)
    made(make_inputs(tokens=50).reshape(5, 10, D)).square().sum().backward()
    for parameter_name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", COMPRESSORS.names())
def test_the_same_inputs_give_the_same_FFN(name: str) -> None:
    first, second = (build(name, make_ffn(), make_inputs(), 0.6).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", COMPRESSORS.names())
def test_neurons_and_inputs_that_never_move_break_nothing(name: str) -> None:
    ffn, x_TD = make_ffn(), make_inputs()
    x_TD[:, 3] = 0.5
    ffn.w_in_FD[5] = 0
    ffn.w_out_DF[:, 6] = 0
    assert error(build(name, ffn, x_TD, 0.6), ffn, x_TD) < 1


@pytest.mark.parametrize("name", ["low_rank", "block_diagonal", "sparse_factors", "idle_linear", "pruned"])
def test_a_share_too_small_for_the_method_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=rf"the compressor {name} at an active share of 0.001.*raise the active share"):
        build(name, make_ffn(gated=True), make_inputs(), 0.001, num_experts=0)


def test_idle_linear_says_which_share_its_linear_map_needs() -> None:
    with pytest.raises(ValueError, match=r"a linear map 16 x 16 and one neuron, .* share of 0.141 of this FFN"):
        build("idle_linear", make_ffn(), make_inputs(), 0.1, num_experts=2)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_an_active_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        build("pruned", make_ffn(), make_inputs(), share)


def test_an_unknown_compressor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown compressor 'magic'; known: block_diagonal, idle_linear"):
        build("magic", make_ffn(), make_inputs(), 0.5)


def batches_of(tokens: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    ids_BL = torch.randint(5, 80, (12, tokens), generator=generator)
    return [Batch({"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}, torch.ones_like(ids_BL))]


@pytest.mark.parametrize("name", COMPRESSORS.names())
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_compressor_works_and_learns_inside_a_model(
    name: str, kind: str, tiny_teacher: Path, tiny_teacher_gated: Path
) -> None:
    source = str(tiny_teacher if kind == "bert" else tiny_teacher_gated)
    teacher, _ = load_dense(source)
    student, _ = load_dense(source)
    inputs = layer_inputs(student, batches_of(), max_tokens=96)
    layers = compress(student, name, inputs, 0.6)
    assert len(layers) == 2 and all(isinstance(layer, CompressedFFN) for layer in layers)
    for layer, x_TD in enumerate(inputs):
        assert error(layers[layer], read_ffn(teacher, layer), x_TD) < 0.9
    objective = LogitsObjective("forward_kl", 1.0, 1.0) if kind == "llama" else FeaturesObjective()
    ids = [torch.randint(5, 80, (8,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(16)]
    source_of = Batches(ids, batch_tokens=64, seed=0, head="causal" if kind == "llama" else "features")
    distiller = Distiller(teacher, student, source_of, objective, Training(steps=12, learning_rate=3e-3))
    losses = [metrics.loss for metrics in distiller.run()]
    assert losses[-1] < losses[0]


def test_nothing_is_installed_where_one_layer_is_refused(tiny_teacher: Path) -> None:
    model, _ = load_dense(str(tiny_teacher))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="raise the active share"):
        compress(model, "idle_linear", layer_inputs(model, batches_of(), max_tokens=96), 0.05)
    with pytest.raises(ValueError, match="inputs of 1 FFNs and the model has 2"):
        compress(model, "pruned", [torch.randn(50, 32)], 0.5)
    assert [type(module) for module in model.modules()] == before
