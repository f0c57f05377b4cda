"""Read figures: the one figure that judges a model with each head, and any figure of a metrics file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ffn2moe.table import Table


@dataclass(frozen=True)
class Headline:
    """The figure that judges models with one head: its place in metrics/evaluate.json, and its names."""

    path: tuple[str, ...]  # below the model's name, and below `retention`
    key: str  # name in a plan's entry of the manifest
    label: str
    better: Literal["higher", "lower"]
    weights: tuple[str, ...]  # keys of the section `distill` that weigh the terms of its loss
    # The report's words: what is kept of the teacher, what distillation compares, and what the examples show.
    kept: str
    learnt: str
    examples: str
    # How the export is used once: the arguments of `ffn2moe`, and an expression in Python.
    command: str
    call: str

    def retention(self, figure: float, teacher_figure: float) -> float:
        """Return the share of the teacher's figure that is kept; 1 where nothing is lost."""
        over, under = (figure, teacher_figure) if self.better == "higher" else (teacher_figure, figure)
        return over / under if under else 0.0


HEADLINES: Table[Headline] = Table("head")
HEADLINES.register(
    "embedding",
    Headline(
        ("retrieval", "ndcg_at_10"),
        "retrieval_ndcg_at_10",
        "nDCG@10",
        "higher",
        ("hidden_weight", "embedding_weight", "relational_weight"),
        kept="retrieval quality",
        learnt="Hidden states and embeddings against the dense teacher’s",
        examples="What held-out queries find",
        command="encode {export} 'A sentence.'",
        call="export.encode(['A sentence.']).shape",
    ),
)
HEADLINES.register(
    "causal",
    Headline(
        ("language", "perplexity"),
        "perplexity",
        "perplexity",
        "lower",
        ("logits_weight", "hidden_weight"),
        kept="perplexity",
        learnt="The distribution of the next token against the dense teacher’s",
        examples="How each model continues the beginning of a held-out text, always with its most probable token.",
        command="generate {export} 'Once upon a time'",
        call="''.join(export.generate('Once upon a time'))",
    ),
)
HEADLINES.register(
    "seq2seq",
    Headline(
        ("to_teacher", "kappa"),
        "kappa",
        "choice of tokens (kappa)",
        "higher",
        ("logits_weight", "hidden_weight"),
        kept="choice of tokens",
        learnt="The distribution of the next token against the dense teacher’s, in the teacher’s own answers",
        examples="How each model answers a held-out text, always with its most probable token.",
        command="generate {export} 'A sentence.'",
        call="''.join(export.generate('A sentence.'))",
    ),
)
HEADLINES.register(
    "classification",
    Headline(
        ("to_teacher", "concordance"),
        "concordance",
        "scores (concordance)",
        "higher",
        ("logits_weight", "hidden_weight"),
        kept="scores",
        learnt="The scores of the labels against the dense teacher’s",
        examples="What each model says of held-out texts.",
        command="classify {export} 'A sentence.'",
        call="export.answers(['A sentence.'])",
    ),
)
HEADLINES.register(
    "token_classification",
    Headline(
        ("to_teacher", "concordance"),
        "concordance",
        "scores (concordance)",
        "higher",
        ("logits_weight", "hidden_weight"),
        kept="scores of tokens",
        learnt="The scores of the labels of each token against the dense teacher’s",
        examples="The labels that each model finds in held-out texts.",
        command="classify {export} 'A sentence.'",
        call="export.answers(['A sentence.'])",
    ),
)


@dataclass(frozen=True)
class Shown:
    """A figure that summaries and reports show where a run has it."""

    path: tuple[str, ...]  # below the model's name, and below `retention` where a share of it is kept
    label: str
    form: str  # how the number is written


TASKS_KEPT = ("tasks", "kept")  # what a language model keeps of its teacher's accuracy above chance, mean over tasks

GENERAL = ("general", "rank_correlation")  # whether an encoder orders pairs of general sentences as its teacher does

