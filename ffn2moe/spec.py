"""Describe a decomposed model: what it was made of and how its layers route.

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
from typing import Any, get_args

from ffn2moe.choices import GATES, HEADS, PROBLEMS, ROUTINGS, SELECTIONS
from ffn2moe.literals import Activation as Activation
from ffn2moe.sentence import SentenceModules
from ffn2moe.table import UnknownName

# Names in the tables of `ffn2moe.choices`.
Gate = str
Head = str


@dataclass(frozen=True)
class FFNShape:
    """The FFNs of one stack of equal layers. A decoder-only model has one stack, an encoder-decoder two.

    Sizes are in neurons or dimensions. Where a width differs from layer to layer, the number is the largest, and the
    tuple of the same name has that of each layer. Else `shared_width + num_experts * expert_width >= ffn_width`, unless
    the model was shrunk: experts that the partition leaves short are padded with zero neurons, which change nothing.
    """

    layers: str  # where the stack is: the path of its ModuleList, relative to the model's base model
    num_layers: int
    width: int  # D
    ffn_width: int  # F
    expert_width: int  # M
    shared_width: int  # S; 0 = no shared expert
    gated: bool
    activation: Activation
    # What the teacher had more of, where the student is smaller:
    layers_kept: tuple[int, ...] = ()  # the teacher's layers that the student has, ascending; empty = all
    teacher_layers: int | None = None  # the number of the teacher's layers; None = as many
    teacher_ffn_width: int | None = None  # F of the teacher; None = the same
    # The widths of each layer; empty = the same in all of them:
    ffn_widths: tuple[int, ...] = ()  # of a student without experts
    expert_widths: tuple[int, ...] = ()
    shared_widths: tuple[int, ...] = ()

    @property
    def varied(self) -> bool:
        """Whether some width differs from layer to layer."""
        return any((self.ffn_widths, self.expert_widths, self.shared_widths))

    def of_layer(self, layer: int) -> FFNShape:
        """Return the shape with the widths of one layer, counted from 0, for all layers."""
        if not self.varied:
            return self
        F = self.ffn_widths[layer] if self.ffn_widths else self.ffn_width
        M = self.expert_widths[layer] if self.expert_widths else F if self.ffn_widths else self.expert_width
        S = self.shared_widths[layer] if self.shared_widths else self.shared_width
        same: dict[str, Any] = dict.fromkeys(VARIED, ())
        return replace(self, ffn_width=F, expert_width=M, shared_width=S, **same)

    def describe(self, width: str) -> str:
        """Return `ffn_width`, `expert_width` or `shared_width` in words: a number, or the range over the layers."""
        each: tuple[int, ...] = getattr(self, f"{width}s")
        if not each:
            return str(getattr(self, width))
        return f"{min(each)} to {max(each)} ({sum(each) / len(each):.0f} on average)"

    @property
    def dense_layers(self) -> int:
        """The number of the teacher's layers."""
        return self.teacher_layers or self.num_layers

    @property
    def dense_ffn_width(self) -> int:
        """F of the teacher."""
        return self.teacher_ffn_width or self.ffn_width

    @property
    def compared_with(self) -> tuple[int, ...]:
        """The teacher's layer whose output each layer of the student replaces: the last before the next one kept."""
        if not self.layers_kept:
            return tuple(range(self.num_layers))
        return (*(layer - 1 for layer in self.layers_kept[1:]), self.dense_layers - 1)

    def describe_layers(self) -> str:
        """Return the number of layers in words, and which of the teacher's they are where some are left out."""
        if not self.layers_kept:
            return f"{self.num_layers} layers"
        return f"{self.num_layers} of {self.dense_layers} layers ({', '.join(map(str, self.layers_kept))})"

    def describe_neurons(self) -> str:
        """Return the width of the FFNs in words."""
        of = f" of {self.teacher_ffn_width}" if self.teacher_ffn_width else ""
        return f"{self.describe('ffn_width')}{of} neurons"

    def __post_init__(self) -> None:
        if self.layers_kept and (len(self.layers_kept) != self.num_layers or self.layers_kept[-1] >= self.dense_layers):
            raise ValueError(
                f"layers_kept = {list(self.layers_kept)} must name {self.num_layers} of the teacher's "
                f"{self.dense_layers} layers"
            )
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(get_args(Activation))}")
        if not 0 <= self.shared_width < self.ffn_width:
            raise ValueError(
                f"shared_width = {self.shared_width} must be between 0 and ffn_width - 1 = {self.ffn_width - 1}: "
                "the routed experts need neurons too"
            )
        for name in VARIED:
            each, largest = getattr(self, name), getattr(self, name.removesuffix("s"))
            if each and (len(each) != self.num_layers or max(each) != largest or min(each) < (name != "shared_widths")):
                raise ValueError(
                    f"{name} = {list(each)} must give each of the {self.num_layers} layers a width, the largest "
                    f"{largest}"
                )


