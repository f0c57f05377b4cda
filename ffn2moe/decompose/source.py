"""Read a checkpoint layer by layer from its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.dense.config import auto_class, constructor_options, head_of, read_generation
from ffn2moe.dense.families import FAMILIES, Stack
from ffn2moe.dense.load import read_config
from ffn2moe.dense.locate import family_of, stacks_of
from ffn2moe.dense.tensors import explain, match
from ffn2moe.dense.weights import tied, weight_headers
from ffn2moe.spec import Head

BIG_TENSOR = 64 * 2**20  # bytes of a tensor outside the layers that gets a shard of its own
LARGEST_FLOAT16 = 65504.0


class NotStreamable(ValueError):
    """The model cannot be decomposed layer by layer, but may be in memory."""


def skeleton(folder: str | Path, head: Head | None = None) -> Any:
    """Return the transformers model of a folder on the meta device, in eval mode; buffers that it computes are filled.

    ValueError where transformers does not know its type.
    """
    import transformers

    config = read_config(str(folder), Path(folder))
    head = head or head_of(config, folder)
    family = FAMILIES.get(config.model_type)
    name = auto_class(head, family.reads if family else "text", family)
    with torch.device("meta"):
        model = getattr(transformers, name).from_config(
            config, dtype=torch.float32, **(constructor_options(config, head) if family else {})
        )
    for module in model.modules():
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers[key]
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()  # parameters are on the meta device, where this does nothing: it fills the buffers
    read_generation(model, folder)
    return model.eval()


def only_stack(model: Any) -> tuple[Stack, nn.ModuleList]:
    """Return the one stack of layers of a model. NotStreamable where it has several: what passes between is unknown."""
    found = stacks_of(model)
    if len(found) != 1:
        raise NotStreamable(
            f"{family_of(model).name} models have {len(found)} stacks of layers, and only models of one are decomposed "
            "layer by layer: convert this one in memory"
        )
    return found[0]


def layers_path(model: Any) -> str:
    """Return the full name of the stack's list of layers in the model, with a dot at the end."""
    _, layers = only_stack(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


class Source:
    """The weights of a folder, by their names in the transformers model; each is read when it is asked for.

    FileNotFoundError for a missing shard; ValueError for tensors that are missing, doubled, of another shape, or that
    the model does not read; NotStreamable for tensors that transformers merges or splits.
    """

    def __init__(self, folder: str | Path, model: Any) -> None:
        self.folder = Path(folder)
        headers, wanted = weight_headers(folder), model.state_dict()
        found = match(folder, headers, model)
        if found.made:
            name, source = next(iter(found.made.items()))
            raise NotStreamable(
                f"transformers makes the tensor {name} of others (such as {source}), which needs more than one "
                "layer: convert this model in memory"
            )
        explain(folder, model, found.left)
        self.place = {name: (headers[source].file, source) for name, source in found.place.items()}
        self.aliases = tied(model)
        self._require_whole(wanted)

    def _require_whole(self, wanted: dict[str, Tensor]) -> None:
        for name, first in self.aliases.items():
            if name in self.place and first in self.place:
                if not torch.equal(self.read(name, None), self.read(first, None)):
                    raise ValueError(
                        f"config.json of {self.folder} says that {name} is {first}, but the files hold two different "
                        "tensors: set tie_word_embeddings to false there"
                    )
            elif name in self.place:
                self.place[first] = self.place[name]
            elif first in self.place:
                self.place[name] = self.place[first]
        missing = sorted(set(wanted) - set(self.place))
        if missing:
            raise ValueError(
                f"{self.folder} lacks weights ({', '.join(missing[:3])}; {len(missing)} in all): the files are "
                "incomplete, or config.json belongs to another model"
            )

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of a tensor, from its file's header."""
        from safetensors import safe_open
        from safetensors.torch import _TYPES

        path, source = self.place[name]
        with safe_open(path, framework="pt") as file:
            view = file.get_slice(source)
            return tuple(view.get_shape()), _TYPES[view.get_dtype()]

    def read(self, name: str, dtype: torch.dtype | None = torch.float32, rows: Tensor | None = None) -> Tensor:
        """Return a copy of a tensor in `dtype` (None: its own); with `rows`, only these rows are filled.

        Rows that are not filled cost no memory until they are touched. The file is unmapped before this returns.
        ValueError for NaN or infinite values.
        """
        from safetensors import SafetensorError, safe_open

        path, source = self.place[name]
        try:
            with safe_open(path, framework="pt") as file:
                mapped = file.get_tensor(source)
                dtype = dtype if dtype and mapped.is_floating_point() else mapped.dtype
                if rows is None:
                    tensor = checked = mapped.to(dtype, copy=True)
                else:
                    tensor, checked = torch.empty(mapped.shape, dtype=dtype), mapped[rows].to(dtype)
                    tensor[rows] = checked
                del mapped
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): download it again") from error
        if checked.is_floating_point() and not torch.isfinite(checked).all():
            raise ValueError(f"{self.folder} has NaN or infinite values in {name}: the weights are damaged")
        return tensor

    def bytes_of(self, name: str, dtype: torch.dtype | None) -> int:
        """Return the bytes of a tensor in this dtype (None: its own)."""
        shape, own = self.layout(name)
        return torch.Size(shape).numel() * (dtype or own).itemsize
