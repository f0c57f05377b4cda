"""The loss of a language model that is made a few tokens at a time is the loss of all logits at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from benchmarks import distillation
from ffn2moe.data.batches import Batch, Batches, collate
from ffn2moe.data.ranks import Ranks
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.dense.load import load_dense
from ffn2moe.distill import vocabulary
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.divergences import DIVERGENCES
from ffn2moe.distill.losses import logits_loss
from ffn2moe.distill.objectives import LogitsObjective, LossWeights, NextTokenObjective, objective_for
from ffn2moe.distill.vocabulary import OutputMatrix, divergence_sum, ends_in_matrix
from tests.conftest import make_tiny_llama
from tests.texts import make_texts

BY_TOKEN = ("forward_kl", "reverse_kl", "taid")
T, D, V = 37, 8, 50


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen tokens at once: the 37 of these tests are in three parts."""
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", 16 * V)


@pytest.mark.parametrize("divergence", BY_TOKEN)
@pytest.mark.parametrize("trained", ["states", "matrix", "all"])
def test_value_and_gradients_are_those_of_all_logits_at_once(divergence: str, trained: str):
    of_tokens = DIVERGENCES[divergence].of_tokens
    assert of_tokens is not None
    found = []
    for divided in (True, False):
        states_TD = normal(T, D, seed=1).requires_grad_(trained != "matrix")
        weight_VD = normal(V, D, seed=2).requires_grad_(trained != "states")
        bias_V = normal(V, seed=3).requires_grad_(trained != "states")
        teacher_TD, teacher = normal(T, D, seed=4), OutputMatrix(normal(V, D, seed=5), normal(V, seed=6))
        if divided:
            student = OutputMatrix(weight_VD, bias_V)
            total = divergence_sum(
                states_TD, student, teacher_TD, teacher, lambda one, other: of_tokens(one, other, 0.3)
            )
            loss = total / T
        else:
            logits_TV, wanted_TV = F.linear(states_TD, weight_VD, bias_V), teacher.logits(teacher_TD)
            loss = logits_loss(logits_TV, wanted_TV, None, divergence=divergence, progress=0.3)
        (3 * loss).backward()
        found.append([loss.detach(), states_TD.grad, weight_VD.grad, bias_V.grad])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    matrix = OutputMatrix(normal(V, D), None)
    total = divergence_sum(
        normal(T, D, seed=1), matrix, normal(T, D), matrix, lambda one, other: (one - other).square()
    )
    assert total > 0 and not total.requires_grad


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A teacher, and a student whose weights differ a little."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("llama"))
    teacher, student = load_dense(str(folder))[0], load_dense(str(folder))[0]
    with torch.no_grad():
        for seed, parameter in enumerate(student.parameters()):
            parameter += 0.05 * normal(*parameter.shape, seed=seed)
    return teacher, student


def batch_of(models: tuple[Any, Any]) -> Batch:
    lengths = (16, 9, 12)
    ids = [torch.randint(3, models[0].config.vocab_size, (length,)).tolist() for length in lengths]
    return collate("causal", ids)


@pytest.mark.parametrize("divergence", BY_TOKEN)
@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_a_step_of_a_language_model_is_that_of_the_plain_objective(
    models: tuple[Any, Any], divergence: str, hidden_weight: float
):
    teacher, student = models
    weights = LossWeights(hidden=hidden_weight, divergence=divergence)
    divided = objective_for("causal", weights, teacher=teacher)
    plain = objective_for("causal", weights)
    assert type(divided) is NextTokenObjective and type(plain) is LogitsObjective
    batch, found = batch_of(models), []
    for objective in (divided, plain):
        student.zero_grad()
        with torch.no_grad():
            wanted = objective.outputs(teacher, batch)
        loss = objective.loss(objective.outputs(student, batch), wanted, batch, 0.3)
        loss.total.backward()
        gradients = {name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None}
        found.append({"loss": loss.total.detach(), **loss.terms} | gradients)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, wanted_one in found[1].items():
        torch.testing.assert_close(
            found[0][name], wanted_one, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_parts_of_two_processes_add_up_to_the_loss_of_the_batch(models: tuple[Any, Any]):
    teacher, student = models
    objective = objective_for("causal", teacher=teacher)
    batch = batch_of(models)

    class Two(Ranks):
        """What each of two processes gets from the other: the energies and the count of the whole batch."""

        def total(self, count: int) -> int:
            return int(batch.mask.sum())

        def sum(self, tensor: Tensor) -> Tensor:
            hidden = objective.outputs(teacher, batch).hidden
            return torch.stack([(one.square().sum(-1) * batch.mask).sum() for one in hidden])

    with torch.no_grad():
        whole = objective.loss(objective.outputs(student, batch), objective.outputs(teacher, batch), batch, 0.0)
        parts = []
        for rank in (0, 1):
            part = batch.part(Two(rank, 2))
            parts.append(objective.loss(objective.outputs(student, part), objective.outputs(teacher, part), part, 0.0))
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)


