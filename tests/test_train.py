"""Training: what the losses are, that they fall, and that a run that is stopped ends where one that is not does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffn2moe.data.batches import Batches
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.distill.distiller import Distiller, Scope, Training
from ffn2moe.distill.losses import distillation_loss
from ffn2moe.distill.objectives import EmbeddingObjective, LogitsObjective
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN, moe_layers
from tests.conftest import WORDS, make_tiny_llama
from tests.test_core import as_mixture, spec_for


def test_distillation_loss_is_zero_for_the_teacher_itself_and_ignores_padding():
    hidden = tuple(torch.randn(3, 5, 8) for _ in range(2))
    embedding = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    weights = {"hidden_weight": 1.0, "embedding_weight": 10.0, "relational_weight": 100.0}
    padded = tuple(h + 5 * (1 - mask).unsqueeze(-1) for h in hidden)
    same = distillation_loss(padded, hidden, embedding, embedding, mask, **weights)
    assert same.total.item() == pytest.approx(0, abs=1e-5)
    other = distillation_loss(tuple(2 * h for h in hidden), hidden, -embedding, embedding, mask, **weights)
    assert other.hidden.item() == pytest.approx(2.0, abs=1e-5)  # ||h||^2 / ||h||^2, twice
    assert other.embedding.item() == pytest.approx(2.0, abs=1e-5)


def test_batches_depend_on_the_step_alone():
    ids = [[5] * (1 + index % 40) for index in range(200)]
    batches = Batches(ids, batch_tokens=128, seed=3)
    stream = batches.from_step(0)
    first = [next(stream) for _ in range(2 * batches.per_epoch + 3)]
    resumed = batches.from_step(batches.per_epoch + 2)
    for expected in first[batches.per_epoch + 2 :]:
        found = next(resumed)
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(found.inputs[name], expected.inputs[name])
    assert {batch.inputs["input_ids"].shape for batch in first} == {(8, 16), (4, 32), (2, 48)}


def test_blocks_of_one_length_are_not_padded_and_each_head_gets_its_mask():
    blocks = [[7] * 40] * 20
    batch = next(Batches(blocks, batch_tokens=128, seed=0, head="causal").from_step(0))
    assert batch.inputs["input_ids"].shape == (3, 40) and batch.mask.all()
    assert next(Batches(blocks, batch_tokens=128, seed=0, head="classification").from_step(0)).mask is None
    given = [[0] + [3] * (index % 4) for index in range(20)]
    batch = next(Batches(blocks, batch_tokens=800, seed=0, head="seq2seq", decoder_ids=given).from_step(0))
    assert batch.inputs["decoder_input_ids"].shape == batch.mask.shape == (20, 4)
    assert batch.mask.sum() == sum(map(len, given))


def test_too_few_texts_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="do not fill one batch"):
        Batches([[1, 2, 3]], batch_tokens=4096, seed=0)


def distiller(teacher: Path, steps: int, folder: Path, scope: Scope = "experts") -> Distiller:
    dense, tokenizer = load_dense(str(teacher))
    student, _ = load_dense(str(teacher))
    spec = spec_for(read_ffn(student, 0), 4, 1)
    as_mixture(student, 4, 1)
    checkpoint.save(student, tokenizer, spec, folder)
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 4 + i % 12)) for i in range(1, 200)]
    batches = Batches(tokenizer(texts)["input_ids"], batch_tokens=256, seed=0)
    return Distiller(
        dense,
        checkpoint.load(folder),
        batches,
        EmbeddingObjective(hidden_weight=1.0, embedding_weight=10.0, relational_weight=100.0),
        Training(steps=steps, learning_rate=3e-3, balance_step=1e-3, scope=scope),
    )


def test_distillation_brings_the_student_closer_and_trains_every_part(tiny_teacher: Path, tmp_path: Path):
    run = distiller(tiny_teacher, 40, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in run.trained.items()}
    losses = [metrics.loss for metrics in run.run()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    still = [name for name, parameter in run.trained.items() if torch.equal(parameter, before[name])]
    assert still == []
    assert not run.student.training
    assert any(layer.router.balance_bias.abs().sum() > 0 for layer in moe_layers(run.student))
    frozen = [p for n, p in run.student.named_parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def test_all_weights_are_trained_where_that_is_asked(tiny_teacher: Path, tmp_path: Path):
    run = distiller(tiny_teacher, 4, tmp_path, scope="all")
    before = {name: parameter.detach().clone() for name, parameter in run.student.named_parameters()}
    list(run.run())
    still = [name for name, parameter in run.student.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


@pytest.mark.parametrize("scope", ["experts", "all"])
def test_a_distillation_that_was_stopped_ends_in_the_same_weights(tiny_teacher: Path, tmp_path: Path, scope: Scope):
    whole = distiller(tiny_teacher, 12, tmp_path / "whole", scope)
    list(whole.run())
    stopped = distiller(tiny_teacher, 12, tmp_path / "stopped", scope)
    steps = stopped.run()
    for _ in range(5):
        next(steps)
    checkpoint.save_progress(tmp_path / "progress", stopped.state(), step=5, fingerprint="a")
    resumed = distiller(tiny_teacher, 12, tmp_path / "resumed", scope)
    found = checkpoint.load_progress(tmp_path / "progress", fingerprint="a")
    assert found is not None
    resumed.restore(*found)
    assert len(list(resumed.run())) == 7
    expected, got = whole.state(), resumed.state()
    assert set(expected) == set(got)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_not_taken(tmp_path: Path):
    path = tmp_path / "progress.safetensors"
    assert checkpoint.load_progress(path, fingerprint="a") is None
    checkpoint.save_progress(path, {"x": torch.ones(2)}, step=3, fingerprint="a")
    assert checkpoint.load_progress(path, fingerprint="b") is None
    step, tensors = checkpoint.load_progress(path, fingerprint="a") or (None, {})
    assert step == 3 and torch.equal(tensors["x"], torch.ones(2))
    path.write_bytes(path.read_bytes()[:20])
    assert checkpoint.load_progress(path, fingerprint="a") is None


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny_teacher: Path, tmp_path: Path):
    run = distiller(tiny_teacher, 5, tmp_path)
    with torch.no_grad():
        moe_layers(run.student)[0].b_out.fill_(float("inf"))
    before = moe_layers(run.student)[1].w_in.detach().clone()
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        next(run.run())
    assert torch.equal(moe_layers(run.student)[1].w_in, before)


@pytest.mark.parametrize("gate", ["unit", "softmax", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("num_active", [1, 2])
def test_a_causal_student_learns_its_teachers_logits_through_every_gate(tmp_path: Path, gate: str, num_active: int):
    make_tiny_llama(tmp_path)
    teacher, _ = load_dense(str(tmp_path))
    student, _ = load_dense(str(tmp_path))
    spec = spec_of(
        student,
        head="causal",
        num_experts=4,
        num_active=num_active,
        partition="contiguous",
        teacher="tiny",
        max_length=16,
        gate=gate,
        router_bias=False,
    )
    layers = []
    for index in range(spec.num_layers):
        neurons_EM = neurons_by_expert(torch.arange(spec.ffn_width) * 4 // spec.ffn_width, 4)
        layers.append(MoEFFN.from_experts(spec, slice_experts(read_ffn(student, index), neurons_EM), neurons_EM))
        torch.nn.init.normal_(layers[-1].router.weight, generator=torch.Generator().manual_seed(index))
    install_moe(student, layers)
    blocks = torch.randint(3, teacher.config.vocab_size, (64, 16), generator=torch.Generator().manual_seed(0)).tolist()
    run = Distiller(
        teacher,
        student,
        Batches(blocks, batch_tokens=128, seed=0),
        LogitsObjective("forward_kl", logits_weight=1.0, hidden_weight=1.0),
        Training(steps=60, learning_rate=1e-2),
    )
    before = {name: parameter.detach().clone() for name, parameter in run.trained.items()}
    assert not any(name.endswith("router.bias") for name in before)
    losses = [metrics.loss for metrics in run.run()]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert [name for name, parameter in run.trained.items() if torch.equal(parameter, before[name])] == []
