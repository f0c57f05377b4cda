"""Training: the routers alone, then the mixtures end to end. Generators of step metrics; they know no tracker."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.losses import distillation_loss, router_loss
from ffn2moe.metrics import pool
from ffn2moe.moe import moe_layers
from ffn2moe.router import Router
from ffn2moe.spec import Pooling

# Texts are padded to one of these lengths, in tokens. Few shapes, because oneDNN compiles a kernel for each.
BATCH_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARMUP_SHARE = 0.05  # of the steps
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TokenBatch:
    """Texts of similar length: token ids [B, L] and their mask [B, L], int64."""

    ids_BL: Tensor
    mask_BL: Tensor


class Batches:
    """An endless, seeded order of batches of about `batch_tokens` tokens, each of one length.

    The batch of a step depends on the seed and the step alone, so that a run that is resumed sees what it would
    have seen. ValueError when there are too few texts for a single batch.
    """

    def __init__(self, token_ids: Sequence[Sequence[int]], *, batch_tokens: int, seed: int, pad_id: int = 0) -> None:
        self._token_ids = token_ids
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._pad_id = pad_id
        self._buckets: dict[int, list[int]] = {}
        for index, ids in enumerate(token_ids):
            length = next((width for width in BATCH_LENGTHS if len(ids) <= width), len(ids))
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

    def from_step(self, step: int) -> Iterator[TokenBatch]:
        """The batches from a step on."""
        epoch, skip = divmod(step, self.per_epoch)
        while True:
            for length, indices in self._epoch(epoch)[skip:]:
                yield self._pad(length, indices)
            epoch, skip = epoch + 1, 0

    def _pad(self, length: int, indices: list[int]) -> TokenBatch:
        ids_BL = torch.full((len(indices), length), self._pad_id)
        mask_BL = torch.zeros(len(indices), length, dtype=torch.int64)
        for row, index in enumerate(indices):
            ids = torch.tensor(self._token_ids[index])
            ids_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = 1
        return TokenBatch(ids_BL, mask_BL)


def train_router(
    router: Router,
    x_TD: Tensor,
    target_TE: Tensor,
    *,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """Minimise the router loss on a layer's inputs [T, D] and targets [T, E]; yields the loss of each step.

    Inputs are whitened per feature inside, so that the learning rate means the same in every layer; the weights
    are those of the plain inputs again at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    mean_D, deviation_D = x_TD.mean(0), x_TD.std(0).clamp(min=1e-6)
    weight = (router.weight.detach() * deviation_D).requires_grad_(True)
    bias = (router.bias.detach() + router.weight.detach() @ mean_D).requires_grad_(True)
    optimizer = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(len(x_TD), (min(batch_tokens, len(x_TD)),), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        loss = router_loss(F.linear((x_TD[rows] - mean_D) / deviation_D, weight, bias), target_TE[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    with torch.no_grad():
        router.weight.copy_(weight / deviation_D)
        router.bias.copy_(bias - router.weight @ mean_D)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a short linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + cos(pi * step / steps))


@dataclass(frozen=True)
class StepMetrics:
    """What one step of distillation reports; losses are means over the batch."""

    step: int
    loss: float
    hidden: float
    embedding: float
    relational: float
    gradient_norm: float
    max_over_mean_load: float  # the worst layer's


class Distiller:
    """End-to-end distillation of an encoder's mixtures from its dense teacher.

    FFNs and routers are trained; everything else keeps the teacher's weights. `state` and `restore` carry all
    that a later step depends on, so that a run that was stopped ends in the same weights as one that was not.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        batches: Batches,
        *,
        pooling: Pooling,
        steps: int,
        learning_rate: float,
        hidden_weight: float,
        embedding_weight: float,
        relational_weight: float,
        balance_step: float,
        device: str | torch.device = "cpu",
        bf16: bool = False,
    ) -> None:
        self.teacher = use_float32_attention(teacher).to(device).eval().requires_grad_(False)
        self.student = use_float32_attention(student).to(device).requires_grad_(False)
        self.layers = moe_layers(student)
        self.batches = batches
        self.pooling = pooling
        self.steps = steps
        self.learning_rate = learning_rate
        self.weights = {
            "hidden_weight": hidden_weight,
            "embedding_weight": embedding_weight,
            "relational_weight": relational_weight,
        }
        self.balance_step = balance_step
        self.device = torch.device(device)
        self.bf16 = bf16
        self.step = 0
        self.trained = {
            f"{index}.{name}": parameter.requires_grad_(True)
            for index, layer in enumerate(self.layers)
            for name, parameter in layer.named_parameters()
        }
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=learning_rate, weight_decay=0.0, fused=True)
        self._counts_E: list[Tensor] = []
        for layer in self.layers:
            layer.observer = self._observe

    def _observe(self, scores_TE: Tensor, chosen_TK: Tensor) -> None:
        self._counts_E.append(torch.bincount(chosen_TK.flatten(), minlength=scores_TE.shape[1]))

    def run(self) -> Iterator[StepMetrics]:
        """Train from the current step to the last; yields after each. The student is left in eval mode.

        FloatingPointError when the loss is not finite, before it can reach the weights.
        """
        self._train_mode()
        for batch in self.batches.from_step(self.step):
            if self.step >= self.steps:
                break
            yield self._one_step(batch.ids_BL.to(self.device), batch.mask_BL.to(self.device))
        self.student.eval()
        for layer in self.layers:
            layer.observer = None

    def _train_mode(self) -> None:
        """Mixtures pass gradient to their routers; dropout stays off, for the teacher has none to imitate."""
        self.student.eval()
        for layer in self.layers:
            layer.train()

    def _one_step(self, ids_BL: Tensor, mask_BL: Tensor) -> StepMetrics:
        self._counts_E = []
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            with torch.no_grad():
                teacher_hidden = self._hidden(self.teacher, ids_BL, mask_BL)
            student_hidden = self._hidden(self.student, ids_BL, mask_BL)
        teacher_BD = pool(teacher_hidden[-1].float(), mask_BL, self.pooling)
        student_BD = pool(student_hidden[-1].float(), mask_BL, self.pooling)
        loss = distillation_loss(student_hidden, teacher_hidden, student_BD, teacher_BD, mask_BL, **self.weights)
        total = loss.total.item()
        if total != total or total in (float("inf"), float("-inf")):
            raise FloatingPointError(
                f"the loss is {total} at step {self.step}: lower the learning rate, or switch bfloat16 off"
            )
        self.optimizer.zero_grad()
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule(self.step, self.steps)
        self.optimizer.step()
        for layer, count_E in zip(self.layers, self._counts_E, strict=True):
            layer.router.balance(count_E, self.balance_step)
        metrics = StepMetrics(
            step=self.step,
            loss=total,
            hidden=loss.hidden.item(),
            embedding=loss.embedding.item(),
            relational=loss.relational.item(),
            gradient_norm=norm.item(),
            max_over_mean_load=max((c.max() / c.float().mean()).item() for c in self._counts_E),
        )
        self.step += 1
        return metrics

    @staticmethod
    def _hidden(model: Any, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, ...]:
        """The hidden states [B, L, D] after each layer, without the embeddings."""
        return model(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True).hidden_states[1:]

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        for index, layer in enumerate(self.layers):
            tensors[f"balance_bias.{index}"] = layer.router.balance_bias
        return tensors

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Continue from a `state` that was taken after `step` steps."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                prefix = f"optimizer.{name}."
                saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                self.optimizer.state[parameter] = {key: value.clone() for key, value in saved.items()}
            for index, layer in enumerate(self.layers):
                layer.router.balance_bias.copy_(tensors[f"balance_bias.{index}"])
        self.step = step


def bf16_supported(device: str | torch.device = "cpu") -> bool:
    """Whether bfloat16 products are computed in hardware on this device, and so are worth using."""
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    module = torch.get_device_module(kind)
    return bool(getattr(module, "is_bf16_supported", lambda: False)())


def use_float32_attention(model: Any) -> Any:
    """Compute the attention of a model in float32 under autocast, on a CPU; returns the model.

    On CPUs the backward pass of scaled_dot_product_attention takes 9 times longer in bfloat16 than in float32
    (torch 2.13, AMX: 168 ms against 18 ms at 32 x 12 x 128 x 32); everywhere else it stays as it is.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("sdpa_float32", _float32_attention)
    AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
    model.config._attn_implementation = "sdpa_float32"
    return model


def _float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    kind = query.device.type
    with torch.autocast(kind, enabled=False) if kind == "cpu" else nullcontext():
        if kind == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None
