"""What a factorised model is.

Dimension letters, used in every tensor name of this package (`scores_TE` is tokens x experts):

    B batch          T tokens (B * L, or the unpadded ones)   E experts
    L length         D model width                            M width of an expert, in neurons
    V vocabulary     F width of the dense FFN, in neurons     K experts chosen for a token

A *neuron* is one row of an FFN's input matrices and one column of its output matrix; an *expert* is a set
of neurons; a *partition* puts every neuron in one expert.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class MoESpec:
    """The shape of a factorised model, saved beside its weights; everything needed to rebuild its layers.

    Sizes are in neurons or dimensions, counts in experts. `expert_width * num_experts >= ffn_width`: experts
    that the partition leaves short are padded with zero neurons, which change nothing.
    """

    family: str  # key into ffn2moe.dense.FAMILIES
    model_class: str  # the transformers class that holds the layers, e.g. "BertModel"
    width: int  # D
    ffn_width: int  # F
    num_layers: int
    num_experts: int  # E
    expert_width: int  # M
    num_active: int  # K
    gated: bool
    activation: Activation
    partition: str  # how the neurons were divided
    teacher: str  # where the dense model came from, as the user wrote it
    pooling: Pooling
    max_length: int  # tokens; longer texts are cut

    def __post_init__(self) -> None:
        if not 1 <= self.num_active <= self.num_experts:
            raise ValueError(
                f"num_active must be between 1 and num_experts = {self.num_experts}, got {self.num_active}: "
                "a token cannot use more experts than there are"
            )
        if self.num_experts > self.ffn_width:
            raise ValueError(
                f"num_experts = {self.num_experts} is more than the {self.ffn_width} neurons of the FFN: "
                "every expert needs at least one neuron"
            )
        if self.num_experts * self.expert_width < self.ffn_width:
            raise ValueError(
                f"{self.num_experts} experts of {self.expert_width} neurons hold fewer than the "
                f"{self.ffn_width} neurons of the FFN"
            )
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(get_args(Activation))}")

    @property
    def active_share(self) -> float:
        """Share of the FFN's neurons that a token uses, between 0 and 1."""
        return self.num_active * self.expert_width / self.ffn_width

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoESpec:
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
            raise ValueError(
                f"this is not a spec of ffn2moe: missing {missing}, unknown {unknown}; "
                "it was written by another version, or edited"
            )
        return cls(**values)
