"""The routing `sequence`: each text chooses its experts once, in the model and in the fits of the ablation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ablation.methods.sequence import (
    diagnose_texts,
    fit_router_of_texts,
    grams_of_texts,
    text_means,
)
from ffn2moe import metrics
from ffn2moe.data.batches import Batch
from ffn2moe.decompose import oracle
from ffn2moe.decompose.inputs import layer_inputs, texts_of
from ffn2moe.decompose.layer import output_of
from ffn2moe.decompose.route import RouterSettings
from ffn2moe.moe import checkpoint, fit
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import moe_layers
from tests import test_partition as partition
from tests import test_routing as routing
from tests import test_selection as core
from tests.conftest import make_tiny_classifier
from tests.mixtures import flat_spec
from tests.test_selection import D, E, batch, carve, make_moe, normal

KINDS = [{"routing": "sequence"}, {"routing": "sequence", "selection": "threshold"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_gives_every_model_back_bit_for_bit(tiny_teacher, tmp_path, kind):
    core.test_a_checkpoint_gives_every_model_back_bit_for_bit(tiny_teacher, tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_every_expert_the_model_is_its_teacher(tiny_teacher, kind):
    core.test_with_every_expert_the_model_is_its_teacher(tiny_teacher, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_distillation_reaches_every_router(tiny_teacher, kind):
    core.test_distillation_reaches_every_router(tiny_teacher, kind)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": "sequence", "head": "causal"}, "a causal model has not seen the rest: use routing token"),
        ({"routing": "sequence", "head": "seq2seq"}, "more than one stack of layers: use routing token"),
        ({"container": "mixtral", "head": "embedding", "routing": "sequence"}, "use container none"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        flat_spec(**{"num_experts": E, "num_active": 2} | changes)


# --- the model --------------------------------------------------------------------------------------------------------


def scores_of(model: Any, inputs: Batch) -> list[Tensor]:
    """What the router of each layer says, [B, L, E], for a batch."""
    seen: list[Tensor] = []
    for moe in moe_layers(model):
        moe.observer = lambda scores_TE, choice: seen.append(scores_TE)
    with torch.no_grad():
        model(**inputs.inputs)
    for moe in moe_layers(model):
        moe.observer = None
    return [scores_TE.reshape(*inputs.inputs["input_ids"].shape, -1) for scores_TE in seen]


def test_all_layers_read_the_mean_of_a_text_before_the_first_of_them(tiny_teacher):
    model, _ = carve(tiny_teacher, routing="sequence")
    inputs = batch(5, 9)
    first: list[Tensor] = []
    hook = moe_layers(model)[0].register_forward_pre_hook(lambda module, given: first.append(given[0]))
    found = scores_of(model, inputs)
    hook.remove()
    mask_BL = inputs.inputs["attention_mask"]
    mean_BD = torch.stack([x[mask.bool()].mean(0) for x, mask in zip(first[0], mask_BL, strict=True)])
    for moe, scores_BLE in zip(moe_layers(model), found, strict=True):
        torch.testing.assert_close(scores_BLE, moe.router(mean_BD).unsqueeze(1).expand_as(scores_BLE))


def test_padding_and_neighbours_change_no_texts_choice(tiny_teacher):
    model, _ = carve(tiny_teacher, routing="sequence")
    text = batch(6)
    ids_BL = torch.zeros(2, 20, dtype=torch.int64)
    ids_BL[0, :6], ids_BL[1] = text.inputs["input_ids"][0], torch.arange(5, 25)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, 6:] = 0
    padded = Batch({"input_ids": ids_BL, "attention_mask": mask_BL}, mask_BL)
    for alone, among in zip(scores_of(model, text), scores_of(model, padded), strict=True):
        torch.testing.assert_close(alone[0], among[0, :6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output_of(model, text), output_of(model, padded)[:6], rtol=1e-4, atol=1e-5)


def test_collected_tokens_are_routed_as_in_the_model(tiny_teacher):
    model, _ = carve(tiny_teacher, routing="sequence")
    batches = [batch(5, 9), batch(3, 12, 7)]
    masks = [one.inputs["attention_mask"].bool() for one in batches]
    by_layer = zip(*(scores_of(model, one) for one in batches), strict=True)
    seen = [torch.cat([scores[mask] for scores, mask in zip(layer, masks, strict=True)]) for layer in by_layer]
    inputs = layer_inputs(model, batches, max_tokens=1000)
    read_TD = text_means(inputs[0], texts_of(batches, 1000))
    for moe, x_TD, scores_TE in zip(moe_layers(model), inputs, seen, strict=True):
        moe.reader.collect(x_TD, read_TD)
        torch.testing.assert_close(moe.scores(x_TD), scores_TE, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moe.scores(x_TD[3:20]), scores_TE[3:20], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moe(x_TD), moe.reference(x_TD), rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_model_reads_its_own_texts(tiny_teacher):
    model, _ = carve(tiny_teacher, routing="sequence")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(-1)
    inputs = batch(5, 9)
    kept = output_of(model, inputs)
    assert not torch.allclose(output_of(other, inputs), kept)
    assert torch.equal(output_of(model, inputs), kept)


def test_a_layer_outside_its_model_says_that_it_needs_the_texts(tiny_teacher):
    model, _ = carve(tiny_teacher, routing="sequence")
    x_TD = normal(5, 32)
    with pytest.raises(ValueError, match="run the model, or first collect the tokens' texts"):
        moe_layers(model)[0](x_TD)
    with pytest.raises(ValueError, match="run the model, or first collect"):
        make_moe(routing="sequence")(normal(5, D))


def test_a_mask_that_is_no_mask_of_tokens_is_refused(tiny_teacher):
    model, _ = carve(tiny_teacher, routing="sequence")
    with pytest.raises(ValueError, match="an attention_mask"):
        model(input_ids=torch.ones(2, 6, dtype=torch.int64), attention_mask=torch.ones(2, 1, 6, 6))


def test_a_classifier_chooses_by_the_text_too(tmp_path):
    teacher = make_tiny_classifier(tmp_path / "teacher")
    model, spec = carve(teacher, head="classification", routing="sequence")
    checkpoint.save(model, None, spec, tmp_path / "checkpoint")
    text = batch(6).inputs
    padded = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in text.items()}
    for opened in (model, checkpoint.load(tmp_path / "checkpoint")):
        with torch.no_grad():
            torch.testing.assert_close(opened(**text).logits, opened(**padded).logits, rtol=1e-4, atol=1e-5)
    first, again = metrics.flops_per_token(spec, model.config, 16)[1], replace(spec, routing="token")
    assert 16 * first.router == metrics.flops_per_token(again, model.config, 16)[1].router


def test_a_model_that_reads_no_text_has_none_to_choose_by(tiny_teacher):
    from transformers import ViTConfig, ViTModel

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_size": 32}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False)
    layers = moe_layers(carve(tiny_teacher, routing="sequence")[0])
    with pytest.raises(ValueError, match="ViTModel reads pixel_values: use routing 'token'"):
        install_moe(model, layers)


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_one_choice_for_a_text_is_the_best_one_for_the_sum_of_its_tokens(selection):
    moe, x_TD = partition.layer(selection, routing="sequence"), partition.tokens(300)
    text_T = torch.arange(300) // 10
    read_TD = text_means(x_TD, text_T)
    moe.reader.collect(x_TD, read_TD)
    fit.calibrate(moe, x_TD)
    found = diagnose_texts(moe, x_TD, text_T, read_TD, chunk=70)
    assert 0 < found["oracle_error"] <= found["router_error"]
    by_token = oracle.best_scale(partition.layer(selection), x_TD).error
    assert by_token < found["oracle_error"]  # a choice for each token can do no worse
    survey = oracle.survey_of(moe, grams_of_texts(moe, x_TD, text_T, chunk=70))
    assert survey.gain_TE.shape == survey.norm_TE.shape == (30, 6)
    if selection == "topk":
        outputs_TED = oracle.expert_outputs(moe, x_TD)
        summed_BEE = oracle.gram(outputs_TED).view(30, 10, 6, 6).sum(1)
        assert torch.equal(survey.chosen_TE, oracle.oracle(summed_BEE, 3).chosen_TE)


@pytest.mark.parametrize("selection", ["topk", "threshold", "prefix"])
def test_a_router_is_fitted_to_texts_and_uses_k_experts_on_average(selection):
    moe, x_TD = routing.toy(selection=selection, routing="sequence"), routing.tokens()
    text_T = torch.arange(len(x_TD)) // 3
    read_TD = text_means(x_TD, text_T)
    losses = fit_router_of_texts(moe, x_TD, text_T, read_TD, RouterSettings(**routing.TRAINING))
    assert losses[-1] < losses[len(losses) // 3]
    found = diagnose_texts(moe, x_TD, text_T, read_TD)
    assert found["mean_active"] == pytest.approx(2, abs=0.02)
    blind = routing.toy(selection=selection, routing="sequence")
    blind.router.set(routing.normal(routing.EXPERTS, routing.WIDTH, seed=11), torch.zeros(routing.EXPERTS))
    blind.reader.collect(x_TD, read_TD)
    fit.calibrate(blind, x_TD)
    assert found["router_error"] < diagnose_texts(blind, x_TD, text_T, read_TD)["router_error"]
