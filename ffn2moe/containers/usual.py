"""Choose the container, the number of experts and that of shared neurons where the user names none.

Four experts of a quarter of the FFN, one of them active, are fast in an encoder at little loss
(docs/decisions/0017-four-experts.md). A gated language model with one such expert a token has twice the perplexity of
the dense one after a short training, so it keeps a half: a quarter for every token and one of three experts of a
quarter (docs/results/smollm2.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ffn2moe.containers.container import Container
from ffn2moe.containers.fit import choose, obstacle
from ffn2moe.containers.table import CONTAINERS

AUTO = "auto"
USUAL_EXPERTS = 4
LANGUAGE_MODEL_EXPERTS = 3  # of a gated language model, beside a shared one that is as wide


@dataclass(frozen=True)
class Wanted:
    """What the user asks for, as written: E, K and S, and what else decides which experts a model can have."""

    num_experts: int | str
    num_active: int
    shared_width: int | str
    partition: str
    expert_width: str | int | float
    container: str
    gate: str
    width_per_layer: str
    several_budgets: bool  # whether K differs from layer to layer, or from use to use

    @classmethod
    def of(cls, settings: Any, *, several_budgets: bool) -> Wanted:
        """Return what settings with these names say."""
        named = {one.name: getattr(settings, one.name) for one in fields(cls) if one.name != "several_budgets"}
        return cls(**named, several_budgets=several_budgets)

    @property
    def open(self) -> bool:
        """Whether nothing is named that only other experts could have."""
        return (
            self.num_experts == self.shared_width == self.expert_width == AUTO
            and self.partition in (AUTO, "token_clusters")
            and self.num_active == 1
            and not self.several_budgets
        )


def usual_experts(wanted: Wanted, model: Any, head: str, ffn_width: int | None = None) -> tuple[int, int]:
    """Return E and S: the numbers that are named, else those that fit the model. A named one decides the other, too.

    `model` is the transformers model, with weights or without. `ffn_width` is F of the student where it is narrower.
    """
    from ffn2moe.dense.locate import read_ffn

    E, S = wanted.num_experts, wanted.shared_width
    if wanted.open and head == "causal":
        ffn = read_ffn(model, 0)
        quarter = (ffn_width or ffn.ffn_width) // (1 + LANGUAGE_MODEL_EXPERTS)
        if ffn.gated and quarter and _costs_no_container(wanted.container, model.config, quarter):
            return LANGUAGE_MODEL_EXPERTS, quarter
    return USUAL_EXPERTS if isinstance(E, str) else E, 0 if isinstance(S, str) else S


def usual_container(wanted: Wanted, config: Any, head: str, shared_width: int) -> tuple[Container | None, str]:
    """Return the container for a language model whose experts may have one, with the reason, or the reason for none."""
    if head != "causal":
        return None, "none"
    if wanted.width_per_layer == "budget":
        return None, "none: a native container has one width for all layers"
    if wanted.several_budgets:
        return None, "none: a native container runs the same number of experts in every layer"
    try:
        found, why = choose(config, shared_width=shared_width)
    except ValueError as error:
        return None, f"none: {error}"
    if wanted.gate not in (AUTO, found.gate):
        return None, f"none, because {found.name} weighs experts by {found.gate}, not by {wanted.gate}"
    return found, why


def _costs_no_container(container: str, config: Any, shared: int) -> bool:
    if container in CONTAINERS:
        return obstacle(CONTAINERS[container], config, shared_width=shared) is None
    return container == "none" or _some_fits(config, shared) or not _some_fits(config, 0)


def _some_fits(config: Any, shared: int) -> bool:
    try:
        choose(config, shared_width=shared)
    except ValueError:
        return False
    return True