VARIED = ("ffn_widths", "expert_widths", "shared_widths")  # the fields of a shape that have a width for each layer


class _OneStack:
    """The sizes of a model whose layers are all alike; ValueError for a model with several stacks."""

    stacks: tuple[FFNShape, ...]
    family: str

    def _only(self) -> FFNShape:
        if len(self.stacks) != 1:
            raise ValueError(f"a {self.family} model has {len(self.stacks)} stacks of layers: ask shape_of(layer)")
        return self.stacks[0]

    @property
    def width(self) -> int:
        """D."""
        return self._only().width

    @property
    def ffn_width(self) -> int:
        """F."""
        return self._only().ffn_width

    @property
    def expert_width(self) -> int:
        """M."""
        return self._only().expert_width

    @property
    def shared_width(self) -> int:
        """S."""
        return self._only().shared_width

    @property
    def gated(self) -> bool:
        """Whether the FFNs have a gate."""
        return self._only().gated

    @property
    def activation(self) -> Activation:
        """The activation of the FFNs."""
        return self._only().activation


@dataclass(frozen=True)
class MoESpec(_OneStack):
    """A decomposed model, saved beside its weights; everything needed to build its layers again."""

    family: str  # key into ffn2moe.dense.family.FAMILIES
    model_class: str  # the transformers class that holds the layers, e.g. "BertModel"
    head: Head  # a name in HEADS
    stacks: tuple[FFNShape, ...]
    num_experts: int  # E
    num_active: int  # K; the mean over tokens where the selection is not fixed, over layers with `active_per_layer`
    gate: Gate  # a name in GATES
    router_bias: bool  # whether the router has a trained bias; native containers hold none
    container: str | None  # the native architecture that the model was made for, a name in containers.CONTAINERS
    partition: str  # the method that put the neurons in experts
    teacher: str  # where the dense model came from, as the user wrote it
    sentence: SentenceModules | None  # of an embedding model: how hidden states become an embedding
    max_length: int  # tokens; longer texts are truncated
    problem: str | None = None  # of a head that classifies: a name in PROBLEMS
    selection: str = "topk"  # a name in SELECTIONS
    routing: str = "token"  # a name in ROUTINGS
    active_per_layer: tuple[int, ...] = ()  # K of each layer over all stacks; empty = num_active in all of them
    max_active: int | None = None  # most experts that a token may use, where the selection is limited; None = all
    elastic: tuple[int, ...] = ()  # other K that the same weights were trained for, ascending
    shrunk: str | None = None  # the method of `ffn2moe shrink` that took experts away; some neurons may be gone then

    def __post_init__(self) -> None:
        _check_names(self)
        _check_sizes(self)
        _check_budgets(self)
        SELECTIONS[self.selection].check(self)
        ROUTINGS[self.routing].check(self)
        _check_container(self)

    @property
    def is_dense(self) -> bool:
        """Whether the student has no experts: one expert is an FFN, with nothing to route.

        (`whole` of variants aside.)
        """
        return self.num_experts == 1 and self.shrunk is None

    @property
    def is_ordinary(self) -> bool:
        """Whether its checkpoint is an ordinary transformers folder: no experts, and the same width in all layers."""
        return self.is_dense and not any(shape.varied for shape in self.stacks)

    @property
    def num_layers(self) -> int:
        """The number of layers of all stacks together."""
        return sum(shape.num_layers for shape in self.stacks)

    @property
    def prompt(self) -> str:
        """What is written before each text: the default prompt of a sentence encoder."""
        return self.sentence.prompt() if self.sentence else ""

    @property
    def teachers_layers(self) -> tuple[int, ...]:
        """The teacher's layer that each layer was made of, both counted over all stacks in order."""
        found: list[int] = []
        first = 0
        for shape in self.stacks:
            found += [first + layer for layer in shape.layers_kept or range(shape.num_layers)]
            first += shape.dense_layers
        return tuple(found)

    def shape_of(self, layer: int) -> FFNShape:
        """Return the shape of one layer, counted over all stacks in order, with the widths of that layer."""
        for shape in self.stacks:
            if layer < shape.num_layers:
                return shape.of_layer(layer)
            layer -= shape.num_layers
        raise IndexError(f"there are only {self.num_layers} layers")

    def active_of(self, layer: int) -> int:
        """Return K of one layer, counted over all stacks in order."""
        return self.active_per_layer[layer] if self.active_per_layer else self.num_active

    @property
    def budgets(self) -> tuple[int, ...]:
        """Every K that the weights were made for, ascending."""
        return tuple(sorted((self.num_active, *self.elastic)))

    def at(self, num_active: int) -> MoESpec:
        """Return the spec of one budget alone. ValueError for a K that is none of the budgets."""
        if num_active not in self.budgets:
            raise ValueError(
                f"{num_active} active experts are none of the budgets that this model was made for: choose from "
                f"{', '.join(map(str, self.budgets))}"
            )
        return replace(self, num_active=num_active, elastic=())

    @property
    def active_share(self) -> float:
        """The share of the teacher's FFN weights that a token uses, padding included: between 0 and about 1."""
        used = 0
        for layer in range(self.num_layers):
            shape = self.shape_of(layer)
            used += shape.width * (shape.shared_width + self.active_of(layer) * shape.expert_width)
        return used / sum(shape.dense_layers * shape.width * shape.dense_ffn_width for shape in self.stacks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON gives them back."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return plain | {
            "stacks": [_plain(shape) for shape in self.stacks],
            "sentence": self.sentence.to_dict() if self.sentence else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoESpec:
        """Return the spec that `to_dict` wrote; fields that an older version did not write take their defaults.

        ValueError for anything else.
        """
        if "pooling" in values:  # as version 0.1.0 wrote it
            values = {name: value for name, value in values.items() if name != "pooling"} | {
                "sentence": SentenceModules.of_spec(values).to_dict() if values["pooling"] else None
            }
        _require_keys(values, cls)
        for shape in values["stacks"]:
            _require_keys(shape, FFNShape)
        read: dict[str, Any] = {"stacks": tuple(FFNShape(**_with_tuples(shape)) for shape in values["stacks"])}
        read |= {name: tuple(values[name]) for name in ("active_per_layer", "elastic") if name in values}
        if values["sentence"] is not None:
            read["sentence"] = SentenceModules.from_dict(values["sentence"])
        if "problem" not in values and values["head"] == "classification":  # all that older versions knew
            read["problem"] = "single_label"
        try:
            return cls(**values | read)
        except UnknownName as error:
            raise UnknownName(
                f"{error}. ffn2moe 0.1.0 or the ablation wrote this model: import benchmarks.ablation.methods of the "
                "repository before you open it, or convert the dense model again"
            ) from error


def _plain(shape: FFNShape) -> dict[str, Any]:
    """Return the fields of a shape; those of a smaller student only where it is one."""
    optional = {field.name for field in fields(FFNShape) if field.default is not MISSING}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(shape).items()
        if value or name not in optional
    }


