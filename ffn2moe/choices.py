"""The choices that a spec names, one table each: heads, problems, gates, selections and routings.

This module holds what a row of each table is. The rows of the gates, selections and routings are the files of their
folders in `ffn2moe.moe`. Nothing here imports torch, so that params.yaml, the command line and the runtime can check
a name without it; the functions of the rows use the methods of the tensors that they are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ffn2moe.literals import Reads
from ffn2moe.table import Table, UnknownName, unknown

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


# --- heads ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelHead:
    """A kind of output that a model gives, and the transformers classes that give it."""

    name: str
    gives: str  # as messages say it
    auto_class: str  # the transformers class that opens such a model
    auto_class_of: tuple[tuple[Reads, str], ...] = ()  # the same for models that read something else than text
    encoder_class: str | None = None  # opens the encoder alone of an encoder with a decoder
    class_endings: tuple[str, ...] = ()  # how the names of classes with this head end
    output: str = "logits"  # the name of the output that a model is judged by
    bare: bool = False  # the base model itself: it may be built without its pooler
    generates: bool = False  # text, token by token: logits over the vocabulary
    classifies: bool = False  # its logits are those of labels: a row of PROBLEMS says what they mean

    def class_for(self, reads: Reads, *, encoder_alone: bool = False) -> str:
        """Return the name of the transformers class that opens a model of this head with such input."""
        if encoder_alone and self.encoder_class is not None:
            return self.encoder_class
        return dict(self.auto_class_of).get(reads, self.auto_class)


HEADS: Table[ModelHead] = Table("head")
for _head in (
    ModelHead(
        "embedding",
        "sentence embeddings",
        "AutoModel",
        encoder_class="AutoModelForTextEncoding",
        class_endings=("EncoderModel",),  # T5EncoderModel
        output="sentence_embedding",
        bare=True,
    ),
    ModelHead(
        "causal",
        "the logits of the next token",
        "AutoModelForCausalLM",
        class_endings=("ForCausalLM", "LMHeadModel"),
        generates=True,
    ),
    ModelHead(
        "classification",
        "the logits of classes",
        "AutoModelForSequenceClassification",
        auto_class_of=(
            ("speech", "AutoModelForAudioClassification"),
            ("images", "AutoModelForImageClassification"),
            ("text and images", "AutoModelForImageClassification"),
        ),
        class_endings=("ForSequenceClassification", "ForImageClassification", "ForAudioClassification"),
        classifies=True,
    ),
    ModelHead(
        "token_classification",
        "the logits of classes for each token",
        "AutoModelForTokenClassification",
        class_endings=("ForTokenClassification",),
        classifies=True,
    ),
    ModelHead(
        "seq2seq",
        "the logits of a decoder that reads an encoder",
        "AutoModelForSeq2SeqLM",
        auto_class_of=(("speech", "AutoModelForSpeechSeq2Seq"),),
        class_endings=("ForConditionalGeneration", "ForSpeechSeq2Seq", "MTModel"),  # MarianMTModel
        generates=True,
    ),
    ModelHead("features", "hidden states", "AutoModel", output="last_hidden_state", bare=True),
):
    HEADS.register(_head.name, _head)


def head_of_class(name: str) -> str | None:
    """Return the head of a transformers class by the end of its name; None where the name does not say."""
    return next((head.name for head in HEADS.rows() if name.endswith(head.class_endings)), None)


# --- problems of classifiers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What the logits of a classifier's labels mean, and so how they are served, learned and judged.

    The losses are in `ffn2moe.distill.losses`, the measures in `ffn2moe.metrics`, a row for each of these.
    """

    name: str
    gives: str  # as messages say it
    declared: str | None  # as the `problem_type` of config.json; None: by having one label and no problem_type
    scores: Callable[[np.ndarray], np.ndarray]  # logits [..., C] -> scores [..., C], as transformers' pipeline serves
    chooses: bool  # whether the label with the highest score is the answer


def _softmax(logits: np.ndarray) -> np.ndarray:
    import numpy as np

    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    import numpy as np

    small = np.exp(-np.abs(logits))  # does not overflow
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


