"""Training the mixtures end to end. Generators of step metrics; they know no tracker."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import Batch, BatchSource
from ffn2moe.data.ranks import ALONE, Ranks
from ffn2moe.dense.ffn import installed_ffns
from ffn2moe.distill.objectives import Objective
from ffn2moe.distill.precision import bf16_copies, use_float32_attention, weights_in_bf16
from ffn2moe.moe.layer import moe_layers, set_active
from ffn2moe.moe.router import Choice
from ffn2moe.numerics import schedule

MAX_GRADIENT_NORM = 1.0
FOLLOW_RATE = 0.1  # of the way to what would keep a batch's mean number of experts, for those who choose how many ...
FOLLOWED_TOKENS = 1024  # ... by so many of its tokens
SETTLING_BATCHES = 8  # on which that number is set after the last step
COMPARED_EVERY = 100  # steps after which several processes see whether they hold the same weights


def budget_of_step(budgets: Sequence[int], step: int, seed: int) -> int:
    """The one of several K that a step of elastic training runs: each once in every round, in an order drawn anew."""
    past, place = divmod(step, len(budgets))
    return random.Random(f"{seed}/{past}").sample(list(budgets), len(budgets))[place]


Scope = Literal["experts", "all"]  # what a distillation trains


@dataclass(frozen=True)
class StepMetrics:
    """What one step of distillation reports; losses are means over the batch."""

    step: int
    loss: float
    terms: dict[str, float]
    gradient_norm: float
    max_over_mean_load: float  # the worst layer's; 1 without mixtures

    def row(self) -> dict[str, float]:
        """The same as one flat row."""
        return {
            "step": self.step,
            "loss": self.loss,
            **self.terms,
            "gradient_norm": self.gradient_norm,
            "max_over_mean_load": self.max_over_mean_load,
        }


class Distiller:
    """End-to-end distillation of a model from its dense teacher, of which mixtures or others took the FFNs' place.

    What was installed for the FFNs is trained (`scope` "experts"), or every weight ("all"), which gives a small student
    more to adapt with and takes the memory and time of training it whole. What is not trained keeps the teacher's
    weights. With `elastic`, other K that the same mixtures are to serve, each step runs one of the K
    (`budget_of_step`), as in SMoE-Dropout (arXiv 2303.01610) and SortedNet (arXiv 2309.00255). `state` and `restore`
    carry all that a later step depends on, so that a run that was stopped ends in the same weights as one that was not.

    Several processes (`ranks`) share the texts of each batch and sum gradients and loads, so that a step is that of one
    process up to rounding, and each of them holds the same weights, bit for bit.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        batches: BatchSource,
        objective: Objective,
        *,
        steps: int,
        learning_rate: float,
        balance_step: float,
        scope: Scope = "experts",
        elastic: Sequence[int] = (),
        seed: int = 0,
        device: str | torch.device = "cpu",
        bf16: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.teacher = use_float32_attention(teacher).to(device).eval().requires_grad_(False)
        self.student = use_float32_attention(student).to(device).requires_grad_(False)
        self.ffns = installed_ffns(student)
        self.layers = moe_layers(student)
        self.batches = batches
        self.objective = objective
        self.steps = steps
        self.learning_rate = learning_rate
        self.balance_step = balance_step
        self.device = torch.device(device)
        self.bf16 = bf16
        self.seed = seed
        # What the steps take turns in; the K that the student came with, and has again at the end, is the first.
        self.budgets = tuple(dict.fromkeys((self.layers[0].num_active, *elastic))) if elastic and self.layers else ()
        self.step = 0
        self.trained = {
            f"{index}.{name}": parameter.requires_grad_(True)
            for index, ffn in enumerate(self.ffns)
            for name, parameter in ffn.named_parameters()
        }
        if scope == "all":
            others = ((name, one) for name, one in student.named_parameters() if not one.requires_grad)
            self.trained |= {f"model.{name}": parameter.requires_grad_(True) for name, parameter in others}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=learning_rate, weight_decay=0.0, fused=True)
        self.bf16_copies = bf16_copies(teacher, student) if bf16 else []
        self._routed: list[tuple[Tensor, Choice]] = []  # scores and choice of each mixture in this step

    def _observe(self, scores_TE: Tensor, choice: Choice) -> None:
        self._routed.append((scores_TE.detach(), choice))

    def run(self) -> Iterator[StepMetrics]:
        """Train from the current step to the last; yields after each. The student is left in eval mode.

        FloatingPointError when the loss is not finite, before it can reach the weights. Of several processes the first
        one's state is what all start from; ValueError when their weights are found to differ later.
        """
        if self.ranks.size > 1:
            self.restore(*self.ranks.from_first(self.step, self.state() if self.ranks.first else {}))
        self.student.eval()  # dropout stays off, for the teacher has none to imitate ...
        for ffn in self.ffns:
            ffn.train()  # ... while mixtures pass gradient to their routers
        for layer in self.layers:
            layer.observer = self._observe
        try:
            for batch in self.batches.from_step(self.step):
                if self.step >= self.steps:
                    break
                yield self._one_step(batch.part(self.ranks).to(self.device))
                if self.step % COMPARED_EVERY == 0 or self.step == self.steps:
                    self._compare()
            self._settle()
        finally:
            self.student.eval()
            if self.budgets:
                set_active(self.student, self.budgets[0])
            for layer in self.layers:
                layer.observer = None

    def _one_step(self, batch: Batch) -> StepMetrics:
        self._routed = []
        if self.budgets:
            set_active(self.student, budget_of_step(self.budgets, self.step, self.seed))
        with (
            torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext(),
            weights_in_bf16(self.bf16_copies),
        ):
            with torch.no_grad():
                teacher = self.objective.outputs(self.teacher, batch)
            student = self.objective.outputs(self.student, batch)
        loss = self.objective.loss(
            student.counted(batch), teacher.counted(batch), batch.counted(), self.step / self.steps
        )
        total, *terms = self.ranks.sum(torch.stack([loss.total, *loss.terms.values()])).tolist()
        if total != total or total in (float("inf"), float("-inf")):
            raise FloatingPointError(
                f"the loss is {total} at step {self.step}: lower the learning rate, or switch bfloat16 off"
            )
        self.optimizer.zero_grad()
        loss.total.backward()
        self._sum_gradients()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule(self.step, self.steps)
        self.optimizer.step()
        loads = self._move_routers(batch)
        metrics = StepMetrics(
            step=self.step,
            loss=total,
            terms=dict(zip(loss.terms, terms, strict=True)),
            gradient_norm=norm.item(),
            max_over_mean_load=max(((load_E.max() / load_E.mean()).item() for load_E in loads), default=1.0),
        )
        self.step += 1
        return metrics

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        """Give every process the gradients of the whole batch, in one exchange.

        What a step leaves untouched (the scale of another K) has no gradient afterwards either, so that the optimizer
        passes over it as it does in one process.
        """
        if self.ranks.size == 1:
            return
        trained = list(self.trained.values())
        known = torch.tensor([float(one.grad is not None) for one in trained], device=self.device)
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
        summed = self.ranks.sum(torch.cat([known, *(part.flatten() for part in parts)]))
        known, *parts = summed.split([len(trained), *(one.numel() for one in trained)])
        for parameter, part, times in zip(trained, parts, known.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if times else None

    @torch.no_grad()
    def _compare(self) -> None:
        """ValueError when the processes do not hold the same weights, bit for bit."""
        if self.ranks.size == 1:
            return
        tensors = [*self.trained.values(), *self._followed().values()]
        sums = [tensor.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64) for tensor in tensors]
        if not self.ranks.same(torch.stack(sums)):
            raise ValueError(
                f"after step {self.step} the processes hold different weights: they must run on processors of one kind "
                "with equal numbers of threads (OMP_NUM_THREADS) and the same versions of everything"
            )

    @torch.no_grad()
    def _move_routers(self, batch: Batch) -> list[Tensor]:
        """Change how the routers choose, which no gradient does; gives how many tokens use each expert, [E] a layer."""
        if not self.layers:
            return []
        routed = list(zip(self.layers, self._routed, strict=True))
        mine = [_of_real_tokens(choice.indicator_TE(layer.num_experts), batch).sum(0) for layer, (_, choice) in routed]
        loads = self.ranks.sum(torch.stack(mine)).unbind()
        for (layer, (scores_TE, _)), load_E in zip(routed, loads, strict=True):
            if self.balance_step:
                layer.router.balance(load_E, self.balance_step)
            if layer.router.selection != "topk":  # which follows nothing, so that nothing need be gathered
                scores_TE = self.ranks.gather(_of_real_tokens(scores_TE, batch)[:FOLLOWED_TOKENS])
                layer.router.follow(scores_TE[:FOLLOWED_TOKENS], layer.num_active, FOLLOW_RATE)
        return list(loads)

    @torch.no_grad()
    def _settle(self) -> None:
        """Make tokens use K experts on average after the last step, too, where their number is not fixed.

        On the batches that would come next. Twice, for what a layer chooses changes what later layers are given.
        """
        if all(layer.router.selection == "topk" for layer in self.layers):
            return
        for _ in range(2):
            seen: list[list[Tensor]] = [[] for _ in self.layers]
            for batch in islice(self.batches.from_step(self.steps), SETTLING_BATCHES):
                self._routed = []
                batch = batch.part(self.ranks).to(self.device)
                self.student(**batch.inputs)
                for parts, (scores_TE, _) in zip(seen, self._routed, strict=True):
                    parts.append(self.ranks.gather(_of_real_tokens(scores_TE, batch)))
            for layer, parts in zip(self.layers, seen, strict=True):
                layer.router.calibrate(torch.cat(parts), layer.num_active)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors | self._followed()

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
            for name, buffer in self._followed().items():
                buffer.copy_(tensors[name])
        self.step = step

    def _followed(self) -> dict[str, Tensor]:
        """What each step moves besides the weights, by name: how the routers choose."""
        routers = enumerate(layer.router for layer in self.layers)
        kept = ((index, dict(router.named_buffers())) for index, router in routers)
        return {f"{name}.{i}": held[name] for i, held in kept for name in ("balance_bias", "margin") if name in held}


def _of_real_tokens(rows_TE: Tensor, batch: Batch) -> Tensor:
    """The rows of the tokens that are no padding, and none of a text that stands in."""
    if batch.stands_in:
        return rows_TE[:0]
    for mask in (batch.mask, batch.inputs.get("attention_mask")):
        if mask is not None and mask.numel() == len(rows_TE):
            return rows_TE[mask.flatten().bool()]
    return rows_TE
