"""The one figure by which a model with each head is judged: what the gate, the report and the registry speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Headline:
    """Where a figure stands in metrics/evaluate.json, and how it is called."""

    path: tuple[str, ...]  # under the model's name, and under `retention`
    key: str  # in a plan's entry of the manifest
    label: str
    better: Literal["higher", "lower"]

    def retention(self, figure: float, teachers: float) -> float:
        """What is kept of the teacher's figure: 1 where nothing is lost."""
        over, under = (figure, teachers) if self.better == "higher" else (teachers, figure)
        return over / under if under else 0.0


_AGREEMENT = Headline(("to_teacher", "agreement"), "top1_agreement", "agreement with the teacher", "higher")
HEADLINES: dict[str, Headline] = {
    "embedding": Headline(("retrieval", "ndcg_at_10"), "retrieval_ndcg_at_10", "nDCG@10", "higher"),
    "causal": Headline(("language", "perplexity"), "perplexity", "perplexity", "lower"),
    "classification": _AGREEMENT,
    "seq2seq": _AGREEMENT,
}


def headline(quality: Mapping[str, Any]) -> Headline:
    """The headline of what metrics/evaluate.json holds."""
    return HEADLINES[quality.get("head", "embedding")]


def at(tree: Mapping[str, Any], path: Sequence[str], default: Any = None) -> Any:
    """The value at a path of keys; the default where there is none."""
    value: Any = tree
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value
