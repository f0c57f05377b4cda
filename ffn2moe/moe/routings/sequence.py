"""Let the routers of all layers read one mean per text, so that each text chooses its experts once and ahead."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import Routing

if TYPE_CHECKING:
    from ffn2moe.spec import MoESpec


class Sequence(Routing):
    """Each text chooses for all its tokens, by the mean of what the first mixture is given (`ffn2moe.moe.texts`)."""

    name = "sequence"
    reference = "Read-ME, arXiv 2410.19123"
    unit = "text, ahead of all layers"
    own_input = False

    def check(self, spec: MoESpec) -> None:
        """Raise ValueError for models that do not see one whole text."""
        if spec.head == "causal":
            raise ValueError(
                "routing sequence chooses by the whole text, and a causal model has not seen the rest: use routing "
                "token"
            )
        if spec.head == "seq2seq" or len(spec.stacks) > 1:
            raise ValueError(
                "routing sequence has one text that all layers read, and this model has more than one stack of "
                "layers: use routing token"
            )

    def tokens_per_choice(self, length: int) -> int:
        """Return `length`: a router runs once for a text."""
        return length

    def connect(self, model: Any, layers: Items[Any]) -> None:
        """Let the layers see each text that their model is given; ValueError for a model that reads no text."""
        from ffn2moe.moe.texts import Texts

        if model.main_input_name != "input_ids":
            raise ValueError(
                f"routing 'sequence' reads the tokens of a text, and {type(model).__name__} reads "
                f"{model.main_input_name}: use routing 'token'"
            )
        texts = Texts()
        texts.watch(model)
        for moe in layers:
            moe.texts = texts


ROW = Sequence()
