"""A method of the grid: its difference from the default. `METHODS` holds all, one row a method.

The rows stand in the modules of `benchmarks.ablation.methods`; importing that package registers them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ffn2moe.choices import SELECTIONS
from ffn2moe.table import Table

Stage = Literal["free", "router", "distilled"]
STAGES: tuple[Stage, ...] = get_args(Stage)
STAGE_TITLES: dict[Stage, str] = {"free": "training-free", "router": "router trained", "distilled": "distilled"}
Group = Literal[
    "default",
    "FactorLLM",
    "partition",
    "router start",
    "router objective",
    "reconstruction",
    "gates",
    "selection",
    "distillation",
    "after conversion",
    "baselines",
]
GROUPS: tuple[Group, ...] = get_args(Group)
BOTH = ("embedding", "causal")  # the heads that the grid knows
KEPT_EXPERTS = 0.75  # share of the experts that stay when the least used ones are dropped, regrouped or merged


@dataclass(frozen=True)
class Method:
    """One way to make a smaller FFN. A field that is not given has the default's value.

    The fields from `partition` to `divergence` are named as in params.yaml.
    """

    name: str
    title: str
    group: Group
    source: str
    stages: tuple[Stage, ...] = STAGES
    heads: tuple[str, ...] = ("embedding",)  # the models that the grid runs it on
    partition: str = "coactivation"
    shared: bool = False  # a shared expert beside K - 1 routed ones, as wide as makes the active share the same
    gate: str = "unit"
    selection: str = "topk"
    routing: str = "token"
    active_per_layer: str = "same"
    elastic: bool = False  # one set of weights for every share of the grid
    start: str = "ridge"
    objective: str = "oracle"
    temperature: float = 1.0
    refit: bool = True  # the experts' outputs, to the dense FFN's under the router's choice
    layerwise_share: float = 0.0  # share of the steps that train each layer by itself, before the others
    divergence: str = "forward_kl"
    recipe: str = "ours"  # a row of benchmarks.ablation.recipes
    after: str | None = None  # how `shrink` makes the trained mixture smaller
    compressor: str | None = None  # another compressor in the FFN's place (benchmarks.ablation.compressors)

    def settings(self) -> dict[str, Any]:
        """Return every field that changes a figure. Two cells with the same settings are one cell."""
        labels = ("name", "title", "group", "source", "stages", "heads")
        return {name: value for name, value in asdict(self).items() if name not in labels}

    def fits(self, num_active: int, num_experts: int) -> bool:
        """Return whether the method differs from the others with `num_active` experts.

        A shared expert takes one of the K, and the router needs at least one. If tokens use different numbers of
        experts, a mean of one leaves them no choice.
        """
        if self.elastic:
            return num_active in elastic_budgets(num_experts)
        if self.shared or not SELECTIONS[self.selection].fixed:
            return num_active > 1
        return not self.after or num_active <= kept_experts(num_experts)


def kept_experts(num_experts: int) -> int:
    """Return how many experts `shrink` keeps."""
    return max(1, round(KEPT_EXPERTS * num_experts))


def elastic_budgets(num_experts: int) -> tuple[int, ...]:
    """Return every K of an elastic mixture. The first, a quarter of the experts, is its default."""
    found = (num_experts // 4, num_experts // 2, num_experts // 8)
    return tuple(dict.fromkeys(active for active in found if active)) or (1,)


METHODS: Table[Method] = Table("ablation method")


def add(*methods: Method) -> None:
    """Register methods under their names."""
    for method in methods:
        METHODS.register(method.name, method)


DEFAULT = Method("default", "ours", "default", "docs/methods.md", heads=BOTH)
add(DEFAULT)
