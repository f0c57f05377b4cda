"""Distillation: divergences, layers that learn by themselves, and budgets that take turns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.ablation.methods  # noqa: F401 - registers selections whose number of experts varies
from ffn2moe.data.batches import Batches
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer_map import LayerResult, in_processes
from ffn2moe.dense.blocks import installed_ffns
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import install
from ffn2moe.distill import layerwise
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.layerwise import LayerCurve, LayerTraining, distil_layers
from ffn2moe.distill.losses import logits_loss
from ffn2moe.distill.objectives import EmbeddingObjective
from ffn2moe.distill.steps import budget_of_step
from ffn2moe.moe.layer import moe_layers, set_active
from tests.conftest import WORDS
from tests.divergences import CHECKS, Check, logits
from tests.mixtures import carve

# --- divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "taid"])
def test_every_divergence_can_be_learnt(divergence: str, check: Check):
    check(divergence)


def test_taids_target_moves_from_the_student_to_the_teacher_and_holds_the_student_fixed():
    student, teacher = logits(1, seed=1), logits(1, seed=2)
    for progress, share in ((0.0, 0.4), (0.5, 0.7), (1.0, 1.0)):
        target = ((1 - share) * student + share * teacher).softmax(-1)
        expected = (target * (target.log() - student.log_softmax(-1))).sum()
        found = logits_loss(student, teacher, None, divergence="taid", progress=progress)
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    free = student.clone().requires_grad_(True)
    logits_loss(free, teacher, None, divergence="taid", progress=0.0).backward()
    target = (0.6 * student + 0.4 * teacher).softmax(-1)
    assert torch.allclose(free.grad, student.softmax(-1) - target, atol=1e-6)  # of a KL to a constant


# --- layer by layer -------------------------------------------------------------------------------


def opened(teacher: Path, **more: Any) -> tuple[Any, Any, Batches]:
    """A dense model, a mixture carved from it, and batches of texts."""
    dense, tokenizer = load_dense(str(teacher))
    student, _ = carve(teacher, output_scale=1.0, **more)
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 4 + i % 12)) for i in range(1, 200)]
    return dense, student, Batches(tokenizer(texts)["input_ids"], batch_tokens=256, seed=0)


OBJECTIVE = EmbeddingObjective(hidden_weight=1.0, embedding_weight=10.0, relational_weight=100.0)


def by_layer(dense: Any, student: Any, batches: Batches, **changes: Any) -> list[LayerCurve]:
    """Train layer by layer, with `changes` to the settings or to the other arguments."""
    settings: dict[str, Any] = {"steps": 30, "batch_tokens": 256, "learning_rate": 1e-2, "seed": 0}
    settings |= {name: changes.pop(name) for name in ("steps", "elastic") if name in changes}
    return list(distil_layers(dense, student, batches, LayerTraining(**settings), **changes))


def test_layerwise_distillation_lowers_the_error_of_every_layer_and_trains_router_and_experts(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    curves = by_layer(dense, student, batches)
    require_trained(student, before, curves)


def require_trained(student: Any, before: dict[str, torch.Tensor], curves: list[LayerCurve]) -> None:
    """Require a lower loss in every layer, and that what stands for the FFNs is all that changed."""
    assert [curve.layer for curve in curves] == [0, 1]
    for curve in curves:
        assert len(curve.losses) == 30 and sum(curve.losses[-5:]) < 0.8 * sum(curve.losses[:5])
    after = student.state_dict()
    for name, parameter in student.named_parameters():
        inside = any(parameter is one for ffn in installed_ffns(student) for one in ffn.parameters())
        assert torch.equal(after[name], before[name]) != inside, name


@pytest.mark.parametrize(
    "options",
    [{"elastic": (1, 4)}, {"selection": "threshold"}, {"selection": "prefix"}],
    ids=["elastic", "threshold", "prefix"],
)
def test_layers_learn_alone_whatever_their_routers_choose_by(tiny_teacher: Path, options: dict[str, Any]):
    dense, student, batches = opened(tiny_teacher, **options)
    curves = by_layer(dense, student, batches, elastic=options.get("elastic", ()), steps=60)
    for curve in curves:
        assert sum(curve.losses[-12:]) < 0.9 * sum(curve.losses[:12])
    x_TD = layer_inputs(dense, batches.from_step(0), max_tokens=2000)[0]
    moe = moe_layers(student)[0]
    assert moe.num_active == 2
    if "selection" in options:  # still K experts on average
        choice = moe.router.choose(moe.router(x_TD), 2)
        assert choice.count_T().float().mean().item() == pytest.approx(2, abs=0.2)


def test_one_worker_and_two_give_the_same_layers(tiny_teacher: Path):
    found = []
    for workers in (1, 2):
        dense, student, batches = opened(tiny_teacher)
        curves = by_layer(dense, student, batches, steps=4, workers=workers)
        found.append((sorted(curves, key=lambda curve: curve.layer), student.state_dict()))
    (curves, one), (others, two) = found
    assert curves == others
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_layers_that_are_done_are_not_trained_again(tiny_teacher: Path, tmp_path: Path, monkeypatch):
    dense, student, batches = opened(tiny_teacher)
    whole = by_layer(dense, student, batches, steps=4)
    wanted = student.state_dict()

    dense, student, batches = opened(tiny_teacher)
    training = LayerTraining(steps=4, batch_tokens=256, learning_rate=1e-2, seed=0)
    steps = distil_layers(dense, student, batches, training, folder=tmp_path, fingerprint="a")
    next(steps)
    steps.close()
    trained = []
    losses = layerwise.LayerDistillation.losses
    monkeypatch.setattr(layerwise.LayerDistillation, "losses", lambda job: trained.append(job.layer) or losses(job))
    dense, student, batches = opened(tiny_teacher)
    assert by_layer(dense, student, batches, steps=4, folder=tmp_path, fingerprint="a") == whole
    assert trained == [1]
    assert [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, wanted[name])] == []
    by_layer(*opened(tiny_teacher), steps=4, folder=tmp_path, fingerprint="b")
    assert trained == [1, 0, 1]


class Killed(nn.Linear):
    """An FFN's successor on which its process dies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os._exit(9)


