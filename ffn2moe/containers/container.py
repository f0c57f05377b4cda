"""Define the interface of a container: a native mixture architecture that holds a decomposed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.containers.dense_model import DenseModel
    from ffn2moe.spec import Gate, MoESpec


@dataclass(frozen=True)
class Names:
    """Names on disk of the three matrices of a gated FFN. `{}` stands for the number of a routed expert."""

    gate: str
    up: str
    down: str

    @classmethod
    def projections(cls, prefix: str) -> Names:
        """Return `PREFIX.gate_proj.weight` and so on."""
        return cls(*(f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")))

    def on_disk(self, role: str, experts: int) -> list[str]:
        """Return the names that hold the gate, up or down matrices of so many experts; 0: of one FFN."""
        name = getattr(self, role)
        return [name.format(expert) for expert in range(experts)] if experts else [name]

    def part(self, role: str, tensor: Tensor) -> Tensor:
        """Return the gate, up or down matrix of a tensor on disk."""
        return tensor

    def experts(self, gate_EMD: Tensor, up_EMD: Tensor, down_EDM: Tensor) -> dict[str, Tensor]:
        """Return the routed experts by name, each expert in tensors of its own."""
        tensors: dict[str, Tensor] = {}
        for expert, values in enumerate(zip(gate_EMD, up_EMD, down_EDM, strict=True)):
            tensors |= {name.format(expert): value for name, value in zip(self._names, values, strict=True)}
        return tensors

    def shared(self, gate_SD: Tensor, up_SD: Tensor, down_DS: Tensor) -> dict[str, Tensor]:
        """Return the shared expert by name."""
        return dict(zip(self._names, (gate_SD, up_SD, down_DS), strict=True))

    @property
    def _names(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


@dataclass(frozen=True)
class JoinedNames:
    """Names on disk where gate and up are one matrix and all routed experts are one tensor."""

    gate_up: str
    down: str

    def on_disk(self, role: str, experts: int) -> list[str]:
        """Return the one name that holds the gate, up or down matrices."""
        return [self.down if role == "down" else self.gate_up]

    def part(self, role: str, tensor: Tensor) -> Tensor:
        """Return the gate, up or down matrices of a tensor on disk."""
        return tensor if role == "down" else tensor.chunk(2, dim=-2)[role == "up"]

    def experts(self, gate_EMD: Tensor, up_EMD: Tensor, down_EDM: Tensor) -> dict[str, Tensor]:
        """Return all routed experts in two tensors by name."""
        return self.shared(gate_EMD, up_EMD, down_EDM)

    def shared(self, gate_SD: Tensor, up_SD: Tensor, down_DS: Tensor) -> dict[str, Tensor]:
        """Return the shared expert in two tensors by name."""
        import torch

        return {self.gate_up: torch.cat([gate_SD, up_SD], dim=-2), self.down: down_DS}


def _no_notes(dense: DenseModel) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True)
class Container:
    """A mixture architecture of transformers: what it can hold, and how it is written.

    Tensor names are relative to `model.layers.N.`.
    """

    name: str  # config.model_type, and the name of the row's file
    config_class: str
    model_class: str
    families: Mapping[str, int]  # dense families that it holds, each with its rank among their containers (0: first)

    gate: Gate  # how it weighs the chosen experts
    unit_gate: Gate | None = None  # the formula that unit gates are written for; None: `gate`
    choice_bias: str | None = None  # name of a bias that shifts the choice only (the balance bias); None: it has none
    windows: Literal["none", "one", "per layer"] = "none"  # sliding windows: none, one for all layers, or any
    attention_biases: Literal["none", "queries", "all"] = "none"  # "queries": on queries, keys and values
    zero_query_biases: bool = False  # queries, keys and values always have biases: zeros where the dense model has none
    query_norm: Literal["never", "always", "optional"] = "never"  # whether it normalises queries and keys
    plain_heads: bool = False  # whether heads must be hidden_size / num_attention_heads wide
    ties: bool = True  # whether every engine reads tied embeddings

    router: str
    experts: Names | JoinedNames
    shared_expert: Names | JoinedNames | None = None  # None: it has no shared expert
    shared_gate: str | None = None  # a linear map whose sigmoid multiplies the shared expert: 1/2 at weight 0
    shared_minimum: int = 0  # width of the zero expert written for engines that want a shared expert in any case
    shared_in_experts: bool = False  # whether the shared width is counted in experts
    width_multiple: int = 8  # of expert and shared widths: transformers' grouped_mm wants strides of 16 bytes

    # Return the architecture's own config keys from the dense model, the spec, and M and S on disk.
    config_values: Callable[[DenseModel, MoESpec, int, int], dict[str, Any]]
    old_keys: Mapping[str, str] = field(default_factory=dict)  # config keys: of transformers 4 -> of 5

    engines_without_windows: tuple[str, ...] = ("llama.cpp",)  # engines that ignore its sliding windows
    llama3_rope: bool = False  # whether llama.cpp keeps the llama3 rotary scaling of this architecture
    engine_notes: Callable[[DenseModel], list[str]] = _no_notes  # what else engines do differently

    @property
    def prefers_shared(self) -> bool:
        """Whether it holds a shared expert as it is, without a gate."""
        return self.shared_expert is not None and self.shared_gate is None

    def obstacle(self, dense: DenseModel) -> str | None:
        """Return the property of a dense model that forbids this container, as the end of "because ..."; else None."""
        windows = set(dense.windows)
        if any(windows) and self.windows == "none":
            return f"it has a sliding window ({max(windows)} tokens)"
        if len(windows) > 1 and self.windows != "per layer":
            return "only some of its layers have a sliding window"
        if dense.query_norm and self.query_norm == "never":
            return "it normalises queries and keys"
        if not dense.query_norm and self.query_norm == "always":
            return "it does not normalise queries and keys"
        if dense.output_bias and self.attention_biases != "all":
            return "its attention has biases, on the output projection too (attention_bias)"
        if dense.query_bias and not dense.output_bias and self.attention_biases != "queries":
            return "its attention has biases on queries, keys and values"
        if self.plain_heads and not dense.plain_heads:
            return f"its heads are {dense.head_width} wide, not hidden_size / num_attention_heads"
        if dense.family not in self.families:
            return f"it is a {dense.family}, and this container holds {', '.join(self.families)}"
        return None

    def expert_width(self, spec: MoESpec) -> int:
        """Return M on disk: the spec's, rounded up to the multiple that kernels want."""
        return padded(spec.expert_width, self.width_multiple)

    def shared_width(self, spec: MoESpec) -> int:
        """Return S on disk: the spec's or the minimum, rounded up."""
        multiple = self.expert_width(spec) if self.shared_in_experts else self.width_multiple
        return padded(max(spec.shared_width, self.shared_minimum), multiple)


def padded(width: int, multiple: int) -> int:
    """Return the least multiple that is not below `width`."""
    return -(-width // multiple) * multiple
