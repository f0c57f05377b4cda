"""FactorLLM (arXiv 2408.11855): contiguous experts, a random router, and losses of its own for the router.

`factorllm-released` is what its code does: the router gets no gradient. `factorllm-published` is what its paper says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.grid import Cell
from benchmarks.ablation.method import BOTH, Method, add
from benchmarks.ablation.methods.objectives import prior_approximate_loss
from benchmarks.ablation.recipes import RECIPES, Made, Recipe, end_to_end, training
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.oracle import expert_outputs
from ffn2moe.dense.locate import ffn_modules
from ffn2moe.distill.objectives import Loss, Objective, Outputs
from ffn2moe.moe.layer import MoEFFN, moe_layers

PRIOR_WEIGHT, BALANCE_WEIGHT = 0.05, 0.01  # in the published loss, beside 1 for the model's own loss


def set_router(moe: MoEFFN) -> None:
    """Start the router as `nn.Linear` starts, and set the scale to E / K."""
    nn.init.kaiming_uniform_(moe.router.weight, a=math.sqrt(5))
    moe.set_scale(moe.num_experts / moe.num_active)


class FactorLLMObjective:
    """A base objective whose choice of experts passes no gradient, plus PA and balance terms for the router.

    Both terms read the inputs of the teacher's FFNs. Without `train_router` the router never changes, as in the
    released code.
    """

    def __init__(self, base: Objective, teacher: Any, student: Any, *, train_router: bool) -> None:
        self.base = base
        self.layers = moe_layers(student)
        self.train_router = train_router
        self.inputs: list[Tensor] = []
        for moe in self.layers:  # straight-through needs scores with a gradient
            moe.router.register_forward_hook(lambda module, inputs, scores_TE: scores_TE.detach())
        for module in ffn_modules(teacher):
            module.register_forward_pre_hook(lambda module, inputs: self.inputs.append(inputs[0]))

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.base.terms, "prior", "balance")

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        """Return the base's outputs; a pass of the teacher records its FFN inputs."""
        if not moe_layers(model):
            self.inputs = []
        return self.base.outputs(model, batch)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        """Return the base's loss plus the two terms of the router."""
        found = self.base.loss(student, teacher, batch, progress)
        prior = balance = found.total.new_zeros(())
        if self.train_router:
            for moe, x in zip(self.layers, self.inputs, strict=True):
                x_TD = (x.flatten(0, -2) if batch.mask is None else x[batch.mask.bool()]).float()
                scores_TE = moe.router.forward(x_TD)  # not called, because the hook would take the gradient away
                with torch.no_grad():
                    outputs_TED = expert_outputs(moe, x_TD)
                prior = prior + prior_approximate_loss(scores_TE, outputs_TED, moe.num_active)
                load_E = moe.router.choose(scores_TE, moe.num_active).load_E(moe.num_experts)
                share_E = load_E / load_E.sum()
                balance = balance + moe.num_experts * (share_E * scores_TE.softmax(-1).mean(0)).sum()
        total = found.total + PRIOR_WEIGHT * prior + BALANCE_WEIGHT * balance
        return Loss(total, {**found.terms, "prior": prior, "balance": balance})


@dataclass(frozen=True)
class _Train:
    """Spend all steps end to end, without a balance bias."""

    train_router: bool

    def __call__(self, bench: Bench, cell: Cell, made: Made, teacher: Any, objective: Objective) -> None:
        own = FactorLLMObjective(objective, teacher, made.model, train_router=self.train_router)
        settings = training(bench, cell, made, steps=bench.budget.steps, balance=False)
        end_to_end(bench, cell, made, teacher, own, settings)


for _recipe, _title, _source, _stages in (
    ("released", "FactorLLM, as released", "arXiv 2408.11855, its code", ("free", "distilled")),
    ("published", "FactorLLM, as published", "arXiv 2408.11855", ("distilled",)),
):
    RECIPES.register(_recipe, Recipe(_Train(train_router=_recipe == "published"), set_router))
    add(
        Method(
            f"factorllm-{_recipe}",
            _title,
            "FactorLLM",
            _source,
            _stages,
            partition="contiguous",
            recipe=_recipe,
            heads=BOTH,
        )
    )