def test_a_worker_that_fails_or_dies_is_named_with_its_layer_and_changes_nothing(tiny_teacher: Path, tmp_path: Path):
    dense, student, batches = opened(tiny_teacher)
    with torch.no_grad():
        moe_layers(student)[1].w_out.fill_(float("inf"))
    before = moe_layers(student)[1].w_in.clone()
    with pytest.raises(FloatingPointError, match=r"layer 1 .* lower the learning rate"):
        by_layer(dense, student, batches, steps=2)
    assert torch.equal(moe_layers(student)[1].w_in, before)
    training = LayerTraining(steps=2, batch_tokens=256, learning_rate=1e-2, seed=0)

    def in_a_worker() -> list[LayerResult]:
        jobs = layerwise.layer_jobs(dense, installed_ffns(student), batches, [1], training)
        return list(in_processes(jobs, 1, folder=tmp_path))

    with pytest.raises(ChildProcessError, match=r"do layer 1 failed: FloatingPointError: the loss of layer 1"):
        in_a_worker()
    install(student, 1, Killed(32, 32))
    with pytest.raises(ChildProcessError, match=r"do layer 1 ended with exit code 9 .* fewer workers"):
        in_a_worker()
    assert list(tmp_path.iterdir()) == []  # nothing is left of their orders


def test_layerwise_distillation_refuses_a_student_that_is_dense_somewhere(tiny_teacher: Path):
    dense, _, batches = opened(tiny_teacher)
    with pytest.raises(ValueError, match="in the place of 0 FFNs and the teacher has 2"):
        by_layer(dense, load_dense(str(tiny_teacher))[0], batches)


# --- end to end -----------------------------------------------------------------------------------


def distiller(dense: Any, student: Any, batches: Batches, *, steps: int, **more: Any) -> Distiller:
    training = Training(steps=steps, learning_rate=3e-3, balance_step=1e-3, **more)
    return Distiller(dense, student, batches, OBJECTIVE, training)


def test_whatever_was_installed_for_an_ffn_is_trained_and_nothing_else(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher)
    narrow = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 32))
    install(student, 1, narrow)
    assert installed_ffns(student) == [moe_layers(student)[0], narrow]
    run = distiller(dense, student, batches, steps=20)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    losses = [metrics.loss for metrics in run.run()]
    assert sum(losses[-4:]) < sum(losses[:4])
    for name, parameter in student.named_parameters():
        inside = any(parameter is one for ffn in installed_ffns(student) for one in ffn.parameters())
        assert torch.equal(parameter, before[name]) != inside, name


