"""Training the mixtures end to end. Generators of step metrics; they know no tracker."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from math import cos, pi
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ffn2moe.dense import installed_ffns
from ffn2moe.losses import Divergence, distillation_loss, hidden_loss, logits_loss
from ffn2moe.metrics import pool
from ffn2moe.moe import moe_layers, set_active
from ffn2moe.ranks import ALONE, Ranks
from ffn2moe.router import Choice
from ffn2moe.spec import Head, Pooling

# Texts are padded to one of these lengths, in tokens. Few shapes, because oneDNN compiles a kernel for each.
BATCH_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARMUP_SHARE = 0.05  # of the steps
MAX_GRADIENT_NORM = 1.0
FOLLOW_RATE = 0.1  # of the way to what would keep a batch's mean number of experts, for those who choose how many ...
FOLLOWED_TOKENS = 1024  # ... by so many of its tokens
SETTLING_BATCHES = 8  # on which that number is set after the last step
COMPARED_EVERY = 100  # steps after which several processes see whether they hold the same weights


@dataclass(frozen=True)
class Batch:
    """What a model's forward is called with, and the positions [B, L] of its output that count (None: all).

    `ranks` are the processes that have the rest of the batch. With `stands_in` this one has nothing of it: its text is
    another's, for the model to run on, and no row of it counts.
    """

    inputs: dict[str, Tensor]
    mask: Tensor | None
    ranks: Ranks = ALONE
    stands_in: bool = False

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def part(self, ranks: Ranks) -> Batch:
        """The texts of this process, padded as before."""
        rows = ranks.part(len(next(iter(self.inputs.values()))))
        stands_in = rows.start == rows.stop
        taken = slice(0, 1) if stands_in else rows
        return replace(self._each(lambda tensor: tensor[taken]), ranks=ranks, stands_in=stands_in)

    def counted(self) -> Batch:
        """Without the text that stands in."""
        return self._each(lambda tensor: tensor[:0]) if self.stands_in else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, mask=None if self.mask is None else change(self.mask))


class BatchSource(Protocol):
    """An endless order of batches that depends on a seed and the step alone."""

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches from a step on."""
        ...


def collate(
    head: Head,
    token_ids: Sequence[Sequence[int]],
    decoder_ids: Sequence[Sequence[int]] | None = None,
    *,
    pad_id: int = 0,
    length: int | None = None,
) -> Batch:
    """Texts as one batch, padded on the right to `length` tokens, or to the longest.

    `decoder_ids` is what the decoder of a `seq2seq` model is given for each text. What counts in the output are the
    real tokens, of the decoder where there is one; a classifier gives one row a text, which counts.
    """
    ids_BL, mask_BL = _padded(token_ids, pad_id, length)
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
    if head == "seq2seq":
        assert decoder_ids is not None
        inputs["decoder_input_ids"], mask_BL = _padded(decoder_ids, pad_id, None)
    return Batch(inputs, None if head == "classification" else mask_BL)


def _padded(token_ids: Sequence[Sequence[int]], pad_id: int, length: int | None) -> tuple[Tensor, Tensor]:
    length = length or max(map(len, token_ids))
    ids_BL = torch.full((len(token_ids), length), pad_id)
    mask_BL = torch.zeros(len(token_ids), length, dtype=torch.int64)
    for row, ids in enumerate(token_ids):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        mask_BL[row, : len(ids)] = 1
    return ids_BL, mask_BL


