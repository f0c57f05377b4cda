"""Train the mixtures of a student end to end. The Distiller yields metrics and knows no tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import Batch, BatchSource
from ffn2moe.data.ranks import ALONE, Ranks
from ffn2moe.dense.blocks import installed_ffns
from ffn2moe.dense.locate import ffn_layers, linear_maps
from ffn2moe.dense.precision import bf16_copies, use_float32_attention, weights_in_bf16
from ffn2moe.distill.objectives import Objective
from ffn2moe.distill.parallel import COMPARED_EVERY, require_same_weights, sum_gradients
from ffn2moe.distill.routers import RouterState
from ffn2moe.distill.steps import adamw, budget_of_step, budgets_of, require_finite, update
from ffn2moe.moe.layer import moe_layers, set_active
from ffn2moe.spec import MoESpec

Scope = Literal["experts", "all"]  # the weights that a distillation trains


@dataclass(frozen=True)
class Training:
    """The settings of a distillation.

    `scope` "experts" trains what stands in the place of the FFNs, or the FFNs themselves where there are no experts.
    "all" trains every weight, which gives a small student more to adapt with, and takes the memory and time of training
    it whole. With `elastic`, further K that the same mixtures are to serve, each step runs one of the K
    (`budget_of_step`), as in SMoE-Dropout (arXiv 2303.01610) and SortedNet (arXiv 2309.00255).
    """

    steps: int
    learning_rate: float  # the peak
    balance_step: float = 0.0  # change of the balance bias a step
    scope: Scope = "experts"
    elastic: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()  # of the teacher, that the student's are compared with; () = each with its own
    seed: int = 0
    device: str | torch.device = "cpu"
    bf16: bool = False


def compared_layers(spec: MoESpec) -> tuple[int, ...]:
    """Return `Training.layers` for a student that keeps some of its teacher's layers; () where it keeps all."""
    shape = spec.stacks[-1]  # of two stacks the decoder's hidden states are compared
    return shape.compared_with if shape.layers_kept else ()


@dataclass(frozen=True)
class StepMetrics:
    """The report of one step; losses are means over the batch."""

    step: int
    loss: float
    terms: dict[str, float]
    gradient_norm: float
    max_over_mean_load: float  # the worst layer's; 1 without mixtures

    def row(self) -> dict[str, float]:
        """Return the metrics as one flat row."""
        return {
            "step": self.step,
            "loss": self.loss,
            **self.terms,
            "gradient_norm": self.gradient_norm,
            "max_over_mean_load": self.max_over_mean_load,
        }


class Distiller:
    """Distil a dense teacher into a student in which mixtures, or other modules, stand in the place of the FFNs.

    Weights that are not trained keep the teacher's values. `state` and `restore` carry everything that a later step
    depends on, so that a run that was stopped ends in the same weights as one that was not.

    Several processes (`ranks`) share the texts of each batch and sum gradients and loads. A step is then that of one
    process up to rounding, and each process holds the same weights, bit for bit.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        batches: BatchSource,
        objective: Objective,
        training: Training,
        ranks: Ranks = ALONE,
    ) -> None:
        self.training = training
        self.steps = training.steps
        self.step = 0
        self.ranks = ranks
        self.device = torch.device(training.device)
        self.teacher = use_float32_attention(teacher).to(self.device).eval().requires_grad_(False)
        self.student = use_float32_attention(student).to(self.device).requires_grad_(False)
        self.batches = batches
        self.objective = objective
        self.ffns = installed_ffns(student)
        layers = moe_layers(student)
        self.routers = RouterState(layers, training.balance_step, ranks)
        self.budgets = budgets_of(layers[0].num_active, training.elastic) if layers else ()
        parts = self.ffns or [nn.ModuleList(linear_maps(student, layer)) for layer in range(len(ffn_layers(student)))]
        self.trained = {
            f"{index}.{name}": parameter.requires_grad_(True)
            for index, ffn in enumerate(parts)
            for name, parameter in ffn.named_parameters()
        }
        if training.scope == "all":
            others = ((name, one) for name, one in student.named_parameters() if not one.requires_grad)
            self.trained |= {f"model.{name}": parameter.requires_grad_(True) for name, parameter in others}
        self.optimizer = adamw(self.trained.values(), training.learning_rate)
        self.bf16_copies = bf16_copies(teacher, student) if training.bf16 else []

    def run(self) -> Iterator[StepMetrics]:
        """Train from the current step to the last and yield after each. The student is left in eval mode.

        FloatingPointError if the loss is not finite, before it can reach the weights. All processes start from the
        state of the first; ValueError if their weights differ later.
        """
        if self.ranks.size > 1:
            self.restore(*self.ranks.from_first(self.step, self.state() if self.ranks.first else {}))
        self.student.eval()  # without dropout, because the teacher has none to imitate, ...
        for ffn in self.ffns:
            ffn.train()  # ... but mixtures pass gradient to their routers
        try:
            with self.routers.observed():
                for batch in self.batches.from_step(self.step):
                    if self.step >= self.steps:
                        break
                    yield self._one_step(batch.part(self.ranks).to(self.device))
                    if self.step % COMPARED_EVERY == 0 or self.step == self.steps:
                        tensors = [*self.trained.values(), *self.routers.tensors().values()]
                        require_same_weights(tensors, self.step, self.ranks)
                self.routers.settle(self.student, self.batches, self.steps, self.device)
        finally:
            self.student.eval()
            if self.budgets:
                set_active(self.student, self.budgets[0])

    def _one_step(self, batch: Batch) -> StepMetrics:
        self.routers.forget()
        if self.budgets:
            set_active(self.student, budget_of_step(self.budgets, self.step, self.training.seed))
        with (
            torch.autocast(self.device.type, torch.bfloat16) if self.training.bf16 else nullcontext(),
            weights_in_bf16(self.bf16_copies),
        ):
            with torch.no_grad():
                teacher = self.objective.outputs(self.teacher, batch).of_layers(self.training.layers)
            student = self.objective.outputs(self.student, batch)
        done = self.step / self.steps
        loss = self.objective.loss(student.counted(batch), teacher.counted(batch), batch.counted(), done)
        total, *terms = self.ranks.sum(torch.stack([loss.total, *loss.terms.values()])).tolist()
        require_finite(total, "the loss", f"step {self.step}")
        self.optimizer.zero_grad()
        loss.total.backward()
        trained = list(self.trained.values())
        sum_gradients(trained, self.ranks)
        norm = update(self.optimizer, trained, self.training.learning_rate, self.step, self.steps)
        loads = self.routers.move(batch)
        metrics = StepMetrics(
            step=self.step,
            loss=total,
            terms=dict(zip(loss.terms, terms, strict=True)),
            gradient_norm=norm.item(),
            max_over_mean_load=max(((load_E.max() / load_E.mean()).item() for load_E in loads), default=1.0),
        )
        self.step += 1
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors | self.routers.tensors()

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Continue from a `state` that was taken after `step` steps."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                prefix = f"optimizer.{name}."
                saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                self.optimizer.state[parameter] = {
                    k: value.to(parameter.device, copy=True) for k, value in saved.items()
                }
            for name, buffer in self.routers.tensors().items():
                buffer.copy_(tensors[name])
        self.step = step
