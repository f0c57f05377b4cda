"""FactorLLM's own recipe (arXiv 2408.11855), beside ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.oracle import expert_outputs
from ffn2moe.decompose.router_fit import prior_approximate_loss
from ffn2moe.dense.locate import ffn_modules
from ffn2moe.distill.objectives import Loss, Objective, Outputs
from ffn2moe.moe.layer import MoEFFN, moe_layers

PRIOR_WEIGHT, BALANCE_WEIGHT = 0.05, 0.01  # of the published loss, beside 1 for what the model is trained on


def as_released(moe: MoEFFN) -> None:
    """A router that starts as `nn.Linear` does, and the scale E / K."""
    nn.init.kaiming_uniform_(moe.router.weight, a=math.sqrt(5))
    moe.set_scale(moe.num_experts / moe.num_active)


class FactorLLMObjective:
    """An objective whose choice of experts passes no gradient, and PA and balance terms where the router is trained.

    Both terms look at the teacher's FFN inputs. Without them the router never changes, as in the released code.
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
        """As the base's; a pass of the teacher leaves its FFN inputs behind."""
        if not moe_layers(model):
            self.inputs = []
        return self.base.outputs(model, batch)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        """The base's loss, and the two terms of the router."""
        found = self.base.loss(student, teacher, batch, progress)
        prior = balance = found.total.new_zeros(())
        if self.train_router:
            for moe, x in zip(self.layers, self.inputs, strict=True):
                x_TD = (x.flatten(0, -2) if batch.mask is None else x[batch.mask.bool()]).float()
                scores_TE = moe.router.forward(x_TD)  # not called: the hook would take the gradient off
                with torch.no_grad():
                    outputs_TED = expert_outputs(moe, x_TD)
                prior = prior + prior_approximate_loss(scores_TE, outputs_TED, moe.num_active)
                load_E = moe.router.choose(scores_TE, moe.num_active).load_E(moe.num_experts)
                share_E = load_E / load_E.sum()
                balance = balance + moe.num_experts * (share_E * scores_TE.softmax(-1).mean(0)).sum()
        total = found.total + PRIOR_WEIGHT * prior + BALANCE_WEIGHT * balance
        return Loss(total, {**found.terms, "prior": prior, "balance": balance})
