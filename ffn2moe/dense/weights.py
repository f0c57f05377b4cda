"""Find the weight files of a Hugging Face folder, and refuse damaged weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

_FORMATS = {
    "*.h5": "TensorFlow's or Keras's HDF5",
    "*.msgpack": "Flax's msgpack",
    "*.ckpt*": "a TensorFlow or Lightning checkpoint",
    "*.pt": "a PyTorch pickle",
    "*.pth": "a PyTorch pickle",
    "*.onnx": "an ONNX graph",
    "*.npz": "NumPy arrays",
}


@dataclass(frozen=True)
class Header:
    """Where a tensor is, and how it is stored."""

    file: Path
    dtype: str  # as safetensors spells it: "F32", "BF16", "F8_E4M3", "I32"
    shape: tuple[int, ...]


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Return the file of every tensor of a Hugging Face folder, by the tensor's name (see `weight_headers`)."""
    return {name: header.file for name, header in weight_headers(folder).items()}


def weight_headers(folder: str | Path) -> dict[str, Header]:
    """Return the header of every tensor of a Hugging Face folder, by the tensor's name; no weight is read.

    FileNotFoundError for a missing file. ValueError for weights that are no safetensors, for a tensor that the index
    names and its file lacks, and for one that is in two files, as one of the copies would be ignored.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        promised: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(promised.values()))
    else:
        promised, shards = {}, ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing and not promised:
        _refuse_other_formats(folder)
    if missing:
        named = f", which {index.name} names," if promised else ""
        raise FileNotFoundError(
            f"{', '.join(missing[:3])}{named} is not in {folder} ({len(missing)} of {len(shards)} files are missing): "
            "fetch the folder again"
        )
    found = _headers(folder, shards)
    lost = [name for name, shard in promised.items() if name not in found or found[name].file.name != shard]
    if lost:
        raise ValueError(
            f"{promised[lost[0]]} in {folder} lacks {', '.join(lost[:3])}, which {index.name} says it holds "
            f"({len(lost)} tensors in all): fetch the folder again"
        )
    return found


def _refuse_other_formats(folder: Path) -> None:
    """ValueError for a folder whose weights are in a format that is not read here."""
    if any(folder.glob("*.bin")):
        raise ValueError(_remedy_for_bin(folder))
    for pattern, name in _FORMATS.items():
        files = sorted(folder.rglob(pattern))
        if files:
            raise ValueError(
                f"{folder} has its weights as {name} ({files[0].relative_to(folder)}), and only safetensors and GGUF "
                "files are read: name a folder of its safetensors"
            )


def _remedy_for_bin(folder: Path) -> str:
    config = folder / "config.json"
    names = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    code = f"transformers.{names[0] if names else 'AutoModel'}.from_pretrained('{folder}').save_pretrained('{folder}')"
    return (
        f"{folder} has its weights as .bin, which can hold code; only safetensors are read here. Convert them once: "
        f'python -c "import transformers; {code}"'
    )


def _headers(folder: Path, shards: list[str]) -> dict[str, Header]:
    from safetensors import safe_open

    found: dict[str, Header] = {}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise ValueError(
                        f"the tensor {name} stands in two files of {folder}, {found[name].file.name} and {shard}: one "
                        "of them belongs to another checkpoint; fetch the folder again"
                    )
                view = file.get_slice(name)
                found[name] = Header(folder / shard, view.get_dtype(), tuple(view.get_shape()))
    return found


def require_finite(model: nn.Module, what: str) -> None:
    """Raise ValueError that names the first tensor of `model` with a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{what} has NaN or infinite values in {name}: the weights are damaged, fetch them again")


def require_representable(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise ValueError if a value of the tensor called `what` is beyond the range of `dtype`, in which it is stored."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{what} holds {largest:.3g}, more than the {torch.finfo(dtype).max:.3g} that {dtype} can: "
            "keep the model in bfloat16 or float32"
        )


def tied(model: nn.Module) -> dict[str, str]:
    """Return second names of tensors, each with the first name: only the first is on disk."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            aliases[name] = other
    return aliases