PROBLEMS: Table[Problem] = Table("problem")
for _problem in (
    Problem(
        "single_label",
        "probabilities of labels that exclude each other",
        "single_label_classification",
        _softmax,
        chooses=True,
    ),
    Problem(
        "multi_label",
        "a probability of each label, whatever the others have",
        "multi_label_classification",
        _sigmoid,
        chooses=False,
    ),
    Problem("regression", "values as they are", "regression", lambda logits: logits, chooses=False),
    Problem("one_label", "one score between 0 and 1, as of a reranker", None, _sigmoid, chooses=False),
):
    PROBLEMS.register(_problem.name, _problem)

# What a cross-encoder of sentence-transformers applies to its logits: the last part of the activation's dotted name.
# Identity is its default for several labels, and says nothing about them.
_ACTIVATIONS_OF_ONE = {"Sigmoid": "one_label", "Identity": "regression"}
_ACTIVATIONS_OF_SEVERAL = {"Sigmoid": "multi_label", "Softmax": "single_label", "Identity": None}


def problem_of(config: Any) -> str:
    """Return the problem of a classifier: what its transformers config declares, as transformers' pipeline reads it.

    The activation of a cross-encoder comes first. UnknownName, a ValueError, for another problem_type; ValueError for
    an activation without a row.
    """
    known = {row.declared: row.name for row in PROBLEMS.rows() if row.declared is not None}
    declared = getattr(config, "problem_type", None)
    if declared is not None and declared not in known:
        raise UnknownName(unknown("problem_type of config.json", declared, tuple(known)))
    one = config.num_labels == 1
    activation = cross_encoder_activation(config)
    if activation is not None:
        problems = _ACTIVATIONS_OF_ONE if one else _ACTIVATIONS_OF_SEVERAL
        name = activation.rpartition(".")[-1]
        if name not in problems:
            raise ValueError(
                f"the cross-encoder applies {activation} to the logits of {config.num_labels} labels, which has no "
                f"form here ({', '.join(problems)} have): set its activation_fn to one of these"
            )
        found = problems[name]
        if found is not None:
            return found
    if declared is None:
        return "one_label" if one else "single_label"
    return "one_label" if one and declared == "multi_label_classification" else known[declared]


def cross_encoder_activation(config: Any) -> str | None:
    """Return the dotted name of the activation that a cross-encoder's config declares; None for another model."""
    written = getattr(config, "sentence_transformers", None)
    found = written.get("activation_fn") if isinstance(written, dict) else None
    return found or getattr(config, "sbert_ce_default_activation_function", None)


# --- gates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A formula for the weights of the chosen experts, from the router's scores."""

    name: str
    formula: str  # s are the scores
    reference: str
    # scores [T, E], chosen experts [T, K] and used [T, K] (None = all) -> weights [T, K]; where a pair is not used, any
    formula_TK: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    neutral_scale: Callable[[int, int], float]  # of E and K: under equal scores each chosen expert then counts once
    # For which tokens the formula is constant in the scores; there training passes the gradient of the softmax over all
    # experts straight through, so that the router learns from the loss.
    constant: Literal["never", "for one expert", "always"] = "never"
    ranks: bool = False  # top-K chooses by these weights plus the balance bias, not by scores plus bias

    def weights(self, scores_TE: Tensor, experts_TK: Tensor, used_TK: Tensor | None, training: bool) -> Tensor:
        """Return the weight of each chosen expert, [T, K]; 0 where `used_TK` says that a pair is not used."""
        gate_TK = self.formula_TK(scores_TE, experts_TK, used_TK)
        if training and self.constant != "never":
            T, K = experts_TK.shape
            count_T = experts_TK.new_full((T,), K) if used_TK is None else used_TK.sum(1)
            constant_T1 = (count_T == 1).unsqueeze(1) | (self.constant == "always")
            p_TK = scores_TE.softmax(-1).gather(-1, experts_TK)
            gate_TK = gate_TK + constant_T1 * (p_TK - p_TK.detach())
        return gate_TK if used_TK is None else gate_TK * used_TK


