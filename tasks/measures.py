"""Read figures: the one figure that judges a model with each head, and any figure of a metrics file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Headline:
    """The figure that judges models with one head: its place in metrics/evaluate.json, and its names."""

    path: tuple[str, ...]  # below the model's name, and below `retention`
    key: str  # name in a plan's entry of the manifest
    label: str
    better: Literal["higher", "lower"]

    def retention(self, figure: float, teacher_figure: float) -> float:
        """Return the share of the teacher's figure that is kept; 1 where nothing is lost."""
        over, under = (figure, teacher_figure) if self.better == "higher" else (teacher_figure, figure)
        return over / under if under else 0.0


_AGREEMENT = Headline(("to_teacher", "agreement"), "top1_agreement", "agreement with the teacher", "higher")
HEADLINES: dict[str, Headline] = {
    "embedding": Headline(("retrieval", "ndcg_at_10"), "retrieval_ndcg_at_10", "nDCG@10", "higher"),
    "causal": Headline(("language", "perplexity"), "perplexity", "perplexity", "lower"),
    "classification": _AGREEMENT,
    "seq2seq": _AGREEMENT,
}


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