def _with_tuples(shape: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()}


def _check_names(spec: MoESpec) -> None:
    if HEADS[spec.head].classifies:
        PROBLEMS.require(str(spec.problem))
    elif spec.problem is not None:
        raise ValueError(f"problem = {spec.problem} belongs to heads that classify, and this head is {spec.head}")
    GATES.require(spec.gate)
    SELECTIONS.require(spec.selection)
    ROUTINGS.require(spec.routing)


def _check_sizes(spec: MoESpec) -> None:
    if not spec.stacks:
        raise ValueError("a decomposed model has at least one stack of layers")
    if not 1 <= spec.num_active <= spec.num_experts:
        raise ValueError(
            f"num_active must be between 1 and num_experts = {spec.num_experts}, got {spec.num_active}: "
            "a token cannot use more experts than there are"
        )
    if spec.is_dense and any(shape.shared_width for shape in spec.stacks):
        raise ValueError("one expert and a shared one are a dense FFN: use shared_width = 0 with num_experts = 1")
    for shape in spec.stacks:
        routed = shape.ffn_width - shape.shared_width
        if spec.num_experts > routed:
            raise ValueError(
                f"num_experts = {spec.num_experts} is more than the {routed} neurons of the FFN that are routed: "
                "every expert needs at least one neuron"
            )
        if spec.num_experts * shape.expert_width < routed and spec.shrunk is None and not shape.varied:
            raise ValueError(
                f"{spec.num_experts} experts of {shape.expert_width} neurons hold fewer than the "
                f"{routed} neurons of the FFN"
            )


