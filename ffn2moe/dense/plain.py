"""Give any source the form that everything else reads: a folder with float weights as safetensors."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from ffn2moe.dense.cache import cached, save_as_floats
from ffn2moe.dense.config import auto_class, head_of
from ffn2moe.dense.families import FAMILIES
from ffn2moe.dense.gguf import GgufFile, open_gguf, write_dequantised
from ffn2moe.dense.quantised import Quantisation, quantisation_of
from ffn2moe.dense.sentence_folder import transformer_folder
from ffn2moe.dense.source import download, resolve_source
from ffn2moe.dense.weights import Header, weight_headers
from ffn2moe.progress import Say, silent

FLOAT32 = 4  # bytes
_OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale")  # weights need none
_NOT_COPIED = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "config.json", ".*")


def plain_folder(source: str, revision: str | None = None, *, say: Say = silent) -> Path:
    """Return a folder that holds the model of any source of `resolve_source` as float safetensors.

    It is the source's own folder where that is one, or that of a sentence encoder's transformer; else a copy in the
    user's cache, about which `say` is told.
    ValueError or FileNotFoundError, with the remedy, before weights are read, for a source that cannot be read.
    """
    from safetensors import SafetensorError

    _, path = resolve_source(source)
    path = transformer_folder(path or download(source, revision))
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(open_gguf(path), say)
    try:
        headers = weight_headers(path)
    except (FileNotFoundError, SafetensorError):
        return path  # missing or damaged files: who reads them names them
    kind = quantisation_of(path, headers)
    if kind is None:
        return path
    needed = FLOAT32 * sum(_numbers(header) for header in headers.values())
    say(_line(path.name, kind.name, needed))
    files = [path / "config.json", *sorted({header.file for header in headers.values()})]
    return cached(path.name, files, lambda out: _dequantise(path, kind, out), needed)


def _of_gguf(file: GgufFile, say: Say) -> Path:
    needed = FLOAT32 * file.parameters
    say(_line(file.path.name, file.form, needed))
    return cached(file.path.stem, [file.path], lambda out: write_dequantised(file, out), needed)


def _numbers(header: Header) -> int:
    """Return how many weights a tensor may hold: integers are packed of four bits at least."""
    packed = {"U8": 2, "I8": 2, "I32": 8, "U32": 8}
    return packed.get(header.dtype, 1) * prod(header.shape)


def _line(name: str, form: str, needed: int) -> str:
    return f"dequantising {name} ({form}) to float32, {needed / 2**30:.1f} GiB: the dequantised model is the teacher"


def _dequantise(folder: Path, kind: Quantisation, out: Path) -> None:
    """Write the model of a quantised checkpoint to the folder `out`, with the other files of its folder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings = dict(getattr(config, "quantization_config", None) or {"quant_method": kind.methods[0]})
    config.quantization_config = settings | ({"dequantize": True} if kind.switch else {})
    model, report = _class_of(config).from_pretrained(
        folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    unread = {name for name in report["unexpected_keys"] if not name.endswith(_OF_ACTIVATIONS)}
    wrong = sorted({*report["missing_keys"], *unread})
    if wrong:
        raise ValueError(
            f"the weights of {folder} are quantised ({kind.name}), and transformers cannot read {', '.join(wrong[:3])}"
        )
    if not kind.switch:
        model = model.dequantize(torch.float32)
    save_as_floats(model, out)
    for file in folder.iterdir():
        if not any(file.match(pattern) for pattern in _NOT_COPIED):
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            copy(file, out / file.name)


def _class_of(config: Any) -> Any:
    """Return the transformers class that wrote a checkpoint: no other takes all of its tensors."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    family = FAMILIES.get(config.model_type)
    return getattr(transformers, auto_class(head_of(config), family.reads if family else "text", family))
