"""Objectives: how a student is compared with its teacher, one row per head of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ffn2moe.choices import HEADS
from ffn2moe.data.batches import Batch
from ffn2moe.dense.sentence import directions, embed
from ffn2moe.distill.divergences import DIVERGENCES
from ffn2moe.distill.losses import distillation_loss, hidden_loss, logits_loss
from ffn2moe.distill.vocabulary import OutputMatrix, divergence_sum, ends_in_matrix, output_matrix
from ffn2moe.table import Table


@dataclass(frozen=True)
class Outputs:
    """Hidden states after each layer, [B, L, D], and the output of the model's head.

    With a `matrix` the head's output is not computed yet: `head` is what that matrix reads.
    """

    hidden: tuple[Tensor, ...]
    head: Tensor
    matrix: OutputMatrix | None = None

    def counted(self, batch: Batch) -> Outputs:
        """Return the outputs that count: none of a text that only stands in for an empty part of a batch."""
        if not batch.stands_in:
            return self
        return replace(self, hidden=tuple(state[:0] for state in self.hidden), head=self.head[:0])

    def of_layers(self, layers: Sequence[int]) -> Outputs:
        """Return the hidden states after these layers alone, beside the head; all of them where none is named."""
        return replace(self, hidden=tuple(self.hidden[layer] for layer in layers)) if layers and self.hidden else self


@dataclass(frozen=True)
class Loss:
    """The loss that a step minimises, and the named terms of its weighted sum.

    For a part of a batch (`Batch.ranks`) it is that part's share: the sum over the processes is the loss of the batch.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(Protocol):
    """An objective runs a model on a batch and compares two sets of outputs."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Return the names of the terms of the loss."""
        ...

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        """Run a model once on a batch."""
        ...

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        """Return the distance of the student from the teacher; `progress` is the share of the steps that are done."""
        ...


@dataclass(frozen=True)
class EmbeddingObjective:
    """Compare hidden states, sentence embeddings and their similarities (ffn2moe.distill.losses.distillation_loss)."""

    hidden_weight: float
    embedding_weight: float
    relational_weight: float
    terms: tuple[str, ...] = ("hidden", "embedding", "relational")

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[1:]
        assert batch.mask is not None
        return Outputs(hidden, directions(model, embed(model, hidden[-1], batch.mask)))

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
    """Compare the logits of tokens or labels, as their problem asks, and the hidden states before them."""

    divergence: str  # a row of ffn2moe.distill.divergences
    logits_weight: float
    hidden_weight: float
    problem: str = "single_label"  # a row of ffn2moe.choices.PROBLEMS; the tokens of a vocabulary exclude each other
    terms: tuple[str, ...] = ("logits", "hidden")

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        found = model(**batch.inputs, output_hidden_states=True)
        states = getattr(found, "decoder_hidden_states", None)  # a seq2seq model's; they depend on its encoder's
        return Outputs((found.hidden_states if states is None else states)[1:], found.logits)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        logits = self._of_logits(student, teacher, batch, progress)
        hidden = logits.new_zeros(())
        if self.hidden_weight:  # a classifier's logits have no mask, its hidden states have that of the text
            mask = batch.inputs.get("attention_mask") if batch.mask is None else batch.mask
            hidden = hidden_loss(student.hidden, teacher.hidden, mask, batch.ranks)
        return Loss(self.logits_weight * logits + self.hidden_weight * hidden, {"logits": logits, "hidden": hidden})

    def _of_logits(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Tensor:
        return logits_loss(
            student.head,
            teacher.head,
            batch.mask,
            divergence=self.divergence,
            problem=self.problem,
            progress=progress,
            ranks=batch.ranks,
        )


@dataclass(frozen=True)
class NextTokenObjective(LogitsObjective):
    """The same for a language model whose logits are a matrix of its last hidden states: never all are in memory."""

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        found = model.base_model(**batch.inputs, output_hidden_states=bool(self.hidden_weight), use_cache=False)
        return Outputs((found.hidden_states or ())[1:], found.last_hidden_state, output_matrix(model))

    def _of_logits(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Tensor:
        of_tokens = DIVERGENCES[self.divergence].of_tokens
        assert of_tokens and student.matrix and teacher.matrix and batch.mask is not None
        used = batch.mask.bool()
        student_TD, teacher_TD = student.head[used], teacher.head[used]

        def compare(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
            return of_tokens(student_TV, teacher_TV, progress)

        total = divergence_sum(student_TD, student.matrix, teacher_TD, teacher.matrix, compare)
        return total / batch.ranks.total(len(student_TD))


@dataclass(frozen=True)
class FeaturesObjective:
    """Compare hidden states alone, for models without a head."""

    terms: tuple[str, ...] = ("hidden",)

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[1:]
        return Outputs(hidden, hidden[-1])

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Loss:
        hidden = hidden_loss(student.hidden, teacher.hidden, batch.mask, batch.ranks)
        return Loss(hidden, {"hidden": hidden})


# --- one objective per head ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LossWeights:
    """The weights of all terms and the divergence; an objective uses those that its head has."""

    hidden: float = 1.0
    embedding: float = 10.0
    relational: float = 100.0
    logits: float = 1.0
    divergence: str = "forward_kl"


def _of_embeddings(head: str, problem: str | None, weights: LossWeights, teacher: Any) -> Objective:
    return EmbeddingObjective(weights.hidden, weights.embedding, weights.relational)


def _of_logits(head: str, problem: str | None, weights: LossWeights, teacher: Any) -> Objective:
    assert (problem is not None) == HEADS[head].classifies, "the logits of labels mean what their problem says"
    heads = DIVERGENCES[weights.divergence].heads
    if head not in heads:
        others = ", ".join(name for name, row in DIVERGENCES.items() if head in row.heads)
        raise ValueError(
            f"the divergence {weights.divergence!r} compares logits of the heads {', '.join(heads)}, and the teacher's "
            f"head is {head}: use one of {others}"
        )
    return LogitsObjective(weights.divergence, weights.logits, weights.hidden, problem or "single_label")


def _of_next_tokens(head: str, problem: str | None, weights: LossWeights, teacher: Any) -> Objective:
    plain = _of_logits(head, problem, weights, teacher)
    if teacher is None or not DIVERGENCES[weights.divergence].of_tokens or not ends_in_matrix(teacher):
        return plain
    return NextTokenObjective(weights.divergence, weights.logits, weights.hidden)


def _of_features(head: str, problem: str | None, weights: LossWeights, teacher: Any) -> Objective:
    return FeaturesObjective()


Build = Callable[[str, str | None, LossWeights, Any], Objective]
OBJECTIVES: Table[Build] = Table("head")
for _head, _build in (
    ("embedding", _of_embeddings),
    ("causal", _of_next_tokens),
    ("seq2seq", _of_logits),
    ("classification", _of_logits),
    ("token_classification", _of_logits),
    ("features", _of_features),
):
    OBJECTIVES.register(_head, _build)


def objective_for(
    head: str, weights: LossWeights | None = None, *, problem: str | None = None, teacher: Any = None
) -> Objective:
    """Return the objective of a model with this head; `problem` is that of a head that classifies (`MoESpec`).

    With the `teacher` a language model is compared without the logits of a whole batch in memory, where it ends in a
    matrix. ValueError for a divergence that its logits do not fit.
    """
    return OBJECTIVES[head](head, problem, weights or LossWeights(), teacher)
