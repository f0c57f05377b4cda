"""What the grid compares: each method as its difference from the default."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from ffn2moe.decompose.partition import PartitionMethod
    from ffn2moe.decompose.router_fit import Objective, Start
    from ffn2moe.distill.layerwise import Judge
    from ffn2moe.distill.losses import Divergence
    from ffn2moe.spec import Gate, Routing, Selection

Stage = Literal["free", "router", "distilled"]
STAGES: tuple[Stage, ...] = get_args(Stage)
STAGE_TITLES: dict[Stage, str] = {
    "free": "training-free",
    "router": "router trained",
    "distilled": "distilled",
}
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
    "rivals",
]
GROUPS: tuple[Group, ...] = get_args(Group)
TRAINED: tuple[Stage, ...] = ("router", "distilled")
KEPT_EXPERTS = 0.75  # of the experts, after those that are used least are dropped, regrouped or merged


@dataclass(frozen=True)
class Method:
    """One way to make a smaller FFN. What is not said is as the default does it.

    The fields from `partition` to `token_share` are named as in params.yaml.
    """

    name: str
    title: str
    group: Group
    source: str
    stages: tuple[Stage, ...] = STAGES
    partition: PartitionMethod = "coactivation"
    shared: bool = False  # a shared expert beside K - 1 routed ones, as wide as makes the active share the same
    guard: bool = False
    gate: Gate = "unit"
    selection: Selection = "topk"
    routing: Routing = "token"
    active_per_layer: Literal["same", "budget"] = "same"
    elastic: bool = False  # one set of weights for every share of the grid
    start: Start = "ridge"
    objective: Objective = "oracle"
    temperature: float = 1.0
    refit: bool = True  # the experts' outputs, to the dense FFN's under the router's choice
    layerwise_share: float = 0.0  # of the steps of distillation, each layer by itself before the others
    layerwise: Judge = "alone"
    divergence: Divergence = "forward_kl"
    token_share: float = 1.0
    recipe: Literal["ours", "released", "published"] = "ours"  # FactorLLM's router and its training, or ours
    after: Literal["drop", "regroup", "merge"] | None = None  # what is done to the experts once all is trained
    rival: str | None = None  # another compressor in the FFN's place (benchmarks.ablation.compressors)

    def settings(self) -> dict[str, Any]:
        """All that changes a figure: what two cells must agree in to be one."""
        told = ("name", "title", "group", "source", "stages")
        return {name: value for name, value in asdict(self).items() if name not in told}

    def fits(self, num_active: int, num_experts: int) -> bool:
        """Whether the method says something of its own with so many active.

        A shared expert leaves one of the K to the router at least; where tokens may use different numbers of experts,
        a mean of one leaves them no choice.
        """
        if self.elastic:
            return num_active in elastic_budgets(num_experts)
        if self.shared or self.selection != "topk":
            return num_active > 1
        return not self.after or num_active <= kept_experts(num_experts)


def kept_experts(num_experts: int) -> int:
    """How many are left after conversion."""
    return max(1, round(KEPT_EXPERTS * num_experts))


def elastic_budgets(num_experts: int) -> tuple[int, ...]:
    """Every K of an elastic mixture, a quarter of the experts first, which it is made for."""
    found = (num_experts // 4, num_experts // 2, num_experts // 8)
    return tuple(dict.fromkeys(active for active in found if active)) or (1,)


DEFAULT = Method("default", "ours", "default", "docs/methods.md")

FACTORLLM = (
    Method(
        "factorllm-released",
        "FactorLLM, as released",
        "FactorLLM",
        "arXiv 2408.11855, its code",
        ("free", "distilled"),
        partition="contiguous",
        recipe="released",
    ),
    Method(
        "factorllm-published",
        "FactorLLM, as published",
        "FactorLLM",
        "arXiv 2408.11855",
        ("distilled",),
        partition="contiguous",
        recipe="published",
    ),
)
_PARTITIONS = (
    Method("contiguous", "contiguous", "partition", "arXiv 2408.11855", partition="contiguous"),
    Method("random", "random", "partition", "arXiv 2406.16554", partition="random"),
    Method("weights", "weights", "partition", "MoEfication, arXiv 2110.01786", partition="weights"),
    Method("gradient", "gradient", "partition", "LLaMA-MoE, arXiv 2406.16554", partition="gradient"),
    Method(
        "nested",
        "nested, a prefix per token",
        "partition",
        "SortedNet, arXiv 2309.00255",
        partition="nested",
        selection="prefix",
    ),
    Method("shared", "shared expert + coactivation", "partition", "CMoE, arXiv 2502.04416", shared=True),
    Method(
        "guard",
        "shared expert + coactivation + guard",
        "partition",
        "Super Experts, arXiv 2507.23279",
        shared=True,
        guard=True,
    ),
)
_STARTS = (
    Method("centroid", "centroid", "router start", "MoEfication, arXiv 2110.01786", ("free",), start="centroid"),
    Method(
        "representative",
        "representative neurons",
        "router start",
        "CMoE, arXiv 2502.04416",
        ("free",),
        start="representative",
    ),
    Method("mean_row", "mean row", "router start", "EMoE, arXiv 2310.10908", ("free",), start="mean_row"),
    Method("zeros", "zeros", "router start", "a control", start="zeros"),
)
_OBJECTIVES = (
    Method(
        "factorllm-loss",
        "FactorLLM's loss",
        "router objective",
        "arXiv 2408.11855",
        TRAINED,
        objective="factorllm",
    ),
    Method("mass", "activation mass", "router objective", "MoEfication, arXiv 2110.01786", TRAINED, objective="mass"),
    Method("norm", "norm of the output", "router objective", "D2DMoE, arXiv 2310.04361", TRAINED, objective="norm"),
    Method(
        "annealed",
        "oracle, temperature 4 to 1",
        "router objective",
        "EvoMoE, arXiv 2112.14397",
        TRAINED,
        temperature=4.0,
    ),
)
_RECONSTRUCTIONS = (Method("scale-and-mean", "scale and mean alone", "reconstruction", "docs/methods.md", refit=False),)
_GATES = (
    Method("softmax", "softmax over all", "gates", "Qwen2-MoE", gate="softmax"),
    Method("softmax_topk", "softmax over the chosen", "gates", "Mixtral", gate="softmax_topk"),
    Method("sigmoid", "sigmoid", "gates", "DeepSeek-V3", gate="sigmoid"),
)
_SELECTIONS = (
    Method(
        "threshold",
        "threshold, K on average",
        "selection",
        "D2DMoE, arXiv 2310.04361",
        selection="threshold",
    ),
    Method("budget", "K per layer, one budget", "selection", "docs/methods.md", active_per_layer="budget"),
    Method("elastic", "elastic, all shares at once", "selection", "SortedNet, arXiv 2309.00255", elastic=True),
    Method("sequence", "one choice per text, ahead", "selection", "Read-ME, arXiv 2410.19123", routing="sequence"),
)
_DISTILLATIONS = (
    Method(
        "layerwise",
        "layer by layer alone",
        "distillation",
        "docs/methods.md",
        ("distilled",),
        layerwise_share=1.0,
    ),
    Method(
        "layerwise-then-end",
        "layer by layer, then end to end",
        "distillation",
        "docs/methods.md",
        ("distilled",),
        layerwise_share=0.5,
    ),
    Method(
        "stitched",
        "stitched, then end to end",
        "distillation",
        "m2mKD, arXiv 2402.16918",
        ("distilled",),
        layerwise_share=0.5,
        layerwise="stitched",
    ),
)
_AFTER = (
    Method("drop", "a quarter of the experts dropped", "after conversion", "UNCURL, arXiv 2409.01483", after="drop"),
    Method("regroup", "dropped, neurons regrouped", "after conversion", "DERN, arXiv 2509.10377", after="regroup"),
    Method("merge", "merged", "after conversion", "MC-SMoE, arXiv 2310.01334", after="merge"),
)
_RIVAL_STAGES: tuple[Stage, ...] = ("free", "distilled")
_RIVALS = (
    Method("pruned", "pruned neurons", "rivals", "structured, by output energy", _RIVAL_STAGES, rival="pruned"),
    Method("low_rank", "low rank", "rivals", "SVD weighted by activations", _RIVAL_STAGES, rival="low_rank"),
    Method(
        "block_diagonal",
        "block diagonal",
        "rivals",
        "StructuredFFN, arXiv 2406.16450",
        _RIVAL_STAGES,
        rival="block_diagonal",
    ),
    Method(
        "sparse_factors",
        "dense x sparse factors",
        "rivals",
        "DSFormer, arXiv 2312.13211",
        _RIVAL_STAGES,
        rival="sparse_factors",
    ),
    Method(
        "idle_linear",
        "idle channels as a linear map",
        "rivals",
        "RePaViT, arXiv 2505.21847",
        _RIVAL_STAGES,
        rival="idle_linear",
    ),
)
# Of a language model the grid compares what only logits have, and the gates of the containers that hold it.
_DIVERGENCES = (
    Method("reverse_kl", "reverse KL", "distillation", "docs/methods.md", ("distilled",), divergence="reverse_kl"),
    Method("js", "Jensen-Shannon", "distillation", "docs/methods.md", ("distilled",), divergence="js"),
    Method(
        "balanced_kl",
        "balanced KL",
        "distillation",
        "BD-KD, arXiv 2212.12965",
        ("distilled",),
        divergence="balanced_kl",
    ),
    Method("taid", "TAID", "distillation", "arXiv 2501.16937", ("distilled",), divergence="taid"),
    Method(
        "token_share",
        "the half of the tokens with most to learn",
        "distillation",
        "AdaSPEC, arXiv 2510.19779",
        ("distilled",),
        token_share=0.5,
    ),
)
EMBEDDING_METHODS: tuple[Method, ...] = (
    DEFAULT,
    *FACTORLLM,
    *_PARTITIONS,
    *_STARTS,
    *_OBJECTIVES,
    *_RECONSTRUCTIONS,
    *_GATES,
    *_SELECTIONS,
    *_DISTILLATIONS,
    *_AFTER,
    *_RIVALS,
)
CAUSAL_METHODS: tuple[Method, ...] = (DEFAULT, *FACTORLLM, *_RECONSTRUCTIONS, *_GATES, *_DIVERGENCES)


def methods_of(head: str) -> dict[str, Method]:
    """The methods that make sense for a model with this head, by name, the default first."""
    return {method.name: method for method in (EMBEDDING_METHODS if head == "embedding" else CAUSAL_METHODS)}
