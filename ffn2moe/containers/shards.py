"""Read tensors by name from the shards of a folder, without loading the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ffn2moe.dense.load import weight_files

# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


class Shards(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by name, each read from its safetensors shard when it is asked for.

    FileNotFoundError for a shard that is missing, ValueError for one that is damaged, for a name that two shards hold
    and for one that an index promises in vain.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import SafetensorError

        try:
            self._file_of = weight_files(folder)
        except SafetensorError as error:
            raise ValueError(f"a shard of {folder} cannot be read ({error}): fetch it again") from error
        self._layouts: dict[str, tuple[tuple[int, ...], str]] = {}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        # Opened anew each time: a file that stays mapped stays in memory, page by page as it is read.
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def layout(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, from the header of its shard."""
        from safetensors import safe_open

        if name not in self._layouts:
            with safe_open(self._file_of[name], framework="pt") as file:
                for held in file.keys():  # noqa: SIM118
                    view = file.get_slice(held)
                    self._layouts[held] = tuple(view.get_shape()), view.get_dtype()
        return self._layouts[name]
