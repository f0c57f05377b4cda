"""Compare a student with its teacher: one objective per kind of head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ffn2moe.data.batches import Batch
from ffn2moe.distill.losses import Divergence, distillation_loss, hidden_loss, logits_loss
from ffn2moe.numerics import pool
from ffn2moe.spec import Pooling


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
    """Hidden states, sentence embeddings and their similarities (ffn2moe.distill.losses.distillation_loss)."""

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

    `token_share` < 1 learns the distribution where there is most to learn (ffn2moe.distill.losses.most_to_learn).
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
