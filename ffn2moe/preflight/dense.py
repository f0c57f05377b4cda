"""Open the dense model that is converted: its config first, its weights when they are needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from ffn2moe.dense.config import head_of
from ffn2moe.dense.families import FAMILIES, Family
from ffn2moe.dense.load import load_dense, resolve_source
from ffn2moe.spec import Head

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what is fetched of a hub name


class Dense:
    """A dense model: its folder, config, head and family. ValueError or FileNotFoundError where it cannot be opened."""

    def __init__(self, source: str, *, revision: str | None = None, head: Head | None = None) -> None:
        from transformers import AutoConfig

        self.source = source
        self.folder = local_folder(source, revision)
        self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.head: Head = head or head_of(self.config)
        self.family: Family | None = FAMILIES.get(self.config.model_type)
        self.reads = self.family.reads if self.family else "text"

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

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.source} has no readable tokenizer ({str(error).strip().splitlines()[0]}): put its "
                "tokenizer.json beside config.json"
            ) from None

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_dense(str(self.folder), head=self.head)


def local_folder(source: str, revision: str | None) -> Path:
    """Return the folder of a source on this machine; download it where `source` is a hub name."""
    kind, folder = resolve_source(source)
    if kind == "hub":
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES))
        except Exception as error:  # the library and its dependencies raise a dozen kinds
            raise FileNotFoundError(
                f"{source} is no folder here and cannot be downloaded ({type(error).__name__}): check the name and the "
                "network"
            ) from None
    assert folder is not None
    return folder
