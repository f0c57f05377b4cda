"""Hold what every open export has: its folder, plan, manifest, graph and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ffn2moe.runtime.files import padding_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ffn2moe.runtime.engines import Graph


class Opened:
    """An open export; `plan` says how it is executed. `tokenizer` is None where the model reads images."""

    gives: ClassVar[str]  # what it answers a text with, as keys name it: embedding, text, labels, entities, states

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

    def _ids_of(self, texts: Iterable[str], method: str, *, prompt: str = "", first: int = 0) -> list[list[int]]:
        """Return the token ids of each text that `method` got, behind a prompt, from any iterable, which is read once.

        ValueError for one text alone, and for one that `require_text` refuses; texts are counted from `first`.
        """
        require_several(texts, method)
        texts = list(texts)
        for index, text in enumerate(texts, first):
            require_text(text, f"text {index}")
        whole = [prompt + text for text in texts] if prompt else texts
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(whole)]  # fast: without offsets


def require_several(texts: Iterable[Any], method: str) -> None:
    """Raise ValueError for one text alone where `method` takes several."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"{method} takes a list of texts: write {method}([text])")


def require_text(text: object, name: str, *, may_be_empty: bool = False) -> str:
    """Return a text as it is. ValueError that calls it `name` for another type, no word, or no valid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is no string but {type(text).__name__}: decode or convert it first")
    if not (may_be_empty or text.strip()):
        raise ValueError(f"{name} is empty: there is nothing to read in it; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode: character {error.start} is half of a surrogate pair; remove it"
        ) from None
    return text