def _check_budgets(spec: MoESpec) -> None:
    E = spec.num_experts
    if spec.active_per_layer:
        if len(spec.active_per_layer) != spec.num_layers:
            raise ValueError(
                f"active_per_layer names {len(spec.active_per_layer)} layers and the model has {spec.num_layers}"
            )
        if not all(1 <= active <= E for active in spec.active_per_layer):
            raise ValueError(
                f"active_per_layer = {list(spec.active_per_layer)}: each must be between 1 and num_experts = {E}"
            )
    if spec.max_active is not None and not spec.num_active <= spec.max_active <= E:
        raise ValueError(
            f"max_active = {spec.max_active} must be between num_active = {spec.num_active} and num_experts = {E}"
        )
    if not all(1 <= active <= E for active in spec.elastic):
        raise ValueError(f"elastic = {list(spec.elastic)}: each must be between 1 and num_experts")
    if tuple(sorted({*spec.elastic} - {spec.num_active})) != spec.elastic:
        raise ValueError(
            f"elastic = {list(spec.elastic)} must ascend, without num_active = {spec.num_active}, which is a budget "
            "anyway"
        )
    if spec.elastic and spec.active_per_layer:
        raise ValueError(
            "elastic budgets hold for all layers alike and active_per_layer gives each its own: use one of the two"
        )


def _check_container(spec: MoESpec) -> None:
    if spec.container is None:
        return
    for name, plain in (
        ("selection", SELECTIONS[spec.selection].fixed),
        ("routing", ROUTINGS[spec.routing].own_input),
        ("elastic", not spec.elastic),
        ("active_per_layer", not spec.active_per_layer),
    ):
        if not plain:
            raise ValueError(
                f"{name} = {getattr(spec, name)}, and the container {spec.container} runs the same number of experts "
                "for every token in every layer, chosen by each layer: use container none"
            )
    if any(shape.varied for shape in spec.stacks):
        raise ValueError(
            f"the container {spec.container} has one width for all layers, and these layers have different ones: use "
            "container none, or one width"
        )


def _require_keys(values: dict[str, Any], kind: type) -> None:
    known = {f.name for f in fields(kind)}
    missing = sorted({f.name for f in fields(kind) if f.default is MISSING} - set(values))
    unknown = sorted(set(values) - known)
    if missing or unknown:
        raise ValueError(
            f"this is not a spec of ffn2moe: missing {missing}, unknown {unknown}; "
            "it was written by another version, or edited"
        )
