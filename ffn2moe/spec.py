"""What a factorised model is.

Dimension letters, used in every tensor name of this package (`scores_TE` is tokens x experts):

    B batch          T tokens (B * L, or the unpadded ones)   E experts
    L length         D model width                            M width of an expert, in neurons
    V vocabulary     F width of the dense FFN, in neurons     K experts chosen for a token
                                                              S width of the shared expert, in neurons

A *neuron* is one row of an FFN's input matrices and one column of its output matrix; an *expert* is a set
of neurons; a *partition* puts every neuron in one expert, or in the shared expert that every token uses.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Pooling = Literal["mean", "cls"]
# How a chosen expert is weighed; s are the router's scores (ffn2moe.moe.router.gates is the definition).
#   unit: 1    softmax: softmax(s) over all E    softmax_topk: softmax(s) over the chosen K    sigmoid: sigmoid(s)
Gate = Literal["unit", "softmax", "softmax_topk", "sigmoid"]
# How many of its experts a token uses (ffn2moe.moe.router.Router.choose is the definition).
#   topk: the K that score highest    threshold: those near the highest score, K of them on average
#   prefix: the first n, n by the router, K on average; for experts in order of importance (partition `nested`)
Selection = Literal["topk", "threshold", "prefix"]
# What the routers read: each layer's own input, token by token; or what all tokens of a text are before the first
# mixture, on average, so that the choice of every layer is known ahead of it (Read-ME, arXiv 2410.19123).
Routing = Literal["token", "sequence"]
# What becomes of the experts that a task uses least (ffn2moe.shrink is the definition).
#   drop: they go    regroup: their neurons go to the others, which get wider    merge: the others take their mean
Shrinking = Literal["drop", "regroup", "merge"]
# What a model gives: hidden states and a sentence embedding; next-token logits; logits of a classifier; logits of a
# decoder that reads an encoder; hidden states alone.
Head = Literal["embedding", "causal", "classification", "seq2seq", "features"]


@dataclass(frozen=True)
class FFNShape:
    """The FFNs of one stack of equal layers. A decoder-only model has one stack, an encoder-decoder two.

    Sizes are in neurons or dimensions. `shared_width + num_experts * expert_width >= ffn_width`, unless experts were
    taken away: experts that the partition leaves short are padded with zero neurons, which change nothing.
    """

    layers: str  # where the stack is: the path of its ModuleList, relative to the model's base model
    num_layers: int
    width: int  # D
    ffn_width: int  # F
    expert_width: int  # M
    shared_width: int  # S; 0 = no shared expert
    gated: bool
    activation: Activation

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(get_args(Activation))}")
        if not 0 <= self.shared_width < self.ffn_width:
            raise ValueError(
                f"shared_width = {self.shared_width} must be between 0 and ffn_width - 1 = {self.ffn_width - 1}: "
                "the routed experts need neurons too"
            )


@dataclass(frozen=True)
class MoESpec:
    """A factorised model, saved beside its weights; everything needed to rebuild its layers."""

    family: str  # key into ffn2moe.dense.families.FAMILIES
    model_class: str  # the transformers class that holds the layers, e.g. "BertModel"
    head: Head
    stacks: tuple[FFNShape, ...]
    num_experts: int  # E
    num_active: int  # K; the mean over tokens where the selection is not `topk`, over layers with `active_per_layer`
    gate: Gate
    router_bias: bool  # whether the router has a trained bias; native containers hold none
    container: str | None  # the native architecture that the model was made for, a key into containers.CONTAINERS
    partition: str  # how the neurons were divided
    teacher: str  # where the dense model came from, as the user wrote it
    pooling: Pooling | None  # of an embedding model
    max_length: int  # tokens; longer texts are cut
    selection: Selection = "topk"
    routing: Routing = "token"
    active_per_layer: tuple[int, ...] = ()  # K of each layer over all stacks; empty = num_active in all of them
    max_active: int | None = None  # most experts that a token may use with `threshold`; None = num_experts
    elastic: tuple[int, ...] = ()  # other K that the same weights were trained for, ascending
    shrunk: Shrinking | None = None  # how experts were taken away after conversion; not all neurons need be left then

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("gate", self.gate, Gate),
            ("head", self.head, Head),
            ("selection", self.selection, Selection),
            ("routing", self.routing, Routing),
            ("shrunk", self.shrunk, Shrinking),
        ):
            if value not in get_args(legal) and not (name == "shrunk" and value is None):
                raise ValueError(f"{name} {value!r} is not one of {', '.join(get_args(legal))}")
        if not self.stacks:
            raise ValueError("a factorised model has at least one stack of layers")
        if not 1 <= self.num_active <= self.num_experts:
            raise ValueError(
                f"num_active must be between 1 and num_experts = {self.num_experts}, got {self.num_active}: "
                "a token cannot use more experts than there are"
            )
        for shape in self.stacks:
            routed = shape.ffn_width - shape.shared_width
            if self.num_experts > routed:
                raise ValueError(
                    f"num_experts = {self.num_experts} is more than the {routed} neurons of the FFN that are routed: "
                    "every expert needs at least one neuron"
                )
            if self.num_experts * shape.expert_width < routed and self.shrunk is None:
                raise ValueError(
                    f"{self.num_experts} experts of {shape.expert_width} neurons hold fewer than the "
                    f"{routed} neurons of the FFN"
                )

        if self.active_per_layer:
            if len(self.active_per_layer) != self.num_layers:
                raise ValueError(
                    f"active_per_layer names {len(self.active_per_layer)} layers and the model has {self.num_layers}"
                )
            if not all(1 <= active <= self.num_experts for active in self.active_per_layer):
                raise ValueError(
                    f"active_per_layer = {list(self.active_per_layer)}: each must be between 1 and num_experts = "
                    f"{self.num_experts}"
                )
        if self.max_active is not None and not self.num_active <= self.max_active <= self.num_experts:
            raise ValueError(
                f"max_active = {self.max_active} must be between num_active = {self.num_active} and num_experts = "
                f"{self.num_experts}"
            )
        if not all(1 <= active <= self.num_experts for active in self.elastic):
            raise ValueError(f"elastic = {list(self.elastic)}: each must be between 1 and num_experts")
        if tuple(sorted({*self.elastic} - {self.num_active})) != self.elastic:
            raise ValueError(
                f"elastic = {list(self.elastic)} must ascend, without num_active = {self.num_active}, which is a "
                "budget anyway"
            )
        self._refuse_what_makes_no_sense()

    def _refuse_what_makes_no_sense(self) -> None:
        if self.max_active is not None and self.selection != "threshold":
            raise ValueError(
                f"max_active limits how many experts the selection threshold uses, and the selection is "
                f"{self.selection}: leave max_active out, or use selection threshold"
            )
        if self.selection == "prefix" and self.gate != "unit":
            raise ValueError(
                f"the gate {self.gate} weighs experts by scores of their own, and with selection prefix a score is "
                "that of a number of experts: use the gate unit"
            )
        if self.selection == "prefix" and self.num_active == 1 < self.num_experts:
            raise ValueError(
                "with selection prefix and num_active = 1 every token uses the first expert and the router has "
                "nothing to choose: use more and narrower experts, such as twice as many of which 2 are active"
            )
        varied = {
            "active_per_layer": bool(self.active_per_layer),
            "elastic": bool(self.elastic),
        }
        for name, wanted in varied.items():
            if wanted and self.selection != "topk":
                raise ValueError(
                    f"{name} sets the number of experts of every token, which selection {self.selection} leaves to "
                    f"the router: use selection topk, or leave {name} out"
                )
        if all(varied.values()):
            raise ValueError(
                "elastic budgets hold for all layers alike and active_per_layer gives each its own: use one of the two"
            )
        if self.routing == "sequence":
            if self.head == "causal":
                raise ValueError(
                    "routing sequence chooses by the whole text, of which a causal model has not seen the rest: use "
                    "routing token"
                )
            if self.head == "seq2seq" or len(self.stacks) > 1:
                raise ValueError(
                    "routing sequence has one text that all layers read, and this model has more than one stack of "
                    "layers: use routing token"
                )
        if self.container is not None:
            plain = {"selection": "topk", "routing": "token", "elastic": (), "active_per_layer": ()}
            for name, only in plain.items():
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name} = {getattr(self, name)}, and the container {self.container} runs the same number of "
                        "experts for every token in every layer, chosen by each layer: use container none"
                    )

    @property
    def num_layers(self) -> int:
        """Layers of all stacks together."""
        return sum(shape.num_layers for shape in self.stacks)

    def shape_of(self, layer: int) -> FFNShape:
        """The shape of one layer, counted over all stacks in order."""
        for shape in self.stacks:
            if layer < shape.num_layers:
                return shape
            layer -= shape.num_layers
        raise IndexError(f"there are only {self.num_layers} layers")

    def active_of(self, layer: int) -> int:
        """K of one layer, counted over all stacks in order."""
        return self.active_per_layer[layer] if self.active_per_layer else self.num_active

    @property
    def budgets(self) -> tuple[int, ...]:
        """Every K that the weights were made for, ascending."""
        return tuple(sorted((self.num_active, *self.elastic)))

    def at(self, num_active: int) -> MoESpec:
        """The spec of one budget alone. ValueError for a K that is none of the budgets."""
        if num_active not in self.budgets:
            raise ValueError(
                f"{num_active} active experts are none of the budgets that this model was made for: choose from "
                f"{', '.join(map(str, self.budgets))}"
            )
        return replace(self, num_active=num_active, elastic=())

    def _only(self) -> FFNShape:
        if len(self.stacks) != 1:
            raise ValueError(f"a {self.family} model has {len(self.stacks)} stacks of layers: ask shape_of(layer)")
        return self.stacks[0]

    @property
    def width(self) -> int:
        """D, where there is one stack."""
        return self._only().width

    @property
    def ffn_width(self) -> int:
        """F, where there is one stack."""
        return self._only().ffn_width

    @property
    def expert_width(self) -> int:
        """M, where there is one stack."""
        return self._only().expert_width

    @property
    def shared_width(self) -> int:
        """S, where there is one stack."""
        return self._only().shared_width

    @property
    def gated(self) -> bool:
        """Whether the FFNs have a gate, where there is one stack."""
        return self._only().gated

    @property
    def activation(self) -> Activation:
        """The activation, where there is one stack."""
        return self._only().activation

    @property
    def active_share(self) -> float:
        """Share of the FFNs' weights that a token uses, padding included: between 0 and about 1."""
        used = 0
        for layer in range(self.num_layers):
            shape = self.shape_of(layer)
            used += shape.width * (shape.shared_width + self.active_of(layer) * shape.expert_width)
        return used / sum(shape.num_layers * shape.width * shape.ffn_width for shape in self.stacks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return plain | {"stacks": [asdict(shape) for shape in self.stacks]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoESpec:
        """The inverse of `to_dict`; what an older version did not write has its default. ValueError for the rest."""
        _require_keys(values, cls)
        for shape in values["stacks"]:
            _require_keys(shape, FFNShape)
        read: dict[str, Any] = {"stacks": tuple(FFNShape(**shape) for shape in values["stacks"])}
        read |= {name: tuple(values[name]) for name in ("active_per_layer", "elastic") if name in values}
        return cls(**values | read)


def _require_keys(values: dict[str, Any], kind: type) -> None:
    known = {f.name for f in fields(kind)}
    missing = sorted({f.name for f in fields(kind) if f.default is MISSING} - set(values))
    unknown = sorted(set(values) - known)
    if missing or unknown:
        raise ValueError(
            f"this is not a spec of ffn2moe: missing {missing}, unknown {unknown}; "
            "it was written by another version, or edited"
        )
