"""Check the section `decompose` of params.yaml: what is kept of the teacher, and the experts that it becomes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from ffn2moe.containers.usual import USUAL_EXPERTS
from ffn2moe.literals import Widths
from tasks.choices import CONTAINERS, GATES, PARTITIONS, OneOf
from tasks.section import Count, Section


def _kept(keep: str | int | tuple[int, ...]) -> str | int | tuple[int, ...]:
    if isinstance(keep, tuple) and (not keep or list(keep) != sorted(set(keep))):
        raise ValueError(
            f"decompose.keep_layers = {list(keep)} must name at least one layer, each once and in order, such as "
            "[0, 2, 3, 5]; a number keeps so many, all keeps all"
        )
    return keep


def _width(width: str | int | float, info: ValidationInfo) -> str | int | float:
    if (isinstance(width, int) and width < 1) or (isinstance(width, float) and not 0 < width < 1):
        usual = "auto" if info.field_name == "expert_width" else "full"
        raise ValueError(
            f"decompose.{info.field_name} = {width} must be {usual}, a number of neurons from 1, or a share between 0 "
            "and 1"
        )
    return width


Kept = Annotated[Literal["all"] | Count | tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_kept)]
Width = Annotated[Literal["full"] | int | float, AfterValidator(_width)]
ExpertWidth = Annotated[Literal["auto"] | int | float, AfterValidator(_width)]


class Decompose(Section):
    keep_layers: Kept
    ffn_width: Width
    num_experts: Literal["auto"] | Count
    num_active: Count
    partition: Annotated[str, OneOf(PARTITIONS, ("auto",))]
    expert_width: ExpertWidth
    shared_width: Literal["auto"] | Annotated[int, Field(ge=0)]
    active_per_layer: Literal["same", "budget"] | tuple[Count, ...]
    width_per_layer: Widths
    container: Annotated[str, OneOf(CONTAINERS, ("none", "auto"))]
    gate: Annotated[str, OneOf(GATES, ("auto",))]
    calibration_tokens: Count

    @property
    def most_experts(self) -> int:
        """E, or the largest that `auto` is."""
        return USUAL_EXPERTS if self.num_experts == "auto" else self.num_experts

    @model_validator(mode="after")
    def _no_more_active_than_there_are(self) -> Decompose:
        if self.num_active > self.most_experts:
            raise ValueError(
                f"decompose.num_active = {self.num_active} is more than decompose.num_experts = "
                f"{self.most_experts}; a token can run at most every expert"
            )
        return self

    @model_validator(mode="after")
    def _one_expert_is_a_smaller_dense_model(self) -> Decompose:
        if self.num_experts != 1:
            return self
        if self.keep_layers == "all" and self.ffn_width == "full":
            raise ValueError(
                "decompose.num_experts = 1 is a student without experts, and with all layers and the full FFN width "
                "it is the teacher: set decompose.keep_layers or decompose.ffn_width, or more experts"
            )
        for key, value, only in (
            ("expert_width", self.expert_width, self.expert_width == "auto"),
            ("shared_width", self.shared_width, self.shared_width in (0, "auto")),
            ("active_per_layer", self.active_per_layer, self.active_per_layer == "same"),
            ("container", self.container, self.container in ("none", "auto")),
        ):
            if not only:
                raise ValueError(
                    f"decompose.{key} = {value} is about experts, and decompose.num_experts = 1 is a student without: "
                    f"leave decompose.{key} at its default, or use more experts"
                )
        return self

    @model_validator(mode="after")
    def _a_container_holds_what_is_asked(self) -> Decompose:
        if self.container in ("none", "auto"):
            return self
        wanted = CONTAINERS[self.container]
        if self.gate not in ("auto", "unit", wanted.gate):
            able = [row.name for row in CONTAINERS.rows() if row.gate == self.gate]
            raise ValueError(
                f"decompose.gate = {self.gate}, but the container {wanted.name} weighs the chosen experts by "
                f"{wanted.gate}, and a model learns with the formula that it runs with: set decompose.gate=auto"
                + (f", or decompose.container to {' or '.join(able)}" if able else "")
            )
        if self.shared_width not in (0, "auto") and wanted.shared_expert is None:
            able = [row.name for row in CONTAINERS.rows() if row.shared_expert]
            raise ValueError(
                f"decompose.shared_width = {self.shared_width}, but the container {wanted.name} has no shared expert: "
                f"set decompose.shared_width=0, or decompose.container to {' or '.join(able)}"
            )
        return self

    @model_validator(mode="after")
    def _each_layer_has_a_number_of_experts(self) -> Decompose:
        layers = self.active_per_layer
        if isinstance(layers, tuple) and (not layers or max(layers) > self.most_experts):
            raise ValueError(
                f"decompose.active_per_layer = {list(layers)} must hold, for each layer, a number between 1 and "
                f"decompose.num_experts = {self.most_experts}"
            )
        return self

    @model_validator(mode="after")
    def _containers_have_one_k(self) -> Decompose:
        if self.container not in ("none", "auto") and self.active_per_layer != "same":
            raise ValueError(
                f"decompose.active_per_layer = {self.active_per_layer}, but a native container runs the same number of "
                "experts in every layer: set decompose.container=none, or decompose.active_per_layer=same"
            )
        return self

    @model_validator(mode="after")
    def _containers_have_one_width(self) -> Decompose:
        if self.container not in ("none", "auto") and self.width_per_layer == "budget":
            raise ValueError(
                "decompose.width_per_layer = budget gives each layer a width of its own, and a native container has "
                "one width for all layers: set decompose.container=none, or decompose.width_per_layer=auto"
            )
        return self
