"""The mathematics of the mixture, as sentences that must stay true."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ffn2moe
from ffn2moe.choices import GATES
from ffn2moe.decompose import oracle
from ffn2moe.decompose.layer import assign_neurons, most_energetic
from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import family_of, ffn_modules, read_ffn
from ffn2moe.moe import checkpoint, fit
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.experts import merge_experts, neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe.grouped import Layout
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.moe.router import Router
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import MoESpec
from tests.conftest import make_tiny_bert, make_tiny_llama
from tests.mixtures import flat_spec


def random_ffn(ffn_width: int, *, width: int = 16, gated: bool = False, seed: int = 0) -> DenseFFN:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return DenseFFN(
        w_in_FD=normal(ffn_width, width),
        w_out_DF=normal(width, ffn_width) / ffn_width**0.5,
        activation="silu" if gated else "gelu",
        b_in_F=None if gated else normal(ffn_width),
        b_out_D=None if gated else normal(width),
        w_gate_FD=normal(ffn_width, width) if gated else None,
    )


def in_double(ffn: DenseFFN) -> DenseFFN:
    values = {field.name: getattr(ffn, field.name) for field in dataclasses.fields(ffn)}
    return DenseFFN(**{name: one.double() if isinstance(one, torch.Tensor) else one for name, one in values.items()})


def spec_for(ffn: DenseFFN, num_experts: int, num_active: int, **changes: object) -> MoESpec:
    values = {
        "family": "llama" if ffn.gated else "bert",
        "model_class": "LlamaForCausalLM" if ffn.gated else "BertModel",
        "width": ffn.w_in_FD.shape[1],
        "ffn_width": ffn.ffn_width,
        "num_layers": 2,
        "num_experts": num_experts,
        "expert_width": -(-ffn.ffn_width // num_experts),
        "num_active": num_active,
        "gated": ffn.gated,
        "activation": ffn.activation,
        "partition": "random",
        "teacher": "tiny",
        "sentence": SentenceModules(),
        "max_length": 64,
    }
    return flat_spec(**(values | changes))


def random_moe(ffn: DenseFFN, num_experts: int, num_active: int, seed: int = 0) -> MoEFFN:
    """A mixture with a random partition and a router that has opinions."""
    order_F = torch.randperm(ffn.ffn_width, generator=torch.Generator().manual_seed(seed))
    expert_of_neuron_F = torch.empty_like(order_F)
    expert_of_neuron_F[order_F] = torch.arange(len(order_F)) * num_experts // len(order_F)
    neurons_EM = neurons_by_expert(expert_of_neuron_F, num_experts)
    moe = MoEFFN.from_experts(spec_for(ffn, num_experts, num_active), slice_experts(ffn, neurons_EM), neurons_EM)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        moe.router.weight.copy_(torch.randn(moe.router.weight.shape, generator=generator))
        moe.router.bias.copy_(torch.randn(num_experts, generator=generator))
    return moe.eval()


def tokens(count: int = 40, width: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# --- partition ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["coactivation"])
@pytest.mark.parametrize(("ffn_width", "num_experts"), [(64, 8), (50, 8), (9, 9)])
def test_every_partition_covers_every_neuron_once_in_experts_of_equal_width(method, ffn_width, num_experts):
    ffn = random_ffn(ffn_width)
    statistics = NeuronStatistics(ffn_width)
    statistics.update(ffn.neurons(tokens(200)))
    expert_of_neuron_F = PARTITIONS[method].assign(ffn, statistics, num_experts, 0)
    assert expert_of_neuron_F.shape == (ffn_width,)
    widths = torch.bincount(expert_of_neuron_F, minlength=num_experts)
    assert widths.max() - widths.min() <= 1
    neurons_EM = neurons_by_expert(expert_of_neuron_F, num_experts)
    assert neurons_EM[neurons_EM >= 0].sort().values.tolist() == list(range(ffn_width))


def test_coactivation_finds_neurons_that_fire_together():
    groups = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    h_TF = groups.repeat_interleave(6, dim=1) + 0.05 * tokens(500, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    statistics = NeuronStatistics(24)
    statistics.update(h_TF[:, order])
    found = PARTITIONS["coactivation"].assign(random_ffn(24), statistics, 4, 0)
    assert all(len(found[(order // 6) == group].unique()) == 1 for group in range(4))


def test_statistics_do_not_depend_on_how_the_tokens_are_cut():
    h_TF = tokens(300, 12)
    whole, parts = NeuronStatistics(12), NeuronStatistics(12)
    whole.update(h_TF)
    for part in h_TF.split(77):
        parts.update(part)
    torch.testing.assert_close(whole.covariance(), parts.covariance(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.covariance().float(), torch.cov(h_TF.T, correction=0), rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_partition():
    ffn, statistics = random_ffn(48), NeuronStatistics(48)
    statistics.update(ffn.neurons(tokens(200)))
    found = [PARTITIONS["coactivation"].assign(ffn, statistics, 6, 5) for _ in range(2)]
    assert torch.equal(*found)


# --- experts --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    ffn_width=st.integers(3, 40),
    num_experts=st.integers(1, 12),
    gated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_all_experts_chosen_reproduces_the_dense_ffn_and_merging_gives_its_weights_back(
    ffn_width, num_experts, gated, seed
):
    num_experts = min(num_experts, ffn_width)
    ffn = random_ffn(ffn_width, gated=gated, seed=seed)
    moe = random_moe(ffn, num_experts, num_experts, seed)
    x_TD = tokens(7, seed=seed).double()  # large terms cancel: float32 would round by more than what is told apart
    torch.testing.assert_close(copy.deepcopy(moe).double()(x_TD), in_double(ffn)(x_TD), rtol=1e-10, atol=1e-10)
    merged = merge_experts(slice_experts(ffn, moe.neurons), moe.neurons, ffn.activation)
    for name in ("w_in_FD", "w_out_DF", "b_in_F", "b_out_D", "w_gate_FD"):
        before, after = getattr(ffn, name), getattr(merged, name)
        assert (before is None and after is None) or torch.equal(before, after)


def test_a_partition_that_loses_a_neuron_is_refused():
    neurons_EM = torch.tensor([[0, 1], [2, 2]])
    with pytest.raises(ValueError, match="exactly once"):
        slice_experts(random_ffn(4), neurons_EM)


# --- oracle ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(num_experts=st.integers(2, 6), data=st.data(), scale=st.floats(0.5, 2.0))
def test_the_oracle_equals_brute_force(num_experts, data, scale):
    num_active = data.draw(st.integers(1, num_experts))
    moe = random_moe(random_ffn(24), num_experts, num_active)
    x_TD = tokens(9)
    outputs_TED = oracle.expert_outputs(moe, x_TD).double()
    y_TD = outputs_TED.sum(1)
    choice = oracle.oracle(oracle.gram(outputs_TED), num_active, scale)
    for t in range(len(x_TD)):
        errors = {
            subset: (y_TD[t] - scale * outputs_TED[t, list(subset)].sum(0)).square().sum().item()
            for subset in itertools.combinations(range(num_experts), num_active)
        }
        chosen = tuple(choice.chosen_TE[t].nonzero().flatten().tolist())
        assert errors[chosen] == pytest.approx(min(errors.values()), abs=1e-9)
        for expert in range(num_experts) if num_active < num_experts else ():
            with_it = min(error for subset, error in errors.items() if expert in subset)
            without_it = min(error for subset, error in errors.items() if expert not in subset)
            assert choice.gain_TE[t, expert].item() == pytest.approx(without_it - with_it, abs=1e-6)


def test_the_greedy_oracle_is_close_to_the_exact_one(monkeypatch):
    moe = random_moe(random_ffn(64), 8, 3)
    gram_TEE = oracle.gram(oracle.expert_outputs(moe, tokens(200)))
    exact = oracle.oracle(gram_TEE, 3).chosen_TE
    monkeypatch.setattr(oracle, "MAX_SUBSETS", 0)
    greedy = oracle.oracle(gram_TEE, 3)
    assert greedy.chosen_TE.sum(1).eq(3).all()

    def error(chosen_TE):
        left_out = 1 - chosen_TE
        return torch.einsum("te,tef,tf->t", left_out, gram_TEE, left_out).mean()

    assert error(exact) <= error(greedy.chosen_TE) <= 1.1 * error(exact)


def test_with_all_experts_there_is_no_error_and_nothing_to_miss():
    moe = random_moe(random_ffn(32), 4, 4)
    found = oracle.diagnose(moe, tokens(50))
    assert found["oracle_error"] < 1e-3 and found["router_error"] < 1e-3
    assert found["router_recall"] == 1.0


def test_no_router_beats_the_oracle_at_its_own_scale():
    found = oracle.diagnose(random_moe(random_ffn(32), 4, 1), tokens(300))
    assert 0 < found["oracle_error"] < found["router_error"]
    assert found["gap"] == pytest.approx(found["router_error"] - found["oracle_error"])


# --- the layer ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 70),
    num_experts=st.integers(1, 7),
    data=st.data(),
    gated=st.booleans(),
    training=st.booleans(),
)
def test_the_grouped_layer_equals_the_reference(count, num_experts, data, gated, training):
    moe = random_moe(random_ffn(29, gated=gated), num_experts, data.draw(st.integers(1, num_experts)))
    moe.train(training)
    moe.set_scale(1.3)
    x_TD = tokens(count)
    torch.testing.assert_close(moe(x_TD), moe.reference(x_TD), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 50), num_experts=st.integers(1, 9), tile=st.sampled_from([1, 4, 16]), data=st.data())
def test_a_layout_gives_every_pair_a_slot_of_its_own_in_its_experts_run(count, num_experts, tile, data):
    num_active = data.draw(st.integers(1, num_experts))
    chosen_TK = torch.stack([torch.randperm(num_experts)[:num_active] for _ in range(count)])
    layout = Layout.of(Choice(chosen_TK, None), num_experts, tile)
    token_of_slot, slot_P, widths = layout.token_S, layout.slot_P, layout.widths
    slot_TK = slot_P.view_as(chosen_TK)
    assert all(width % tile == 0 for width in widths)
    assert len(slot_TK.flatten().unique()) == slot_TK.numel()
    expert_of_slot = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(widths))
    assert torch.equal(expert_of_slot[slot_TK], chosen_TK)
    assert torch.equal(token_of_slot[slot_TK], torch.arange(count).unsqueeze(1).expand_as(slot_TK))


def test_permuting_the_experts_changes_nothing():
    moe, other = (random_moe(random_ffn(32), 4, 2) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name in ("w_in", "b_in", "w_out"):
            getattr(other, name).copy_(getattr(moe, name)[order])
        other.router.weight.copy_(moe.router.weight[order])
        other.router.bias.copy_(moe.router.bias[order])
    torch.testing.assert_close(other(tokens()), moe(tokens()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_every_trainable_parameter_receives_gradient(gated):
    moe = random_moe(random_ffn(32, gated=gated), 4, 2).train()
    with torch.no_grad():  # an even router, so that every expert sees a token
        moe.router.bias.zero_()
    moe(tokens(200)).square().sum().backward()
    silent = [name for name, p in moe.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_padding_neurons_stay_zero_when_trained():
    moe = random_moe(random_ffn(30), 4, 2).train()
    padding_EM = moe.neurons < 0
    assert padding_EM.any()
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        moe(tokens(100)).square().sum().backward()
        optimizer.step()
    assert moe.w_in[padding_EM].abs().max() == 0
    assert moe.w_out.transpose(1, 2)[padding_EM].abs().max() == 0


def test_the_fitted_scale_and_mean_are_the_best_ones():
    moe = random_moe(random_ffn(32), 4, 2)
    x_TD = tokens(500)
    dense = moe.all_experts(x_TD)
    fit.fit_scale_and_mean(moe, x_TD)
    error = (moe(x_TD) - dense).square().sum()
    for change in (0.98, 1.02):
        scale = moe.output_scale.item()
        moe.set_scale(scale * change)
        assert (moe(x_TD) - dense).square().sum() > error
        moe.set_scale(scale)
    assert (moe(x_TD) - dense).mean(0).abs().max() < 1e-4


# --- router ---------------------------------------------------------------------------------------


def test_balancing_moves_the_choice_towards_the_idle_expert_and_leaves_the_scores():
    router = Router(4, 3)
    x_TD = tokens(10, 4)
    before = router(x_TD)
    router.balance(torch.tensor([30, 0, 0]), step=0.5)
    assert torch.equal(router(x_TD), before)
    assert router.balance_bias.tolist() == [-0.5, 0.5, 0.5]


# --- whole models ---------------------------------------------------------------------------------

FAMILY_MODELS = {
    "bert": ("BertModel", {}),
    "roberta": ("RobertaModel", {"max_position_embeddings": 66}),
    "mpnet": ("MPNetModel", {"max_position_embeddings": 66}),
    "electra": ("ElectraModel", {}),
    "distilbert": ("DistilBertModel", {}),
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 1, "head_dim": 16}),
}


def tiny_model(family: str) -> torch.nn.Module:
    import transformers

    name, extra = FAMILY_MODELS[family]
    cls = getattr(transformers, name)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 50}
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 50}
    torch.manual_seed(0)
    return cls(cls.config_class(vocab_size=100, **(sizes | extra))).eval()


def as_mixture(model: torch.nn.Module, num_experts: int, num_active: int) -> list[MoEFFN]:
    layers = []
    for index in range(len(ffn_modules(model))):
        layers.append(random_moe(read_ffn(model, index), num_experts, num_active, seed=index))
    install_moe(model, layers)
    return layers


@pytest.mark.parametrize("family", sorted(FAMILY_MODELS))
def test_a_mixture_of_all_experts_is_the_dense_model(family):
    model = tiny_model(family)
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(input_ids=ids)[0]
        as_mixture(model, 8, 8)  # 50 neurons in 8 experts: padded
        mixture = model(input_ids=ids)[0]
    assert len(moe_layers(model)) == 2
    torch.testing.assert_close(mixture, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [make_tiny_bert, make_tiny_llama])
def test_save_and_load_is_identity_and_the_file_is_the_same_each_time(make, tmp_path: Path):
    model, tokenizer = load_dense(str(make(tmp_path / "teacher")))
    layers = as_mixture(model, 8, 2)
    layers[0].router.balance(torch.arange(8), 0.5)
    ffn = read_ffn(load_dense(str(tmp_path / "teacher"))[0], 0)
    spec = spec_for(ffn, 8, 2)
    checkpoint.save(model, tokenizer, spec, tmp_path / "a")
    loaded = ffn2moe.load(tmp_path / "a")
    ids = torch.randint(5, 90, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids)[0], model(input_ids=ids)[0])
    assert torch.equal(moe_layers(loaded)[0].router.balance_bias, layers[0].router.balance_bias)
    assert checkpoint.load_spec(tmp_path / "a") == spec
    checkpoint.save(loaded, tokenizer, spec, tmp_path / "b")
    for name in ("model.safetensors", "config.json", "ffn2moe.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path, tiny_teacher: Path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = load_dense(str(tiny_teacher))
    spec = spec_for(read_ffn(model, 0), 8, 2)
    as_mixture(model, 8, 2)
    checkpoint.save(model, tokenizer, spec, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.layer.0.intermediate.router.balance_bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing.*balance_bias"):
        ffn2moe.load(tmp_path)


def test_a_folder_without_a_spec_is_refused(tiny_teacher: Path):
    with pytest.raises(FileNotFoundError, match="not an ffn2moe checkpoint"):
        ffn2moe.load(tiny_teacher)


def test_an_unsupported_family_is_refused_with_the_list():
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=10, state_size=4))
    with pytest.raises(ValueError, match=r"'mamba'.*Supported are: .*bert"):
        family_of(model)


def test_a_teacher_with_nan_weights_is_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = make_tiny_bert(tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"NaN or infinite values in {name}"):
        load_dense(str(folder))


def test_a_teacher_that_is_not_there_is_named_with_what_to_do(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist: name a local"):
        load_dense(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="pip install no-such-model"):
        load_dense("package:no-such-model")


def test_more_active_experts_than_there_are_is_a_contradiction():
    with pytest.raises(ValueError, match="num_active must be between 1 and num_experts = 4"):
        spec_for(random_ffn(32), 4, 5)


def shared_moe(gate: str, shared_width: int, num_active: int, *, gated: bool = True) -> tuple[DenseFFN, MoEFFN]:
    """A dense FFN and its mixture: 44 neurons, some of them shared, the others in 4 experts padded to 8s."""
    ffn = random_ffn(44, gated=gated)
    expert_of_neuron_F = torch.full((44,), -1)
    expert_of_neuron_F[shared_width:] = torch.arange(44 - shared_width) % 4
    neurons_EM = neurons_by_expert(expert_of_neuron_F, 4, multiple=8)
    shared_S = shared_neurons(expert_of_neuron_F)
    spec = spec_for(
        ffn, 4, num_active, gate=gate, shared_width=shared_width, expert_width=neurons_EM.shape[1], router_bias=False
    )
    return ffn, MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM, shared_S), neurons_EM, shared_S=shared_S)


@pytest.mark.parametrize("gate", GATES.names())
@pytest.mark.parametrize("shared_width", [0, 10])
@pytest.mark.parametrize("gated", [True, False])
def test_a_router_that_scores_all_alike_and_all_experts_give_the_dense_ffn(gate: str, shared_width: int, gated: bool):
    ffn, moe = shared_moe(gate, shared_width, 4, gated=gated)
    x_TD = tokens()
    assert moe.w_in.shape[1] % 8 == 0
    assert (moe.eval()(x_TD) - ffn(x_TD)).abs().max() < 1e-5
    assert (moe.all_experts(x_TD) - ffn(x_TD)).abs().max() < 1e-5


@pytest.mark.parametrize("gate", GATES.names())
def test_the_grouped_form_is_the_reference_through_every_gate(gate: str):
    _, moe = shared_moe(gate, 10, 2)
    torch.nn.init.normal_(moe.router.weight, generator=torch.Generator().manual_seed(3))
    moe.router.balance_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    moe.router.scale.fill_(0.5)
    x_TD = tokens()
    assert torch.allclose(moe.eval()(x_TD), moe.reference(x_TD), atol=1e-5)
    assert torch.allclose(moe.train()(x_TD), moe.reference(x_TD), atol=1e-5)


def test_the_balance_bias_moves_the_choice_and_never_the_gates():
    scores_TE = tokens(20, 4)
    for gate in GATES:
        router = Router(8, 4, gate)
        choice = router.choose(scores_TE, 2)
        before = GATES[gate].weights(scores_TE, choice.experts_TK, choice.used_TK, training=False)
        router.balance_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
        assert set(router.choose(scores_TE, 2).experts_TK.flatten().tolist()) == {0, 1}
        assert torch.equal(GATES[gate].weights(scores_TE, choice.experts_TK, choice.used_TK, training=False), before)


@pytest.mark.parametrize("gate", GATES.names())
def test_a_fitted_router_scale_never_makes_the_routed_output_worse_than_equal_gates(gate: str):
    _, moe = shared_moe(gate, 0, 2)
    torch.nn.init.normal_(moe.router.weight, generator=torch.Generator().manual_seed(4))
    x_TD = tokens(200)
    y_TD = moe.all_experts(x_TD)

    def error() -> float:
        fit.fit_scale_and_mean(moe, x_TD)
        return (moe.eval()(x_TD) - y_TD).square().sum().item()

    chosen = moe.router.choose(moe.router(x_TD), 2).experts_TK
    moe.router.scale.fill_(2.0**-8)
    equal = error()
    fit.fit_router_scale(moe, x_TD)
    assert error() <= equal * (1 + 1e-5)
    assert torch.equal(moe.router.choose(moe.router(x_TD), 2).experts_TK, chosen)


def test_the_shared_expert_takes_the_neurons_with_most_output_energy():
    ffn = random_ffn(40)
    x_TD = tokens(500)
    statistics = NeuronStatistics(40)
    statistics.update(ffn.neurons(x_TD))
    shared_S = most_energetic(ffn, statistics, 8)
    assigned_F = assign_neurons(PARTITIONS["coactivation"], ffn, statistics, 4, 0, shared_S)
    energy_F = ffn.neurons(x_TD).double().square().mean(0) * ffn.w_out_DF.double().square().sum(0)
    assert set(shared_neurons(assigned_F).tolist()) == set(energy_F.topk(8).indices.tolist())
    assert torch.bincount(assigned_F[assigned_F >= 0]).tolist() == [8, 8, 8, 8]


def test_merging_gives_the_dense_ffn_back_with_a_shared_expert():
    ffn, moe = shared_moe("unit", 10, 2)
    weights = slice_experts(ffn, moe.neurons, moe.shared_neurons)
    back = merge_experts(weights, moe.neurons, ffn.activation, moe.shared_neurons)
    assert torch.equal(back.w_in_FD, ffn.w_in_FD) and torch.equal(back.w_out_DF, ffn.w_out_DF)
    assert back.w_gate_FD is not None and ffn.w_gate_FD is not None and torch.equal(back.w_gate_FD, ffn.w_gate_FD)
