"""Read and write the safetensors shards of a Hugging Face folder, with little in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ffn2moe.dense.weights import require_representable, weight_files

# The dtypes of a container, each with its name in a safetensors header.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Shards(Mapping[str, Tensor]):
    """Read the tensors of a Hugging Face folder by name, each from its shard when it is used.

    FileNotFoundError for a missing shard. ValueError for a damaged shard, for a name that two shards hold and for a
    name that the index lists and no shard holds.
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

        # Open the file again for each tensor: the pages of a file that stays mapped stay in memory.
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def layout(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape and the dtype of a tensor, from the header of its shard."""
        from safetensors import safe_open

        if name not in self._layouts:
            with safe_open(self._file_of[name], framework="pt") as file:
                for held in file.keys():  # noqa: SIM118
                    view = file.get_slice(held)
                    self._layouts[held] = tuple(view.get_shape()), view.get_dtype()
        return self._layouts[name]


class ShardWriter:
    """Write tensors into numbered safetensors shards, with at most one shard in memory.

    Tensors are written as `dtype`, but those whose names end with `float32_suffix` as float32.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, shard_bytes: int, *, float32_suffix: str | None = None
    ) -> None:
        self.folder, self.dtype, self.shard_bytes, self.float32_suffix = folder, dtype, shard_bytes, float32_suffix
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total_bytes = self.shards = 0
        self.shard_of: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor. ValueError for a name that is there, a value that is not finite or does not fit the dtype."""
        if name in self.shard_of or name in self.held:
            raise ValueError(f"{name} is written twice: the source holds it twice, or a layer was given twice")
        in_float32 = self.float32_suffix is not None and name.endswith(self.float32_suffix)
        dtype = torch.float32 if in_float32 else self.dtype
        tensor = tensor.detach().cpu()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has NaN or infinite values: the weights are damaged")
        require_representable(tensor, dtype, name)
        # A copy: two names may stand for one tensor, and a view would keep its whole storage in memory.
        tensor = tensor.to(dtype, copy=True).contiguous()
        if self.held and self.held_bytes + tensor.nbytes > self.shard_bytes:
            self.flush()
        self.held[name] = tensor
        self.held_bytes += tensor.nbytes

    def flush(self) -> None:
        """Write the tensors in memory as the next shard."""
        from safetensors.torch import save_file

        self.shards += 1
        path = self.folder / f"model-{self.shards:05d}.safetensors"
        save_file(self.held, path, metadata={"format": "pt"})
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        self.shard_of |= dict.fromkeys(self.held, self.shards)
        self.total_bytes += self.held_bytes
        self.held, self.held_bytes = {}, 0

    def finish(self) -> None:
        """Write the last shard, rename all shards and, where there are several, write an index."""
        if self.held:
            self.flush()
        names = {
            shard: "model.safetensors" if self.shards == 1 else f"model-{shard:05d}-of-{self.shards:05d}.safetensors"
            for shard in range(1, self.shards + 1)
        }
        for shard, name in names.items():
            os.replace(self.folder / f"model-{shard:05d}.safetensors", self.folder / name)
        if self.shards > 1:
            weight_map = {name: names[shard] for name, shard in sorted(self.shard_of.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
