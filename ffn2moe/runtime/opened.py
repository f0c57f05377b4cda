"""Hold what every open export has: its folder, plan, manifest, graph and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.runtime.engines import Graph
from ffn2moe.runtime.files import padding_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Opened:
    """An open export; `plan` says how it is executed. `tokenizer` is None where the model reads images."""

    def __init__(
        self, path: Path, plan: str, manifest: Mapping[str, Any], graphs: Sequence[Graph], tokenizer: Tokenizer | None
    ) -> None:
        self.path = path
        self.plan = plan
        self.manifest = manifest
        self._graph = graphs[0]
        self._outputs = list(self._graph.outputs)
        self._tokenizer: Any = tokenizer
        self._pad_id = 0 if tokenizer is None else padding_id(path / "tokenizer", tokenizer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, plan={self.plan!r})"

    def _ids_of(self, texts: Sequence[str], method: str) -> list[list[int]]:
        """Return the token ids of each text that `method` got. ValueError for one text alone, or one without a word."""
        if isinstance(texts, str):
            raise ValueError(f"{method} takes a list of texts: write {method}([text])")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text {index} is empty: there is nothing to read in it; leave it out")
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