def in_order(
    head: Head,
    token_ids: Sequence[Sequence[int]],
    decoder_ids: Sequence[Sequence[int]] | None = None,
    *,
    batch_texts: int = 64,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """The texts once, as they come, so many a batch: what calibration and evaluation run through."""
    for start in range(0, len(token_ids), batch_texts):
        part = slice(start, start + batch_texts)
        yield collate(head, token_ids[part], decoder_ids[part] if decoder_ids else None, pad_id=pad_id)


class Batches:
    """An endless, seeded order of batches of about `batch_tokens` tokens, each of one length.

    The batch of a step depends on the seed and the step alone, so that a run that is resumed sees what it would
    have seen. Blocks that are all of one length (`ffn2moe.data.pack`) are not padded. ValueError when there are too
    few texts for a single batch.
    """

    def __init__(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        batch_tokens: int,
        seed: int,
        pad_id: int = 0,
        head: Head = "embedding",
        decoder_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._token_ids = token_ids
        self._decoder_ids = decoder_ids
        self._head: Head = head
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._pad_id = pad_id
        self._buckets: dict[int, list[int]] = {}
        widths = BATCH_LENGTHS if len({len(ids) for ids in token_ids}) > 1 else ()
        for index, ids in enumerate(token_ids):
            length = next((width for width in widths if len(ids) <= width), len(ids))
            self._buckets.setdefault(length, []).append(index)
        self.per_epoch = sum(len(group) // self._texts(length) for length, group in self._buckets.items())
        if self.per_epoch == 0:
            raise ValueError(
                f"{len(token_ids)} texts do not fill one batch of {batch_tokens} tokens: "
                "give more text, or lower batch_tokens"
            )

    def _texts(self, length: int) -> int:
        return max(1, self._batch_tokens // length)

    def _epoch(self, epoch: int) -> list[tuple[int, list[int]]]:
        generator = random.Random(f"{self._seed}/{epoch}")
        order = []
        for length, group in sorted(self._buckets.items()):
            shuffled = generator.sample(group, len(group))
            size = self._texts(length)
            order += [(length, shuffled[i : i + size]) for i in range(0, len(shuffled) - size + 1, size)]
        generator.shuffle(order)
        return order

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches from a step on."""
        epoch, skip = divmod(step, self.per_epoch)
        while True:
            for length, indices in self._epoch(epoch)[skip:]:
                yield collate(
                    self._head,
                    [self._token_ids[index] for index in indices],
                    [self._decoder_ids[index] for index in indices] if self._decoder_ids else None,
                    pad_id=self._pad_id,
                    length=length,
                )
            epoch, skip = epoch + 1, 0


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a short linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + cos(pi * step / steps))


def budget_of_step(budgets: Sequence[int], step: int, seed: int) -> int:
    """The one of several K that a step of elastic training runs: each once in every round, in an order drawn anew."""
    past, place = divmod(step, len(budgets))
    return random.Random(f"{seed}/{past}").sample(list(budgets), len(budgets))[place]


Scope = Literal["experts", "all"]  # what a distillation trains


@dataclass(frozen=True)
class Outputs:
    """What an objective compares: hidden states after each layer, [B, L, D], and what the model's head gives."""

    hidden: tuple[Tensor, ...]
    head: Tensor

    def counted(self, batch: Batch) -> Outputs:
        """Without those of a text that stands in."""
        if not batch.stands_in:
            return self
        return Outputs(tuple(state[:0] for state in self.hidden), self.head[:0])


@dataclass(frozen=True)
class Loss:
    """What a step minimises, and the named terms that it is the weighted sum of.

    Of a part of a batch (`Batch.ranks`) it is that part's share: the sum over the processes is the loss of the batch.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(Protocol):
    """What a student is to learn from its teacher."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms of its loss."""
        ...

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        """One pass of a model over a batch."""
        ...

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        """How far the student is from the teacher; `progress` is the share of the steps that lie behind."""
        ...


@dataclass(frozen=True)
class EmbeddingObjective:
    """Hidden states, sentence embeddings and their similarities (ffn2moe.losses.distillation_loss)."""

    pooling: Pooling
    hidden_weight: float
    embedding_weight: float
    relational_weight: float
    terms: tuple[str, ...] = ("hidden", "embedding", "relational")

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[1:]
        assert batch.mask is not None
        return Outputs(hidden, pool(hidden[-1].float(), batch.mask, self.pooling))

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        assert batch.mask is not None
        found = distillation_loss(
            student.hidden,
            teacher.hidden,
            student.head,
            teacher.head,
            batch.mask,
            hidden_weight=self.hidden_weight,
            embedding_weight=self.embedding_weight,
            relational_weight=self.relational_weight,
            ranks=batch.ranks,
        )
        return Loss(found.total, {name: getattr(found, name) for name in self.terms})


@dataclass(frozen=True)
class LogitsObjective:
    """The teacher's distribution over tokens or classes, and the hidden states on the way to it.

    `token_share` < 1 learns the distribution where there is most to learn (ffn2moe.losses.most_to_learn).
    """

    divergence: Divergence
    logits_weight: float
    hidden_weight: float
    token_share: float = 1.0
    terms: tuple[str, ...] = ("logits", "hidden")

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        found = model(**batch.inputs, output_hidden_states=True)
        states = getattr(found, "decoder_hidden_states", None)  # of a seq2seq model; they depend on its encoder's
        return Outputs((found.hidden_states if states is None else states)[1:], found.logits)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        logits = logits_loss(
            student.head,
            teacher.head,
            batch.mask,
            divergence=self.divergence,
            progress=progress,
            token_share=self.token_share,
            ranks=batch.ranks,
        )
        hidden = logits.new_zeros(())
        if self.hidden_weight:  # a classifier's logits have no mask, its hidden states have that of the text
            mask = batch.inputs.get("attention_mask") if batch.mask is None else batch.mask
            hidden = hidden_loss(student.hidden, teacher.hidden, mask, batch.ranks)
        return Loss(self.logits_weight * logits + self.hidden_weight * hidden, {"logits": logits, "hidden": hidden})


@dataclass(frozen=True)
class FeaturesObjective:
    """Hidden states alone, for models without a head."""

    terms: tuple[str, ...] = ("hidden",)

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[1:]
        return Outputs(hidden, hidden[-1])

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        hidden = hidden_loss(student.hidden, teacher.hidden, batch.mask, batch.ranks)
        return Loss(hidden, {"hidden": hidden})


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
        self._halves = _halves(teacher, student) if bf16 else []
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
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext(), _halved(self._halves):
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


def bf16_supported(device: str | torch.device = "cpu") -> bool:
    """Whether bfloat16 products are computed in hardware on this device, and so are worth using."""
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    module = torch.get_device_module(kind)
    return bool(getattr(module, "is_bf16_supported", lambda: False)())


Half = tuple[nn.Module, str, nn.Parameter, nn.Parameter]


def _halves(*models: nn.Module) -> list[Half]:
    """What is frozen in the linear maps of these models, and the same in bfloat16: module, name, weights, weights.

    Autocast makes the same numbers of them, but anew in every pass.
    """
    from transformers.pytorch_utils import Conv1D

    return [
        (module, name, weights, nn.Parameter(weights.detach().to(torch.bfloat16), requires_grad=False))
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        for name, weights in module.named_parameters(recurse=False)
        if weights.dtype == torch.float32 and not weights.requires_grad
    ]


@contextmanager
def _halved(halves: Sequence[Half]) -> Iterator[None]:
    """For a while, the linear maps have their weights in bfloat16."""
    for module, name, _, half in halves:
        module.register_parameter(name, half)
    try:
        yield
    finally:
        for module, name, weights, _ in halves:
            module.register_parameter(name, weights)


def use_float32_attention(model: Any) -> Any:
    """Compute the attention of a model in float32 under autocast, on a CPU, where it has a gradient; returns the model.

    On CPUs the backward pass of scaled_dot_product_attention takes 9 times longer in bfloat16 than in float32
    (torch 2.13, AMX: 168 ms against 18 ms at 32 x 12 x 128 x 32), and the forward pass half as long. Everywhere else it
    stays as it is.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register("sdpa_float32", _float32_attention)
        AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
        model.set_attn_implementation("sdpa_float32")
    return model


def _float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kind = query.device.type
    slow = kind == "cpu" and any(one.requires_grad for one in (query, key, value))
    with torch.autocast(kind, enabled=False) if slow else nullcontext():
        if slow:
            query, key, value = query.float(), key.float(), value.float()
            if options.get("position_bias") is not None:  # as T5 adds to its scores
                options["position_bias"] = options["position_bias"].float()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
