"""Check the section `target` of params.yaml: how much is to be kept, or how fast it is to be."""

from __future__ import annotations

from pydantic import Field, model_validator

from tasks.section import Section


class Target(Section):
    """At most one of the two: the known best recipe for it replaces the keys that it sets."""

    keeps: float | None = Field(gt=0, le=2)
    speedup: float | None = Field(gt=0)

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Target:
        if self.keeps is not None and self.speedup is not None:
            raise ValueError(
                f"target.keeps = {self.keeps} and target.speedup = {self.speedup} are two targets: set one. The front "
                "(docs/results/front.md) shows what is kept at each speed"
            )
        return self

    @property
    def wanted(self) -> dict[str, float]:
        """Return the target, `keeps` or `speedup`; nothing where there is none."""
        return {key: value for key, value in self.model_dump().items() if value is not None}
