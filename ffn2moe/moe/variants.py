"""Make variants of a mixture: the same weights with another number of experts, or with some layers left dense.

Each variant is exported as plans with their own quality and time: `sorted-k1` runs one expert a token,
`sorted-d0-2.5` has the teacher's own FFN in layers 0 to 2 and 5. `ffn2moe.planning.choose` measures all plans on a
machine, so that a layer which gains nothing as a mixture there stays dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ffn2moe.choices import GATES, SELECTIONS
from ffn2moe.dense.blocks import installed_ffns
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.locate import install, read_ffn
from ffn2moe.moe.experts import slice_experts
from ffn2moe.moe.layer import MoEFFN, set_active
from ffn2moe.spec import FFNShape, MoESpec

MOST_SHARES = 4
LARGE_SHARE = 0.5  # a layer in which a token runs a smaller share of the FFN gains whenever the others do


@dataclass(frozen=True)
class Variant:
    """The settings that differ from the spec; none by default."""

    num_active: int | None = None  # K, one of `spec.elastic`
    dense_layers: tuple[int, ...] = ()  # over all stacks, ascending

    def name(self, plan: str) -> str:
        """Return the name of a plan of this variant; `ffn2moe.runtime.plans.form_of` is the inverse."""
        if self.num_active is not None:
            return f"{plan}-k{self.num_active}"
        return f"{plan}-d{_ranges(self.dense_layers)}" if self.dense_layers else plan

    def metadata(self) -> dict[str, Any]:
        """Return the manifest's fields for a plan of this variant."""
        if self.num_active is not None:
            return {"num_active": self.num_active}
        return {"dense_layers": list(self.dense_layers)} if self.dense_layers else {}

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Variant:
        """Return the variant of a plan's entry in the manifest: the inverse of `metadata`."""
        return cls(entry.get("num_active"), tuple(entry.get("dense_layers", ())))

    def spec(self, spec: MoESpec) -> MoESpec:
        """Return the spec of this variant alone: in a dense layer a token runs all experts."""
        if self.num_active is not None:
            return spec.at(self.num_active)
        if not self.dense_layers:
            return spec
        active = [
            spec.num_experts if layer in self.dense_layers else spec.active_of(layer)
            for layer in range(spec.num_layers)
        ]
        stacks = _with_whole_layers(spec, self.dense_layers)
        return replace(spec, stacks=stacks, active_per_layer=tuple(active), elastic=(), container=None)

    @contextmanager
    def of_model(self, student: nn.Module, spec: MoESpec, teacher: nn.Module | None) -> Iterator[None]:
        """Make `student` this variant inside the context. ValueError for dense layers without a teacher."""
        with ExitStack() as undo:
            if self.num_active is not None:
                undo.callback(set_active, student, spec.num_active)
                set_active(student, self.num_active)
            if self.dense_layers:
                if teacher is None:
                    raise ValueError("layers that stay dense are the teacher's: give the teacher")
                mixtures = installed_ffns(student)
                teachers = spec.teachers_layers
                for layer in self.dense_layers:
                    undo.callback(install, student, layer, mixtures[layer])
                    install(student, layer, whole(read_ffn(teacher, teachers[layer])))
            yield


def _with_whole_layers(spec: MoESpec, dense: Sequence[int]) -> tuple[FFNShape, ...]:
    """Return the shapes of a spec in which the experts of the layers `dense` hold all neurons once.

    They do anyway where all layers have one width.
    """
    stacks, first, E = [], 0, spec.num_experts
    for shape in spec.stacks:
        if shape.varied:
            sizes = [
                divmod(shape.ffn_width, E) if first + layer in dense else (one.expert_width, one.shared_width)
                for layer, one in enumerate(map(shape.of_layer, range(shape.num_layers)))
            ]
            own, shared = map(tuple, zip(*sizes, strict=True))
            widest = {"expert_width": max(own), "shared_width": max(shared)}
            shape = replace(shape, expert_widths=own, shared_widths=shared if any(shared) else (), **widest)
        stacks.append(shape)
        first += shape.num_layers
    return tuple(stacks)


def variants_of(spec: MoESpec, *, with_teacher: bool = True) -> list[Variant]:
    """Return the variants that may be worth a plan, without the spec itself."""
    found = [Variant(num_active=other) for other in spec.elastic]
    if with_teacher and SELECTIONS[spec.selection].fixed:
        found += [Variant(dense_layers=layers) for layers in may_stay_dense(spec)]
    return found


def may_stay_dense(spec: MoESpec) -> list[tuple[int, ...]]:
    """Return sets of layers that may be faster dense while the others are faster as mixtures.

    Layers of a stack with the same K do the same work, so they are chosen together; and if one gains, so does any layer
    with a smaller share. So there are few sets: the layers of the largest share, then also those of the next share and
    so on, down to `LARGE_SHARE`; and each stack as a whole, as the stacks of a seq2seq model read batches of different
    sizes. Where layers have many different widths, `MOST_SHARES` of these shares are taken, far apart.
    """
    mixed = [layer for layer in range(spec.num_layers) if not _is_dense(spec, layer)]
    large = sorted({share for layer in mixed if (share := _share(spec, layer)) >= LARGE_SHARE}, reverse=True)
    some = large[:: -(-len(large) // MOST_SHARES)] if large else []
    sets = [[layer for layer in mixed if _share(spec, layer) >= share] for share in some]
    first = 0
    for shape in spec.stacks:
        sets.append([layer for layer in mixed if first <= layer < first + shape.num_layers])
        first += shape.num_layers
    return list(dict.fromkeys(tuple(layers) for layers in sets if layers and layers != mixed))


def whole(ffn: DenseFFN) -> MoEFFN:
    """Return a dense FFN as a mixture of one expert, which every token runs."""
    D, F = ffn.w_in_FD.shape[1], ffn.ffn_width
    spec = MoESpec(
        family="",
        model_class="",
        head="features",
        stacks=(FFNShape("", 1, D, F, F, 0, gated=ffn.gated, activation=ffn.activation),),
        num_experts=1,
        num_active=1,
        gate="unit",
        router_bias=True,
        container=None,
        partition="",
        teacher="",
        sentence=None,
        max_length=1,
    )
    neurons_EM = torch.arange(F).unsqueeze(0)
    return MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM), neurons_EM)


def _is_dense(spec: MoESpec, layer: int) -> bool:
    return spec.active_of(layer) == spec.num_experts and GATES[spec.gate].constant == "always"


def _share(spec: MoESpec, layer: int) -> float:
    """Return the share of a layer's FFN that a token runs."""
    shape = spec.shape_of(layer)
    return (shape.shared_width + spec.active_of(layer) * shape.expert_width) / shape.ffn_width


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text such as `0-2.5`."""
    starts = [numbers[0], *(number for before, number in pairwise(numbers) if number > before + 1)]
    ends = [*(before for before, number in pairwise(numbers) if number > before + 1), numbers[-1]]
    return ".".join(str(one) if one == last else f"{one}-{last}" for one, last in zip(starts, ends, strict=True))