GATES: Table[Gate] = Table("gate", package="ffn2moe.moe.gates")


# --- selections -------------------------------------------------------------------------------------------------------


class Selection(ABC):
    """A rule that chooses the experts of each token by its ranked scores.

    The router (`ffn2moe.moe.router.Router`) calls the methods with itself; a spec is a `ffn2moe.spec.MoESpec`. This
    class has what most rules share; a rule overrides what differs.
    """

    name: str
    reference: str
    # The buffer of the router that sets how many experts tokens use on average; None: each token uses exactly K.
    calibrated: str | None = None
    buffers: tuple[str, ...] = ()  # numbers that the router keeps for this rule alone, saved with the weights
    limited: bool = False  # whether `max_active` of the spec limits a token
    ordered: bool = False  # whether experts stand in order of importance, and scores are those of numbers of experts

    @property
    def fixed(self) -> bool:
        """Whether each token uses exactly K experts."""
        return self.calibrated is None

    def check(self, spec: Any) -> None:
        """Raise ValueError where a spec asks for what this rule cannot do."""
        if spec.max_active is not None and not self.limited:
            raise ValueError(
                f"max_active = {spec.max_active} limits nothing with selection {self.name}: leave max_active out"
            )
        for name in ("active_per_layer", "elastic"):
            if getattr(spec, name) and not self.fixed:
                raise ValueError(
                    f"{name} sets the number of experts of every token, which selection {self.name} leaves to the "
                    f"router: use selection topk, or leave {name} out"
                )

    def describe(self, spec: Any) -> str:
        """Return how many of the experts are chosen, in words."""
        if spec.active_per_layer:
            return f"{', '.join(map(str, spec.active_per_layer))} in the layers in turn"
        return str(spec.num_active)

    def ranked(self, router: Any, scores_TE: Tensor) -> Tensor:
        """Return the values that experts are chosen by, [T, E]: the scores plus the balance bias."""
        ranked_TE: Tensor = scores_TE + router.balance_bias
        return ranked_TE

    @abstractmethod
    def choose(self, router: Any, ranked_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor | None]:
        """Return the chosen experts, int64 [T, K], and which of them are used, bool [T, K] (None = all)."""

    def weigh(self, router: Any, scores_TE: Tensor, choice: Any, training: bool) -> Tensor:
        """Return the weight of each chosen expert, [T, K]: the router's gate."""
        return GATES[router.gate].weights(scores_TE, choice.experts_TK, choice.used_TK, training)

    def calibration(self, router: Any, scores_TE: Tensor, num_active: int) -> Tensor:
        """Return the value of the buffer `calibrated` at which tokens with these scores use K experts on average."""
        raise NotImplementedError(f"selection {self.name} has nothing to calibrate")

    def rescale(self, router: Any, ratio: Tensor) -> None:  # noqa: B027 - most rules have nothing to do
        """Keep the choice where all scores are multiplied by `ratio`."""


SELECTIONS: Table[Selection] = Table("selection", package="ffn2moe.moe.selections")


# --- routings ---------------------------------------------------------------------------------------------------------


class Routing:
    """A rule that says what the routers of a model read."""

    name: str
    reference: str
    unit: str  # what one choice of experts is made for, in words
    own_input: bool  # whether each layer's router reads that layer's own input

    def check(self, spec: Any) -> None:
        """Raise ValueError where a spec asks for what this rule cannot do."""

    def tokens_per_choice(self, length: int) -> int:
        """Return for how many tokens of a text of `length` tokens a router runs once."""
        return 1

    def reader(self) -> Callable[[Tensor], Tensor] | None:
        """Return what gives a layer's router its input for tokens [T, D]; None for the tokens themselves."""
        return None

    def connect(self, model: Any, layers: Sequence[Any]) -> None:
        """Prepare a model whose mixtures `layers` route by this rule; ValueError for a model that it does not fit."""


ROUTINGS: Table[Routing] = Table("routing", package="ffn2moe.moe.routings")
