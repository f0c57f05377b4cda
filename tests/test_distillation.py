"""Distillation: what each divergence measures, layers that learn by themselves, and budgets that take turns."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from ffn2moe.data.batches import Batches
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer_map import LayerResult, in_processes
from ffn2moe.dense.ffn import installed_ffns
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import install
from ffn2moe.distill import layerwise
from ffn2moe.distill.distiller import Distiller, budget_of_step
from ffn2moe.distill.layerwise import Judge, LayerCurve, distil_layers
from ffn2moe.distill.losses import Divergence, logits_loss, most_to_learn, sinkhorn_distance, sinkhorn_plan
from ffn2moe.distill.objectives import EmbeddingObjective
from ffn2moe.moe.layer import moe_layers, set_active
from tests.conftest import WORDS
from tests.mixtures import carve

DIVERGENCES = get_args(Divergence)


def logits(count: int = 12, classes: int = 5, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


# --- divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_is_negative_and_each_is_smallest_where_the_student_is_the_teacher(divergence: Divergence):
    teacher = 20 * torch.eye(5)  # rows that no transport plan confuses
    same = logits_loss(teacher, teacher, None, divergence=divergence).item()
    assert same == pytest.approx(0, abs=1e-4)
    for seed in range(20):
        student = teacher + logits(5, seed=seed, spread=4.0)
        assert logits_loss(student, teacher, None, divergence=divergence).item() > same


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_has_a_finite_gradient_at_extreme_logits_too(divergence: Divergence):
    for spread in (1.0, 300.0):
        student = logits(spread=spread).requires_grad_(True)
        loss = logits_loss(student, logits(seed=1, spread=spread), None, divergence=divergence)
        loss.backward()
        assert student.grad is not None and torch.isfinite(student.grad).all()
        assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_learning_a_divergence_brings_the_student_to_the_teacher(divergence: Divergence):
    teacher, student = logits(seed=1, spread=2.0), logits(seed=2, spread=2.0).requires_grad_(True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    start = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean().item()
    for step in range(200):
        optimizer.zero_grad()
        logits_loss(student, teacher, None, divergence=divergence, progress=step / 200).backward()
        optimizer.step()
    assert (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean().item() < 0.15 * start


def test_balanced_kl_doubles_the_direction_that_moves_the_students_confidence_to_the_teachers():
    sure, unsure = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    sure_to_unsure = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)  # KL(sure || unsure)
    unsure_to_sure = 0.5 * math.log(5 / 9) + 0.5 * math.log(5)
    too_sure = logits_loss(sure.log()[None], unsure.log()[None], None, divergence="balanced_kl")
    assert too_sure.item() == pytest.approx((2 * unsure_to_sure + sure_to_unsure) / 3, abs=1e-6)
    too_unsure = logits_loss(unsure.log()[None], sure.log()[None], None, divergence="balanced_kl")
    assert too_unsure.item() == pytest.approx((2 * unsure_to_sure + sure_to_unsure) / 3, abs=1e-6)
    both = logits_loss(
        torch.stack([sure, unsure]).log(), torch.stack([unsure, sure]).log(), None, divergence="balanced_kl"
    )
    assert both.item() == pytest.approx((too_sure.item() + too_unsure.item()) / 2, abs=1e-6)  # sample by sample


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


@pytest.mark.parametrize("spread", [0.1, 1.0, 50.0])
def test_a_transport_plan_has_uniform_marginals_and_no_negative_entry(spread: float):
    cost_TT = spread * torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    plan_TT = sinkhorn_plan(cost_TT, rounds=500)
    assert (plan_TT >= 0).all() and torch.isfinite(plan_TT).all()
    assert torch.allclose(plan_TT.sum(0), torch.full((9,), 1 / 9), atol=1e-6)
    assert torch.allclose(plan_TT.sum(1), torch.full((9,), 1 / 9), atol=2e-3)


def test_the_sinkhorn_distance_is_the_cost_of_the_cheapest_transport_when_the_rows_are_far_apart():
    teacher = 60 * torch.eye(4)  # one-hot at any temperature
    assert sinkhorn_distance(teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    assert sinkhorn_distance(teacher[[1, 2, 3, 0]], teacher).item() == pytest.approx(0, abs=1e-5)  # order is free
    student = teacher[[0, 1, 2, 2]]  # one of four has to go from class 2 to class 3, at ||e_2 - e_3||_1 = 2
    assert sinkhorn_distance(student, teacher).item() == pytest.approx(2 / 4, abs=1e-3)
    half = 2 * torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()  # temperature 2 gives 0.5 and 0.5 again
    assert sinkhorn_distance(half, 60 * torch.eye(2)).item() == pytest.approx(1.0, abs=1e-5)


def test_a_student_with_the_teachers_rows_in_another_order_is_not_done():
    teacher = 20 * torch.eye(4)
    assert logits_loss(teacher[[1, 2, 3, 0]], teacher, None, divergence="sinkhorn").item() > 1


# --- selective tokens -----------------------------------------------------------------------------


def test_the_tokens_learnt_from_are_those_where_the_student_is_farthest_from_the_teacher():
    teacher = logits(10)
    student = teacher.clone()
    student[[2, 5, 7]] += logits(3, seed=1, spread=3.0)
    assert most_to_learn(student, teacher, 0.3).tolist() == [2, 5, 7]
    assert len(most_to_learn(student, teacher, 0.001)) == 1


def test_a_share_of_the_tokens_is_a_share_of_those_that_count():
    teacher, student = logits(10).view(2, 5, 5), logits(10, seed=1).view(2, 5, 5).requires_grad_(True)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    loss = logits_loss(student, teacher, mask, divergence="forward_kl", token_share=0.5)
    loss.backward()
    learnt_BL = student.grad.abs().sum(-1) > 0
    assert learnt_BL.sum() == 4 and not (learnt_BL & (mask == 0)).any()
    each = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)[mask.bool()]
    assert loss.item() == pytest.approx(each.topk(4).values.mean().item(), abs=1e-6)
    whole = logits_loss(student, teacher, mask, divergence="forward_kl")
    assert whole.item() == pytest.approx(each.mean().item(), abs=1e-6)


# --- layer by layer -------------------------------------------------------------------------------


def opened(teacher: Path, **more: Any) -> tuple[Any, Any, Batches]:
    """A dense model, a mixture carved from it, and batches of texts."""
    dense, tokenizer = load_dense(str(teacher))
    student, _ = carve(teacher, output_scale=1.0, **more)
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 4 + i % 12)) for i in range(1, 200)]
    return dense, student, Batches(tokenizer(texts)["input_ids"], batch_tokens=256, seed=0)


OBJECTIVE = EmbeddingObjective("mean", hidden_weight=1.0, embedding_weight=10.0, relational_weight=100.0)


def by_layer(dense: Any, student: Any, batches: Batches, **changes: Any) -> list[LayerCurve]:
    settings: dict[str, Any] = {"judge": "alone", "steps": 30, "batch_tokens": 256, "learning_rate": 1e-2, "seed": 0}
    return list(distil_layers(dense, student, batches, OBJECTIVE, **settings | changes))


@pytest.mark.parametrize("judge", ["alone", "stitched"])
def test_layerwise_distillation_lowers_the_error_of_every_layer_and_trains_router_and_experts(
    tiny_teacher: Path, judge: Judge
):
    dense, student, batches = opened(tiny_teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    curves = by_layer(dense, student, batches, judge=judge)
    assert [curve.layer for curve in curves] == [0, 1]
    for curve in curves:
        assert len(curve.losses) == 30 and sum(curve.losses[-5:]) < 0.8 * sum(curve.losses[:5])
    after = student.state_dict()
    for name, parameter in student.named_parameters():
        inside = any(parameter is one for ffn in installed_ffns(student) for one in ffn.parameters())
        assert torch.equal(after[name], before[name]) != inside, name


@pytest.mark.parametrize(
    "options",
    [{"elastic": (1, 4)}, {"selection": "threshold"}, {"selection": "prefix"}, {"routing": "sequence"}],
    ids=["elastic", "threshold", "prefix", "sequence"],
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


def test_a_layer_that_reads_whole_texts_is_not_stitched(tiny_teacher: Path):
    with pytest.raises(ValueError, match="train the layers alone"):
        by_layer(*opened(tiny_teacher, routing="sequence"), judge="stitched")


def test_one_worker_and_two_give_the_same_layers(tiny_teacher: Path):
    found = []
    for workers in (1, 2):
        dense, student, batches = opened(tiny_teacher)
        curves = by_layer(dense, student, batches, steps=4, workers=workers)
        found.append((sorted(curves, key=lambda curve: curve.layer), student.state_dict()))
    (curves, one), (others, two) = found
    assert curves == others
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_stitch_leaves_nothing_of_itself_behind(tiny_teacher: Path):
    dense, student, batches = opened(tiny_teacher)
    kinds = {name: type(module) for name, module in student.named_modules()}
    places = {name: type(module) for name, module in dense.named_modules()}
    by_layer(dense, student, batches, judge="stitched", stitch=True, steps=2)
    assert {name: type(module) for name, module in student.named_modules()} == kinds
    assert {name: type(module) for name, module in dense.named_modules()} == places
    assert moe_layers(dense) == [] and not any(moe.observer for moe in moe_layers(student))


def test_layers_that_are_done_are_not_trained_again(tiny_teacher: Path, tmp_path: Path, monkeypatch):
    dense, student, batches = opened(tiny_teacher)
    whole = by_layer(dense, student, batches, steps=4)
    wanted = student.state_dict()

    dense, student, batches = opened(tiny_teacher)
    steps = distil_layers(
        dense,
        student,
        batches,
        OBJECTIVE,
        judge="alone",
        steps=4,
        batch_tokens=256,
        learning_rate=1e-2,
        seed=0,
        folder=tmp_path,
        fingerprint="a",
    )
    next(steps)
    steps.close()
    trained = []
    losses = layerwise._Alone.losses
    monkeypatch.setattr(layerwise._Alone, "losses", lambda job: trained.append(job.layer) or losses(job))
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
    how = layerwise._How(steps=2, batch_tokens=256, learning_rate=1e-2, seed=0, elastic=(), device="cpu", bf16=False)

    def in_a_worker() -> list[LayerResult]:
        jobs = layerwise._alone(dense, installed_ffns(student), batches, [1], how)
        return list(in_processes(jobs, 1, folder=tmp_path))

    with pytest.raises(ChildProcessError, match=r"do layer 1 failed: FloatingPointError: the loss of layer 1"):
        in_a_worker()
    install(student, 1, Killed(32, 32))
    with pytest.raises(ChildProcessError, match=r"do layer 1 ended with exit code 9 .* fewer workers"):
        in_a_worker()
    assert list(tmp_path.iterdir()) == []  # nothing is left of their orders


def test_layerwise_distillation_refuses_a_student_that_is_dense_somewhere(tiny_teacher: Path):
    dense, _, batches = opened(tiny_teacher)
    with pytest.raises(ValueError, match="in the place of 0 FFNs, of which the teacher has 2"):
        by_layer(dense, load_dense(str(tiny_teacher))[0], batches)


# --- end to end -----------------------------------------------------------------------------------


def distiller(dense: Any, student: Any, batches: Batches, *, steps: int, **more: Any) -> Distiller:
    return Distiller(dense, student, batches, OBJECTIVE, steps=steps, learning_rate=3e-3, balance_step=1e-3, **more)


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
    kept = run._move_routers
    run._move_routers = lambda batch: loads.append((kept(batch), batch)) or loads[0][0]
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