def test_under_autocast_the_matrix_is_in_bfloat16_and_the_loss_is_near(models: tuple[Any, Any]):
    teacher, student = models
    objective, batch, found = objective_for("causal", teacher=teacher), batch_of(models), []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = [objective.outputs(model, batch) for model in (student, teacher)]
        assert outputs[0].matrix is not None
        assert (outputs[0].matrix.weight_VD.dtype == torch.bfloat16) == bf16
        found.append(objective.loss(*outputs, batch, 0.0).total)
    assert found[1].item() == pytest.approx(found[0].item(), rel=0.05)


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.02}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.1}),
    ],
)
def test_logits_that_a_model_scales_or_bounds_are_compared_as_it_makes_them(name: str, settings: dict[str, float]):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, **SIZES, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings
    )
    models, gradients = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(getattr(transformers, f"{name}ForCausalLM")(config).eval())
    batch = collate("causal", [list(range(3, 30)), list(range(9, 20))])
    for objective in (objective_for("causal", teacher=models[0]), objective_for("causal")):
        models[1].zero_grad()
        objective.loss(*(objective.outputs(one, batch) for one in reversed(models)), batch, 0.0).total.backward()
        gradients.append([one.grad for one in models[1].parameters()])
        assert type(objective) is (LogitsObjective if gradients[1:] else NextTokenObjective)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_model_that_does_something_else_to_its_logits_keeps_the_plain_objective(models: tuple[Any, Any]):
    changed = copy.deepcopy(models[0])
    changed.lm_head.register_forward_hook(lambda module, states, logits: 2 * logits.sin())
    assert ends_in_matrix(models[0]) and not ends_in_matrix(changed)
    assert type(objective_for("causal", teacher=changed)) is LogitsObjective


def test_neither_calibration_nor_a_step_computes_all_logits(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    teacher, student = models
    objective, batch = objective_for("causal", teacher=teacher), batch_of(models)
    with torch.no_grad():
        inputs = {}
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, args, index=index: inputs.__setitem__(index, args[0]))
            for index, layer in enumerate(teacher.model.layers)
        ]
        teacher(**batch.inputs)
    for hook in hooks:
        hook.remove()
    for model in models:
        monkeypatch.setattr(model.lm_head, "forward", None)
    found = layer_inputs(teacher, [batch], max_tokens=1000)
    assert [one.equal(inputs[index][batch.mask.bool()]) for index, one in enumerate(found)] == [True, True]
    loss = objective.loss(objective.outputs(student, batch), objective.outputs(teacher, batch), batch, 0.0)
    assert loss.total.isfinite()


def test_a_training_that_was_stopped_ends_in_the_same_bits(models: tuple[Any, Any]):
    teacher, ids = models[0], torch.randint(3, 100, (40, 16)).tolist()

    def run(scope: str) -> Distiller:
        training = Training(steps=6, learning_rate=1e-3, bf16=True, scope="all" if scope == "all" else "experts")
        batches = Batches(ids, batch_tokens=64, seed=0, head="causal")
        student = copy.deepcopy(models[1])
        return Distiller(teacher, student, batches, objective_for("causal", teacher=teacher), training)

    for scope in ("experts", "all"):
        whole = run(scope)
        losses = [found.loss for found in whole.run()]
        stopped = run(scope)
        for _ in zip(range(2), stopped.run(), strict=False):
            pass
        resumed = run(scope)
        resumed.restore(stopped.step, {name: tensor.clone() for name, tensor in stopped.state().items()})
        assert [found.loss for found in resumed.run()] == losses[stopped.step :]
        wanted, found = whole.student.state_dict(), resumed.student.state_dict()
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_ways_to_distil_are_compared_for_the_same_time(models: tuple[Any, Any], tmp_path: Path, capsys):
    folder = make_tiny_llama(tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text.replace("\n", " ") for text in make_texts(200)))
    arguments = f"{folder} --text {texts} --corpora {texts} generated --minutes 0.01 --length 16 --judged 400"
    arguments += f" --batch-tokens 64 --work {tmp_path / 'work'}"
    cells = [str(texts), "hidden 0", "every weight", "generated"]
    assert distillation.main([*arguments.split(), "--cells", *cells, "--out", str(tmp_path / "page.md")]) == 0
    found = json.loads((tmp_path / "page.json").read_text())["rows"]
    assert [row["cell"] for row in found] == ["routed, not distilled", str(texts), "generated", *cells[1:3]]
    assert all(row["steps"] > 0 and row["ratio"] > 0 for row in found[1:])
    assert "| every weight |" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    assert distillation.main([*arguments.split(), "--cells", "nothing"]) == 2
    assert "unknown cell 'nothing'; known: " in capsys.readouterr().err
