"""Open the dense model that is converted: its config first, its weights when they are needed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ffn2moe.dense.config import head_of
from ffn2moe.dense.families import FAMILIES, Family
from ffn2moe.dense.load import load_dense, read_config
from ffn2moe.dense.plain import plain_folder
from ffn2moe.dense.sentence_folder import SentenceFolder, default_modules, read_sentence_folder
from ffn2moe.progress import Say, silent
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import Head

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")  # one of them is in each folder


class Dense:
    """A dense model: its folder, config, head and family. ValueError or FileNotFoundError where it cannot be opened."""

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        head: Head | None = None,
        say: Say = silent,
        weights: bool = True,
    ) -> None:
        self.source = source
        self.folder = plain_folder(source, revision, say=say, weights=weights)
        self.config = read_config(source, self.folder)
        self.head: Head = head or head_of(self.config, self.folder)
        self.family: Family | None = FAMILIES.get(self.config.model_type)
        self.reads = self.family.reads if self.family else "text"

    @cached_property
    def encoder(self) -> SentenceFolder | None:
        """The modules that make embeddings, where the folder is a sentence encoder's."""
        return read_sentence_folder(self.folder) if self.head == "embedding" else None

    @property
    def sentence(self) -> SentenceModules | None:
        """How the model makes embeddings; None for another head."""
        if self.head != "embedding":
            return None
        return self.encoder.described if self.encoder else default_modules(self.config)

    @cached_property
    def model(self) -> Any:
        """The transformers model with its weights, in float32: the teacher."""
        return self._loaded[0]

    @cached_property
    def reader(self) -> Any:
        """The tokenizer, for which no weights are read, or the processor."""
        if self.reads != "text":
            return self._loaded[1]
        from transformers import AutoTokenizer

        if not any(path for pattern in VOCABULARIES for path in self.folder.glob(pattern)):
            raise FileNotFoundError(  # transformers would make a tokenizer without words
                f"{self.source} has no tokenizer ({', '.join(VOCABULARIES)}): put its tokenizer.json beside config.json"
            )
        options = self.encoder.tokenizer_options if self.encoder else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, **options)
            return self.encoder.prepare(tokenizer) if self.encoder else tokenizer
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.source} has no readable tokenizer ({str(error).strip().splitlines()[0]}): put its "
                "tokenizer.json beside config.json"
            ) from None

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_dense(str(self.folder), head=self.head)