def test_a_student_without_mixtures_has_no_load_to_be_uneven(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher)
    for layer in range(2):
        install(student, layer, nn.Linear(32, 32))
    assert [metrics.max_over_mean_load for metrics in distiller(dense, student, batches, steps=2).run()] == [1.0, 1.0]


def test_every_budget_has_its_turn_in_every_round_by_seed_and_step_alone():
    budgets = (2, 1, 4)
    drawn = [budget_of_step(budgets, step, seed=3) for step in range(300)]
    assert all(sorted(drawn[start : start + 3]) == [1, 2, 4] for start in range(0, 300, 3))
    assert len({tuple(drawn[start : start + 3]) for start in range(0, 300, 3)}) == 6  # in no fixed order
    assert drawn == [budget_of_step(budgets, step, seed=3) for step in range(300)]
    assert drawn != [budget_of_step(budgets, step, seed=4) for step in range(300)]


def test_elastic_training_teaches_every_budget_and_ends_at_the_models_own(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher, elastic=(1, 4))
    run = distiller(dense, student, batches, steps=36, elastic=(1, 4))
    before = {name: parameter.detach().clone() for name, parameter in run.trained.items()}
    seen = []
    for _ in run.run():
        seen.append(moe_layers(student)[0].num_active)
    assert [seen.count(K) for K in (1, 2, 4)] == [12, 12, 12]
    assert [moe.num_active for moe in moe_layers(student)] == [2, 2]
    assert [name for name, parameter in run.trained.items() if torch.equal(parameter, before[name])] == []
    errors = {}
    for model in (opened(tiny_teacher, elastic=(1, 4))[1], student):
        for K in (1, 2, 4):
            set_active(model, K)
            outputs = [OBJECTIVE.outputs(one, next(batches.from_step(0))) for one in (model, dense)]
            errors.setdefault(K, []).append(OBJECTIVE.loss(*outputs, next(batches.from_step(0)), 1.0).total.item())
    assert all(after < start for start, after in (errors[1], errors[2]))


@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tiny_teacher: Path, selection: str):
    more = {"elastic": (1, 4)} if selection == "topk" else {"selection": "threshold"}
    elastic = {"elastic": (1, 4)} if selection == "topk" else {}
    whole = distiller(*opened(tiny_teacher, **more), steps=9, **elastic)
    list(whole.run())
    stopped = distiller(*opened(tiny_teacher, **more), steps=9, **elastic)
    steps = stopped.run()
    for _ in range(4):
        next(steps)
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    resumed = distiller(*opened(tiny_teacher, **more), steps=9, **elastic)
    resumed.restore(4, state)
    list(resumed.run())
    wanted, found = whole.student.state_dict(), resumed.student.state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    if selection == "threshold":
        assert all(moe.router.margin > 0 for moe in moe_layers(resumed.student))


def test_padding_is_no_load(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher)
    run = distiller(dense, student, batches, steps=1)
    loads = []
    kept = run.routers.move
    run.routers.move = lambda batch: loads.append((kept(batch), batch)) or loads[0][0]
    list(run.run())
    (found, batch) = loads[0]
    assert batch.mask.sum() < batch.mask.numel()
    assert [load_E.sum() for load_E in found] == [2 * batch.mask.sum()] * 2


def test_frozen_weights_kept_in_bfloat16_for_a_step_change_no_bit_and_are_themselves_again_after_it(tiny_teacher: Path):
    results = []
    for keep in (True, False):
        run = distiller(*opened(tiny_teacher), steps=3, bf16=True)
        before = {name: (id(parameter), parameter.dtype) for name, parameter in run.student.named_parameters()}
        assert len(run.bf16_copies) == 2 * (2 * 6 * 2 - 2 * 2)  # weights and biases; the student's FFNs are its own
        if not keep:
            run.bf16_copies = []
        rows = []
        for metrics in run.run():
            rows.append(metrics)
            assert before == {name: (id(one), one.dtype) for name, one in run.student.named_parameters()}
        results.append((rows, run.student.state_dict()))
    (rows, one), (others, two) = results
    assert rows == others
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
