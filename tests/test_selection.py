"""How many experts a token uses, chosen by what: each selection, routing and budget against its definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ffn2moe import metrics
from ffn2moe.choices import GATES, SELECTIONS
from ffn2moe.data.batches import Batch, collate
from ffn2moe.decompose import oracle
from ffn2moe.decompose.layer import every_expert, output_of
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.objectives import EmbeddingObjective
from ffn2moe.moe import checkpoint, fit
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN, moe_layers, set_active
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import Head, MoESpec
from tests.mixtures import flat_spec

D, F, E = 16, 48, 6
WAYS = [("topk", gate) for gate in GATES.names()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_ffn() -> DenseFFN:
    return DenseFFN(
        w_in_FD=normal(F, D),
        w_out_DF=normal(D, F, seed=1) / F**0.5,
        activation="gelu",
        b_in_F=normal(F, seed=2),
        b_out_D=normal(D, seed=3),
    )


def make_moe(num_active: int = 2, *, shared: int = 0, **changes: Any) -> MoEFFN:
    """A layer of E experts, some neurons in a shared one, and a random router."""
    ffn = make_ffn()
    expert_of_neuron_F = torch.full((F,), -1)
    expert_of_neuron_F[shared:] = torch.arange(F - shared) * E // (F - shared)
    neurons_EM = neurons_by_expert(expert_of_neuron_F, E)
    shared_S = torch.arange(shared)
    values = {"width": D, "ffn_width": F, "expert_width": neurons_EM.shape[1], "shared_width": shared}
    spec = flat_spec(num_experts=E, num_active=num_active, **values, **changes)
    moe = MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM, shared_S), neurons_EM, 0, shared_S)
    with torch.no_grad():
        moe.router.weight.copy_(normal(E, D, seed=4))
        moe.router.bias.copy_(normal(E, seed=5))
    return moe.eval()


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_the_grouped_layer_is_the_reference_however_experts_are_chosen(selection, gate, shared, training):
    moe = make_moe(selection=selection, gate=gate, shared=shared)
    x_TD = normal(70, D, seed=6)
    fit.calibrate(moe, x_TD)
    moe.set_scale(1.3)
    moe.train(training)
    torch.testing.assert_close(moe(x_TD), moe.reference(x_TD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_a_router_that_scores_all_alike_and_all_experts_give_the_dense_ffn(selection, gate):
    moe = make_moe(num_active=3, selection=selection, gate=gate)
    x_TD = normal(40, D, seed=6)
    fit.calibrate(moe, x_TD)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with every_expert([moe]):
        torch.testing.assert_close(moe(x_TD), make_ffn()(x_TD), rtol=1e-5, atol=1e-5)
    assert moe.num_active == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in moe.state_dict().items())


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_choice_tells_the_same_in_every_form(data):
    used = data.draw(st.lists(st.lists(st.booleans(), min_size=E, max_size=E), min_size=1, max_size=20))
    used_TK = torch.tensor(used)
    experts_TK = torch.stack([torch.randperm(E) for _ in used])
    choice = Choice(experts_TK, used_TK)
    token_P, expert_P = choice.pairs()
    indicator_TE = torch.zeros(len(used), E)
    indicator_TE[token_P, expert_P] = 1
    assert torch.equal(choice.indicator_TE(E), indicator_TE)
    assert torch.equal(choice.count_T(), indicator_TE.sum(1).long())
    assert torch.equal(choice.load_E(E), indicator_TE.sum(0).long())


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate", "num_active"), [(*way, active) for way in WAYS for active in (1, 2, 3)])
def test_every_parameter_learns_from_the_loss(selection, gate, num_active, shared):
    moe = make_moe(num_active, selection=selection, gate=gate, shared=shared)
    x_TD = normal(300, D, seed=6)
    fit.calibrate(moe, x_TD)
    moe.train()
    (moe(x_TD) - make_ffn()(x_TD)).square().sum().backward()
    assert [name for name, one in moe.named_parameters() if one.grad is None or not one.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "topp"}, r"unknown selection 'topp'; did you mean 'topk'\? known: .*topk"),
        ({"gate": "sigmod"}, r"unknown gate 'sigmod'; did you mean 'sigmoid'\?"),
        ({"head": "casual"}, r"unknown head 'casual'; did you mean 'causal'\?"),
        ({"routing": "tokens"}, r"unknown routing 'tokens'; did you mean 'token'\?"),
        ({"max_active": 3}, "max_active = 3 limits nothing with selection topk: leave max_active out"),
        ({"max_active": 1}, "must be between num_active = 2"),
        ({"active_per_layer": (1, 3), "elastic": (1,)}, "use one of the two"),
        ({"active_per_layer": (1, 7)}, "each must be between 1 and num_experts = 6"),
        ({"active_per_layer": (1,)}, "names 1 layers and the model has 2"),
        ({"elastic": (2,)}, "must ascend, without num_active = 2"),
        ({"elastic": (4, 1)}, "must ascend"),
        ({"elastic": (7,)}, "each must be between 1 and num_experts"),
        ({"container": "mixtral", "elastic": (1,)}, "use container none"),
        ({"container": "mixtral", "active_per_layer": (1, 3)}, "use container none"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        flat_spec(**{"num_experts": E, "num_active": 2} | changes)


# --- whole models ---------------------------------------------------------------------------------------------------


def carve(
    teacher: Path, num_active: int = 2, num_experts: int = 4, head: Head = "embedding", **changes: Any
) -> tuple[Any, MoESpec]:
    """The teacher with random routers before its FFNs, calibrated on random inputs."""
    model, _ = load_dense(str(teacher), head=head)
    spec = spec_of(
        model,
        head=head,
        num_experts=num_experts,
        num_active=num_active,
        partition="contiguous",
        teacher="tiny",
        sentence=SentenceModules() if head == "embedding" else None,
        max_length=32,
        **changes,
    )
    layers = []
    for index in range(spec.num_layers):
        neurons_EM = neurons_by_expert(torch.arange(spec.ffn_width) * num_experts // spec.ffn_width, num_experts)
        moe = MoEFFN.from_experts(spec, slice_experts(read_ffn(model, index), neurons_EM), neurons_EM, index)
        x_TD = normal(200, spec.width, seed=30)
        with torch.no_grad():
            moe.router.weight.copy_(normal(num_experts, spec.width, seed=20 + index))
            moe.set_scale(1.1)
            for offset, scale in enumerate(moe.elastic_scale.values()):
                scale.fill_(1.5 + offset)
        moe.router.calibrate(moe.router(x_TD), moe.num_active)
        layers.append(moe)
    install_moe(model, layers)
    return model.eval(), spec


def batch(*lengths: int, padded: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    texts = [torch.randint(5, 90, (length,), generator=generator).tolist() for length in lengths]
    return collate("embedding", texts, length=padded)


KINDS: list[dict[str, Any]] = [
    {"active_per_layer": (1, 3)},
    {"elastic": (1, 4)},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_gives_every_model_back_bit_for_bit(tiny_teacher, tmp_path, kind):
    model, spec = carve(tiny_teacher, **kind)
    checkpoint.save(model, None, spec, tmp_path)
    assert checkpoint.load_spec(tmp_path) == spec
    loaded = checkpoint.load(tmp_path)
    assert [moe.num_active for moe in moe_layers(loaded)] == [spec.active_of(layer) for layer in range(2)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    inputs = batch(5, 9)
    assert torch.equal(output_of(model, inputs), output_of(loaded, inputs))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_every_expert_the_model_is_its_teacher(tiny_teacher, kind):
    model, _ = carve(tiny_teacher, **kind)
    teacher, _ = load_dense(str(tiny_teacher))
    inputs = batch(5, 9)
    with every_expert(moe_layers(model)):
        torch.testing.assert_close(output_of(model, inputs), output_of(teacher, inputs), rtol=1e-5, atol=1e-5)


def test_a_model_with_a_selection_that_left_the_core_names_its_writer_and_the_remedy(
    tiny_teacher, tmp_path, monkeypatch
):
    model, spec = carve(tiny_teacher)
    checkpoint.save(model, None, spec, tmp_path)
    written = tmp_path / checkpoint.SPEC_FILE
    written.write_text(written.read_text().replace('"topk"', '"threshold"'))
    monkeypatch.setattr(SELECTIONS, "_rows", {})  # none but those of the core
    with pytest.raises(
        ValueError, match=r"unknown selection 'threshold'; known: topk.* 0\.1\.0 .* convert the dense model"
    ):
        checkpoint.load(tmp_path)


def test_each_layer_uses_its_own_number_of_experts(tiny_teacher):
    model, spec = carve(tiny_teacher, active_per_layer=(1, 3))
    counts = []
    for moe in moe_layers(model):
        moe.observer = lambda scores_TE, choice: counts.append(choice.experts_TK.shape[1])
    output_of(model, batch(7))
    assert counts == [1, 3]
    same = replace(spec, active_per_layer=())
    teacher, student = metrics.flops_per_token(spec, model.config, 16)
    assert student.ffn == metrics.flops_per_token(same, model.config, 16)[1].ffn == teacher.ffn // 2
    dense, _ = load_dense(str(tiny_teacher))
    uneven = metrics.parameters(dense, model)
    assert uneven == metrics.parameters(dense, carve(tiny_teacher)[0])


# --- training -------------------------------------------------------------------------------------------------------


class Texts:
    """The same few texts, over and over."""

    def from_step(self, step: int) -> Any:
        while True:
            yield batch(5, 9, 12, 16, padded=16)
            yield batch(6, 7, 11, 16, padded=16)


def distiller(teacher: Path, student: nn.Module, steps: int, **options: Any) -> Distiller:
    objective = EmbeddingObjective(hidden_weight=1.0, embedding_weight=10.0, relational_weight=100.0)
    training = Training(steps=steps, **{"learning_rate": 1e-2} | options)
    return Distiller(load_dense(str(teacher))[0], student, Texts(), objective, training)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_distillation_reaches_every_router(tiny_teacher, kind):
    model, _ = carve(tiny_teacher, **kind)
    before = [moe.router.weight.detach().clone() for moe in moe_layers(model)]
    losses = [step.loss for step in distiller(tiny_teacher, model, 12).run()]
    assert losses[-1] < losses[0]
    assert all((moe.router.weight != old).any() for moe, old in zip(moe_layers(model), before, strict=True))


def mean_active(model: Any) -> list[float]:
    """How many experts the tokens of the texts use in each layer, on average."""
    layers = moe_layers(model)
    watching = [moe.observer for moe in layers]
    counts: list[list[Tensor]] = [[] for _ in layers]
    for moe, seen in zip(layers, counts, strict=True):
        moe.observer = lambda scores_TE, choice, seen=seen: seen.append(choice.count_T()[mask_T])
    for _, inputs in zip(range(2), Texts().from_step(0), strict=False):
        mask_T = inputs.inputs["attention_mask"].bool().flatten()
        with torch.no_grad():
            model(**inputs.inputs)
    for moe, observer in zip(layers, watching, strict=True):
        moe.observer = observer
    return [torch.cat(seen).double().mean().item() for seen in counts]


# --- several budgets ------------------------------------------------------------------------------------------------


def test_each_budget_has_its_own_scale_and_is_opened_alone(tiny_teacher, tmp_path):
    model, spec = carve(tiny_teacher, elastic=(1, 4))
    checkpoint.save(model, None, spec, tmp_path)
    assert spec.budgets == (1, 2, 4)
    inputs = batch(5, 9)
    for active, scale in ((1, 1.5), (2, 1.1), (4, 2.5)):
        set_active(model, active)
        alone = checkpoint.load(tmp_path, active=active)
        assert checkpoint.load_spec(tmp_path, active=active) == replace(spec, num_active=active, elastic=())
        assert all(moe.num_active == active and moe.scale == scale for moe in moe_layers(model))
        assert all(moe.num_active == active and moe.output_scale == scale for moe in moe_layers(alone))
        assert not any("elastic" in name for name in alone.state_dict())
        assert torch.equal(output_of(alone, inputs), output_of(model, inputs))
    with pytest.raises(ValueError, match=r"none of the budgets \[1, 2, 4\]"):
        set_active(model, 3)
    with pytest.raises(ValueError, match="choose from 1, 2, 4"):
        checkpoint.load(tmp_path, active=3)


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_inner_products_give_the_scales_that_outputs_give(selection, gate, shared):
    moe = make_moe(selection=selection, gate=gate, shared=shared, elastic=(4,) if selection == "topk" else ())
    moe.b_out = None
    x_TD = normal(400, D, seed=6)
    fit.calibrate(moe, x_TD)
    fit.fit_scale_and_mean(moe, x_TD)
    wanted = [parameter.item() for parameter in (moe.output_scale, *moe.elastic_scale.values())]
    oracle.fit_scales(moe, oracle.grams(moe, x_TD), x_TD)
    assert [parameter.item() for parameter in (moe.output_scale, *moe.elastic_scale.values())] == pytest.approx(wanted)


def test_the_closed_form_scale_of_every_budget_is_the_best():
    moe = make_moe(elastic=(1, 4))
    x_TD = normal(400, D, seed=6)
    fit.fit_scale_and_mean(moe, x_TD)
    assert moe.num_active == 2
    y_TD = make_ffn()(x_TD)

    def error() -> float:
        return (moe(x_TD) - y_TD).square().sum().item()

    for active in moe.budgets:
        moe.set_active(active)
        best, scale = error(), moe.scale.item()
        for other in (0.98, 1.02):
            moe.set_scale(scale * other)
            assert error() > best
        moe.set_scale(scale)
