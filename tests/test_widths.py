"""A width for each layer: what it costs, how it is chosen, and that every stage and format holds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import ffn2moe
from ffn2moe.cli import main as cli
from ffn2moe.containers.gguf import folder_of
from ffn2moe.conversion.settings import Settings
from ffn2moe.convert import convert
from ffn2moe.data.batches import in_order
from ffn2moe.decompose import elimination
from ffn2moe.decompose.elimination import errors_by_width, most_needed
from ffn2moe.decompose.gradients import fisher
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer
from ffn2moe.decompose.narrow import narrowed
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.decompose.stream_weights import read_fisher, weigh
from ffn2moe.decompose.width_costs import costs, moments_of, widths_of
from ffn2moe.decompose.widths import active_widths, by_need, widths_for, with_widths
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.sentence import attach
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import moe_layers
from ffn2moe.moe.variants import Variant, variants_of
from ffn2moe.onnx.write import export_model
from ffn2moe.runtime.plans import is_dense, plans_of
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import MoESpec
from tests.conftest import make_tiny_bert, make_tiny_llama
from tests.test_families import tiny
from tests.test_smaller_students import read, world
from tests.test_token_experts import make_ffn, spec_for, tokens
from tests.texts import make_stage, make_texts, write_corpus

CLUSTERS = (
    "decompose.num_experts=4",
    "decompose.num_active=1",
    "decompose.container=none",
    "distill.layerwise_steps=2",
    "export.engines=[onnxruntime, openvino]",
)
NARROW = ("decompose.ffn_width=0.5", "decompose.num_experts=1", "decompose.num_active=1", "distill.steps=2")
BUDGET = "decompose.width_per_layer=budget"


def uneven_llama(folder: Path) -> Path:
    """A tiny LLaMA whose first FFN gives little, so that it needs few neurons."""
    model, _ = load_dense(str(make_tiny_llama(folder)))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 0.2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clusters(tmp_path_factory) -> Path:
    """Every stage on a mixture with experts for clusters of tokens; the width for each layer is the default."""
    return world(tmp_path_factory.mktemp("clusters"), uneven_llama, CLUSTERS)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """Every stage on a language model without experts, whose FFNs are narrower by need."""
    return world(tmp_path_factory.mktemp("narrow"), uneven_llama, (*NARROW, BUDGET))


# --- what a width costs -----------------------------------------------------------------------------------------------


def test_the_error_of_each_width_is_that_of_the_best_fit_of_the_neurons_that_stay(monkeypatch):
    monkeypatch.setattr(elimination, "DAMPING", 1e-7)
    ffn, (x_TD, _) = make_ffn(), tokens(2000, seed=1)
    h_TF = ffn.neurons(x_TD)
    gram_FF, widths = h_TF.T @ h_TF, (8, 20, 32, 48)
    found_N = errors_by_width(gram_FF, ffn.w_out_DF, widths)
    assert found_N[-1] == 0 and (found_N.diff() < 0).all()
    wanted_TD = h_TF @ ffn.w_out_DF.T
    for width, found in zip(widths[:-1], found_N.tolist(), strict=False):
        neurons_S = most_needed(gram_FF, ffn.w_out_DF, width)
        fitted_SD = torch.linalg.lstsq(h_TF[:, neurons_S], wanted_TD).solution
        best = (h_TF[:, neurons_S] @ fitted_SD - wanted_TD).square().sum().item()
        assert found == pytest.approx(best, rel=0.01)


def test_the_cost_weighs_an_error_by_the_direction_that_the_model_feels_it_in():
    ffn, (x_TD, _) = make_ffn(), tokens(500, seed=1)
    D, moments = len(ffn.w_out_DF), moments_of(ffn, x_TD)
    even_N = costs(ffn, moments, torch.eye(D))
    assert len(even_N) == len(widths_of(ffn.ffn_width)) and even_N[-1] == 0 and (even_N.diff() < 0).all()
    assert torch.allclose(costs(ffn, moments, 4 * torch.eye(D)), 4 * even_N, rtol=1e-4)
    one_DD = torch.zeros(D, D)
    one_DD[0, 0] = 1.0  # only the first output counts, which few neurons can stand in for
    assert costs(ffn, moments, one_DD)[3] < 0.2 * even_N[3]


@pytest.mark.parametrize(("make", "head"), [(make_tiny_bert, "embedding"), (make_tiny_llama, "causal")])
def test_the_fisher_information_says_how_far_an_error_moves_the_model(make, head, tmp_path):
    """Errors in the output of an FFN move the output as far as the quadratic form says, on average."""
    model, _ = load_dense(str(make(tmp_path / "teacher")))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (400, 12), generator=generator).tolist()
    (batch,) = in_order(head, ids, batch_texts=400)
    fishers = fisher(model, [batch] * 4, head=head, max_tokens=400 * 12 * 4, seed=0)
    assert not any(parameter.grad is not None for parameter in model.parameters())

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            found = model(**batch.inputs)
        if head == "causal":
            return found.logits.log_softmax(-1)
        return F.normalize(found[0].mean(1), dim=1)  # no text is padded

    for layer, fisher_DD in enumerate(fishers):
        ffn = read_ffn(model, layer)
        error_BLD = 0.01 * torch.randn(400, 12, ffn.w_in_FD.shape[1], generator=generator)
        module = model.get_submodule(
            f"encoder.layer.{layer}.output.dense" if head == "embedding" else f"model.layers.{layer}.mlp.down_proj"
        )
        before = outputs()
        hook = module.register_forward_hook(lambda module, inputs, output, e=error_BLD: output + e)
        after = outputs()
        hook.remove()
        if head == "causal":
            moved = F.kl_div(after, before, log_target=True, reduction="sum").item()
        else:
            moved = (after - before).square().sum().item() / 2
        error_TD = error_BLD.flatten(0, 1)
        assert moved == pytest.approx((error_TD @ fisher_DD * error_TD).sum().item() / 2, rel=0.25)


def test_the_neurons_that_stay_are_those_that_the_model_feels():
    """Where the first output alone counts, the neurons that stay are nearer in it than those that serve all outputs."""
    ffn, (x_TD, _) = make_ffn(), tokens(2000, seed=1)
    fisher_DD = torch.zeros(len(ffn.w_out_DF), len(ffn.w_out_DF))
    fisher_DD[0, 0] = 1.0
    wanted_T = ffn(x_TD)[:, 0]
    plain, weighed = (narrowed(ffn, x_TD, 12, one)(x_TD)[:, 0] for one in (None, fisher_DD))
    assert (weighed - wanted_T).norm() < 0.9 * (plain - wanted_T).norm()


def test_widths_add_up_to_the_budget_and_the_layer_that_needs_more_gets_more():
    spec = spec_for(12, 12)
    spec = replace(spec, stacks=(replace(spec.stacks[0], num_layers=2),))
    ffn, (x_TD, _) = make_ffn(), tokens(500, seed=1)
    costs_N = costs(ffn, moments_of(ffn, x_TD), torch.eye(len(ffn.w_out_DF)))
    found = with_widths(spec, [costs_N, 10 * costs_N])
    one, other = active_widths(found)
    assert one < 24 < other and one + other == 48
    shape = found.stacks[0]
    assert shape.expert_width == max(shape.expert_widths) and shape.shared_width == max(shape.shared_widths)
    assert found.active_share == spec.active_share
    assert active_widths(with_widths(spec, [costs_N, costs_N])) == [24, 24]


# --- the spec ---------------------------------------------------------------------------------------------------------


def test_a_spec_with_widths_survives_the_file_and_one_without_is_written_as_before():
    spec = spec_for(16, 0)
    assert not {"expert_widths", "shared_widths", "ffn_widths"} & set(spec.to_dict()["stacks"][0])
    shape = replace(spec.stacks[0], num_layers=2, expert_width=28, expert_widths=(4, 28))
    varied = replace(spec, stacks=(shape,))
    assert MoESpec.from_dict(json.loads(json.dumps(varied.to_dict()))) == varied
    assert [varied.shape_of(layer).expert_width for layer in range(2)] == [4, 28]
    assert varied.active_share == pytest.approx(16 / 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_widths": (4, 16, 16)}, "each of the 1 layers"),
        ({"expert_widths": (12,)}, "the largest 16"),
        ({"shared_widths": (-1,)}, "the largest 0"),
    ],
)
def test_widths_that_do_not_fit_the_layers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(spec_for(16, 0).stacks[0], **changes)


def test_a_container_with_one_width_refuses_layers_of_different_ones():
    shape = replace(spec_for(16, 0).stacks[0], num_layers=2, expert_widths=(4, 16))
    with pytest.raises(ValueError, match="the container mixtral has one width for all layers"):
        replace(spec_for(16, 0), stacks=(shape,), container="mixtral")


def test_a_layer_that_stays_dense_counts_all_its_neurons_once_whatever_its_experts_hold():
    shape = replace(spec_for(16, 0).stacks[0], num_layers=4, expert_width=48, expert_widths=(4, 8, 30, 48))
    spec = replace(spec_for(16, 0), stacks=(shape,))
    assert [variant.dense_layers for variant in variants_of(spec)] == [(3,), (2, 3)]
    assert Variant(dense_layers=(2, 3)).spec(spec).active_share == pytest.approx((4 + 8 + 48 + 48) / (4 * 48))


# --- through the stages -----------------------------------------------------------------------------------------------


def test_the_layers_of_a_mixture_have_widths_of_their_own_in_every_stage(clusters):
    decomposed, distilled = (checkpoint.load_spec(clusters / "models" / name) for name in ("decomposed", "distilled"))
    assert not decomposed.stacks[0].varied and decomposed.stacks[0].expert_width == 12
    first, second = distilled.stacks[0].expert_widths
    assert first < 12 < second and first + second == 24
    student = checkpoint.load(clusters / "models/distilled")
    assert [moe.neurons.shape for moe in moe_layers(student)] == [(4, first), (4, second)]
    figures = read(clusters / "metrics/evaluate.json")
    assert figures["active_ffn_share"] == 0.25 and len(figures["layers"]) == 2
    assert figures["student"]["to_teacher"]["divergence"] < figures["training_free"]["to_teacher"]["divergence"]


def test_every_plan_holds_layers_of_different_widths(clusters, capsys):
    manifest = read(clusters / "models/exported/manifest.json")
    plans = manifest["plans"]
    assert {"dense", "sorted", "sorted8", "fused", "qmoe8", "qmoe4"} <= set(plans), manifest["refused"]
    exact = [plan for plan, entry in plans.items() if entry["precision"] == "float32"]
    assert set(exact) >= {"sorted", "fused"} and all(plans[plan]["parity_max_abs"] <= 1e-4 for plan in exact)
    export = clusters / "exports/small"
    assert "".join(ffn2moe.open_export(export).generate("the list", max_new_tokens=4))
    assert cli(["info", str(export)]) == 0
    widths = checkpoint.load_spec(export / "checkpoint").stacks[0].expert_widths
    assert f"{widths[0]} to {widths[1]} (12 on average)" in " ".join(capsys.readouterr().out.split())
    assert f"{widths[0]} to {widths[1]} (12 on average)" in (clusters / "reports/report.html").read_text("utf-8")


def test_every_plan_of_an_encoder_holds_them_in_both_engines(tmp_path):
    model, tokenizer = load_dense(str(make_tiny_bert(tmp_path / "teacher")))
    attach(model, SentenceModules(pooling=("mean",)))
    facts = {"head": "embedding", "partition": "token_clusters", "teacher": "tiny", "max_length": 32}
    spec = spec_of(model, num_experts=4, num_active=1, **facts)
    shape = replace(spec.stacks[0], expert_width=24, expert_widths=(8, 24))
    varied = replace(spec, stacks=(shape,))
    layers = []
    for layer in range(2):
        x_TD = torch.randn(600, 32, generator=torch.Generator().manual_seed(layer))
        layers.append(decompose_layer(read_ffn(model, layer), x_TD, spec, layer, seed=0))
        settings = RouterSettings(steps=5, batch_tokens=100, seed=0)
        route_layer(layers[-1], x_TD, settings, partition="token_clusters", widths=widths_for(varied, layer))
    install_moe(model, layers)
    engines = ("onnxruntime", "openvino")
    manifest = export_model(model, None, tokenizer, varied, tmp_path / "out", engines=engines)
    made = set(manifest["plans"])
    assert {plan for plan in plans_of("embedding", engines) if not is_dense(plan)} == made | set(manifest["refused"])
    assert {"sorted", "fused", "ov-native", "ov-native4"} <= made or "native" in str(manifest["refused"])
    assert all("width" not in reason for reason in manifest["refused"].values()), manifest["refused"]


def test_a_mixture_with_widths_can_be_shrunk_to_fewer_experts(clusters, tmp_path):
    corpus = write_corpus(tmp_path / "texts.jsonl", make_texts(30))
    arguments = ["shrink", str(clusters / "exports/small"), str(corpus), "--keep", "2", "--method", "drop"]
    assert cli([*arguments, "--out", str(tmp_path / "small"), "--no-onnx"]) == 0
    widths = checkpoint.load_spec(clusters / "models/distilled").stacks[0].expert_widths
    student = ffn2moe.load(tmp_path / "small/checkpoint")
    assert [moe.neurons.shape for moe in moe_layers(student)] == [(2, width) for width in widths]


def test_the_ffns_of_a_student_without_experts_have_widths_of_their_own(narrow):
    spec = checkpoint.load_spec(narrow / "models/distilled")
    first, second = spec.stacks[0].ffn_widths
    assert first < 24 < second and first + second == 48 and spec.is_dense and not spec.is_ordinary
    student = ffn2moe.load(narrow / "exports/small/checkpoint")
    assert [layer.mlp.down_proj.in_features for layer in student.model.layers] == [first, second]
    assert read(narrow / "metrics/evaluate.json")["active_ffn_share"] == 0.5
    assert f"{first} to {second} (24 on average) of 48 neurons" in (narrow / "reports/report.html").read_text("utf-8")
    plans = read(narrow / "models/exported/manifest.json")["plans"]
    assert plans["student"]["parity_max_abs"] <= 1e-4
    assert "".join(ffn2moe.open_export(narrow / "models/exported", "student").generate("the list", max_new_tokens=4))
    assert cli(["verify", str(narrow / "exports/small")]) == 0
    assert folder_of(str(narrow / "exports/small")) == narrow / "exports/small/checkpoint"  # llama.cpp reads its widths


def test_an_encoder_gets_widths_by_the_distance_of_its_embeddings(tmp_path):
    def uneven(folder: Path) -> Path:
        model, _ = load_dense(str(make_tiny_bert(folder)))
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight *= 0.1
        model.save_pretrained(folder)
        return folder

    root = world(tmp_path, uneven, (*NARROW, BUDGET))
    first, second = checkpoint.load_spec(root / "exports/small/checkpoint").stacks[0].ffn_widths
    assert first > second
    assert ffn2moe.open_export(root / "exports/small").encode(["a red house"]).shape[0] == 1


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_weights_and_widths_from_shards_are_those_of_the_whole_model(case, tmp_path, monkeypatch):
    """From shards only so many tokens pass through the layers as the costs are measured on."""
    for name, most in (
        ("widths.COST_TOKENS", 700),
        ("stream_weights.COST_TOKENS", 700),
        ("stream_weights.FISHER_TOKENS", 300),
        ("gradients.TOKENS_AT_ONCE", 160),
    ):
        monkeypatch.setattr(f"ffn2moe.decompose.{name}", most)
    model = tiny(case)
    model.save_pretrained(tmp_path / "teacher")
    spec = spec_of(
        model, head="causal", num_experts=4, num_active=1, partition="token_clusters", teacher="tiny", max_length=16
    )
    ids = torch.randint(5, 60, (90, 16), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(in_order("causal", ids, batch_texts=40))
    ffns = [read_ffn(model, layer) for layer in range(spec.num_layers)]
    inputs = layer_inputs(model, batches, max_tokens=2000)
    fishers = fisher(model, batches, head="causal", seed=3, max_tokens=300)
    whole, teacher = by_need(spec, ffns, inputs, fishers), tmp_path / "teacher"
    assert weigh(teacher, spec, batches, tmp_path / "weights", by_need=True, seed=3) == whole
    assert weigh(teacher, spec, batches, tmp_path / "alone", by_need=False, seed=3) == spec
    for layer, fisher_DD in enumerate(fishers):
        for folder in (tmp_path / "weights", tmp_path / "alone"):
            assert torch.allclose(read_fisher(folder, layer), fisher_DD, rtol=1e-3, atol=1e-6 * fisher_DD.abs().max())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "teacher", "weights"]


# --- settings ---------------------------------------------------------------------------------------------------------

QUICK = Settings(texts=60, max_length=16, calibration_tokens=200, distill_steps=2, onnx=False)


def test_a_conversion_chooses_widths_where_no_container_is_wanted(tmp_path):
    llama, said = str(uneven_llama(tmp_path / "dense")), []
    convert(llama, tmp_path / "out", replace(QUICK, container="none"), say=said.append)
    spec = checkpoint.load_spec(tmp_path / "out/checkpoint")
    assert spec.partition == "token_clusters" and len(set(spec.stacks[0].expert_widths)) == 2
    assert any(line.startswith("neurons that a token uses, layer by layer: ") for line in said)
    convert(llama, tmp_path / "contained", QUICK)
    assert not checkpoint.load_spec(tmp_path / "contained/checkpoint").stacks[0].varied
    manifest = convert(llama, tmp_path / "asked", replace(QUICK, width_per_layer="budget"))
    assert "container" not in manifest and checkpoint.load_spec(tmp_path / "asked/checkpoint").stacks[0].varied
    settings = replace(QUICK, num_experts=1, ffn_width=0.5, width_per_layer="budget")
    convert(llama, tmp_path / "narrow", settings)
    assert ffn2moe.load(tmp_path / "narrow/checkpoint").config.intermediate_size > 24


def test_experts_for_clusters_of_tokens_can_be_wider_than_their_share(tmp_path):
    bert, corpus = str(make_tiny_bert(tmp_path / "dense")), write_corpus(tmp_path / "texts.jsonl", make_texts(60))
    clusters = replace(QUICK, corpus=str(corpus), partition="token_clusters", width_per_layer="same", num_experts=6)
    convert(bert, tmp_path / "out", replace(clusters, expert_width=0.25))
    spec = checkpoint.load_spec(tmp_path / "out/checkpoint")
    assert spec.expert_width == 16 and spec.active_share == 0.25
    for moe in moe_layers(ffn2moe.load(tmp_path / "out/checkpoint")):
        assert moe.neurons.shape == (6, 16) and len(moe.neurons.unique()) <= 64
        assert all(len(own.unique()) == 16 for own in moe.neurons)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"expert_width": 11},
            "expert_width = 11 is 11 neurons: 4 experts hold an FFN of 48 .* if each has 12 or more",
        ),
        ({"expert_width": "full"}, "expert_width = 'full' must be auto, a number of neurons, or a share"),
        ({"expert_width": 0.2}, "expert_width = 0.2 is 10 neurons"),
        ({"expert_width": 49}, "none can have more than 48"),
        (
            {"expert_width": 20, "partition": "coactivation"},
            "puts each neuron in one: use the partition token_clusters",
        ),
    ],
)
def test_a_width_that_experts_cannot_have_is_refused_before_any_work(changes, message, tmp_path):
    llama = str(make_tiny_llama(tmp_path / "dense"))
    with pytest.raises(ValueError, match=message):
        convert(llama, tmp_path / "out", replace(QUICK, **changes))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"container": "mixtral"}, "--width-per-layer budget gives each layer .* mixtral has one width"),
        ({"partition": "coactivation"}, "--width-per-layer budget: .* use the partition token_clusters"),
        ({"num_active": 2}, "--width-per-layer budget: .* use the partition token_clusters"),
        ({"num_experts": 1, "keep_layers": 1}, "--width-per-layer budget: .* set ffn_width"),
    ],
)
def test_what_cannot_have_a_width_for_each_layer_is_refused_before_any_work(changes, message, tmp_path):
    llama = str(make_tiny_llama(tmp_path / "dense"))
    with pytest.raises(ValueError, match=message):
        convert(llama, tmp_path / "out", replace(QUICK, width_per_layer="budget", **changes))
    assert not (tmp_path / "out.partial").exists()


def test_the_parameters_refuse_a_container_with_widths(tmp_path):
    with pytest.raises(ValueError, match="a native container has one width for all layers"):
        make_stage("decompose", tmp_path, BUDGET, "decompose.container=mixtral")
