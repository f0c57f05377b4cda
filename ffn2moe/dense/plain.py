"""Give any source the form that everything else reads: a folder with float weights as safetensors."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from ffn2moe.dense.adapters import Adapter, adapter_in, write_merged
from ffn2moe.dense.cache import cached, save_as_floats
from ffn2moe.dense.config import auto_class, head_of
from ffn2moe.dense.families import FAMILIES
from ffn2moe.dense.gguf import GgufFile, open_gguf, write_dequantised, write_headers
from ffn2moe.dense.quantised import Quantisation, quantisation_of
from ffn2moe.dense.sentence_folder import transformer_folder
from ffn2moe.dense.source import download, resolve_source
from ffn2moe.dense.weights import Header, weight_files, weight_headers
from ffn2moe.progress import Say, silent

FLOAT32 = 4  # bytes
_OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale")  # weights need none
_NOT_COPIED = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "config.json", "adapter_*", ".*")


def plain_folder(source: str, revision: str | None = None, *, say: Say = silent, weights: bool = True) -> Path:
    """Return a folder that holds the model of any source of `resolve_source` as float safetensors.

    It is the source's own folder where that is one, or that of a sentence encoder's transformer; else a copy in the
    user's cache, about which `say` is told. Without `weights` that of a GGUF file has their headers alone.
    ValueError or FileNotFoundError, with the remedy, before weights are read, for a source that cannot be read.
    """
    _, path = resolve_source(source)
    path = transformer_folder(path or download(source, revision))
    adapter = adapter_in(path) if path.is_dir() else None
    return _floats(path, say, weights) if adapter is None else _merged(adapter, say)


def _merged(adapter: Adapter, say: Say) -> Path:
    """Return a folder with the model that an adapter belongs to and the adapter merged into it."""
    folder = adapter.folder
    try:
        base = _floats(folder, say) if adapter.beside else plain_folder(adapter.base, say=say)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the adapter in {folder} changes a model that is missing: {error}") from None
    weights = sorted(set(weight_files(base).values()))
    say(f"merging the adapter in {folder.name} into the model {'beside it' if adapter.beside else adapter.base}")

    def write(out: Path) -> None:
        write_merged(adapter, base, out)
        for source in (base, folder):
            _copy_others(source, out)

    files = [*folder.glob("adapter_*"), *folder.glob("token*"), base / "config.json", *weights]
    return cached(folder.name, files, write, FLOAT32 * sum(prod(one.shape) for one in weight_headers(base).values()))


def _floats(path: Path, say: Say, weights: bool = True) -> Path:
    """Return a folder with the model of a folder or of a GGUF file as floats."""
    from safetensors import SafetensorError

    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(open_gguf(path), say, weights)
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


def _of_gguf(file: GgufFile, say: Say, weights: bool) -> Path:
    needed = FLOAT32 * file.parameters
    if not weights:
        return cached(f"{file.path.stem}-headers", [file.path], lambda out: write_headers(file, out), needed)
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
    _copy_others(folder, out)


def _copy_others(folder: Path, out: Path) -> None:
    """Copy what a folder holds beside a model's config and weights: tokenizer, generation config, further modules."""
    for file in folder.iterdir():
        if any(file.match(pattern) for pattern in _NOT_COPIED):
            continue
        if file.is_dir():
            shutil.copytree(file, out / file.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, out / file.name)


def _class_of(config: Any) -> Any:
    """Return the transformers class that wrote a checkpoint: no other takes all of its tensors."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    family = FAMILIES.get(config.model_type)
    return getattr(transformers, auto_class(head_of(config), family.reads if family else "text", family))
