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
    ),
)
HEADLINES.register(
    "seq2seq",
    Headline(
        ("to_teacher", "agreement"),
        "top1_agreement",
        "agreement with the teacher",
        "higher",
        ("logits_weight", "hidden_weight"),
        kept="choice of tokens",
        learnt="The distribution of the next token against the dense teacher’s, in the teacher’s own answers",
        examples="How each model answers a held-out text, always with its most probable token.",
    ),
)
HEADLINES.register(
    "classification",
    Headline(
        ("to_teacher", "agreement"),
        "top1_agreement",
        "agreement with the teacher",
        "higher",
        ("logits_weight", "hidden_weight"),
        kept="choice of classes",
        learnt="The distribution over the classes against the dense teacher’s",
        examples="The most probable class of held-out texts.",
    ),
)


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