SHOWN: tuple[Shown, ...] = (
    Shown(("language", "perplexity"), "perplexity on held-out text", "{:.3f}"),
    Shown(TASKS_KEPT, "tasks kept: accuracy above chance over the teacher's", "{:.4f}"),
    Shown(("tasks", "hellaswag", "accuracy_normalised"), "HellaSwag, accuracy, normalised by characters", "{:.4f}"),
    Shown(("tasks", "hellaswag", "accuracy"), "HellaSwag, accuracy", "{:.4f}"),
    Shown(("tasks", "blimp", "accuracy"), "BLiMP, accuracy", "{:.4f}"),
    Shown(("text", "perplexity"), "perplexity on WikiText-2", "{:.3f}"),
    Shown(("text", "agreement"), "agreement with the teacher on WikiText-2", "{:.4f}"),
    Shown(("text", "divergence"), "nats from the teacher on WikiText-2 (KL)", "{:.4f}"),
    Shown(("to_teacher", "concordance"), "concordance with the teacher's scores", "{:.4f}"),
    Shown(("to_teacher", "kappa"), "kappa with the teacher's choices", "{:.4f}"),
    Shown(("to_teacher", "agreement"), "agreement with the teacher", "{:.4f}"),
    Shown(("to_teacher", "divergence"), "nats from the teacher (KL)", "{:.4f}"),
    Shown(("to_teacher", "difference"), "mean difference of the probabilities", "{:.4f}"),
    Shown(("to_teacher", "correlation"), "correlation with the teacher (Pearson)", "{:.4f}"),
    Shown(("to_teacher", "rank_correlation"), "rank correlation with the teacher (Spearman)", "{:.4f}"),
    Shown(("to_teacher", "relative_error"), "error over the teacher's spread", "{:.4f}"),
    Shown(("retrieval", "ndcg_at_10"), "retrieval, nDCG@10", "{:.4f}"),
    Shown(("retrieval", "mrr"), "retrieval, MRR", "{:.4f}"),
    Shown(GENERAL, "general sentences, rank correlation with the teacher", "{:.4f}"),
    Shown(("general", "cosine"), "general sentences, cosine with the teacher's embedding", "{:.4f}"),
    Shown(("general", "cosine_low"), "the same, of the worst twentieth", "{:.4f}"),
    Shown(("stsb", "spearman"), "STS-B dev, Spearman x 100", "{:.2f}"),
    Shown(("classification", "ag_news", "accuracy"), "AG News, accuracy", "{:.4f}"),
    Shown(("classification", "sst2", "accuracy"), "SST-2, accuracy", "{:.4f}"),
)


# How the export of a chat model, and of one that reads pairs of texts, is used once.
CHAT_COMMAND, CHAT_CALL = (
    "generate {export} 'Who are you?' --chat",
    "''.join(export.chat([{'role': 'user', 'content': 'Who are you?'}]))",
)
PAIR_COMMAND, PAIR_CALL = (
    "classify {export} 'A passage.' --query 'A question?'",
    "export.answers([('A question?', 'A passage.')])",
)


def usage(manifest: Mapping[str, Any], export: str) -> tuple[str, str]:
    """Return how an export is used once: the arguments of `ffn2moe`, and an expression of Python with `export`."""
    if at(manifest, ("model", "chats"), False):
        return CHAT_COMMAND.format(export=export), CHAT_CALL
    row = HEADLINES[at(manifest, ("spec", "head"), "embedding")]
    command, call = (PAIR_COMMAND, PAIR_CALL) if reads_pairs(manifest) else (row.command, row.call)
    return command.format(export=export), call


def reads_pairs(manifest: Mapping[str, Any]) -> bool:
    """Return whether an export was made for pairs of texts."""
    return bool(at(manifest, ("model", "pairs"), False))


def headline(quality: Mapping[str, Any]) -> Headline:
    """Return the headline for the payload of metrics/evaluate.json."""
    return HEADLINES[quality.get("head", "embedding")]


def at(tree: Mapping[str, Any], path: Sequence[str], default: Any = None) -> Any:
    """Return the value at a path of keys; the default where there is none."""
    value: Any = tree
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (dotted key, number) for every number in nested mappings and lists; truth values are left out."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from numbers(value, f"{prefix}.{index}" if prefix else str(index))
    else:
        value = tree.item() if hasattr(tree, "item") else tree
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix, value
