"""Write a folder of transformers as a GGUF file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ffn2moe.containers.gguf.architectures import ARCHITECTURES, Architecture, Widths
from ffn2moe.containers.gguf.rope import Rope, rope_of
from ffn2moe.containers.gguf.tensors import Stored, tensors_of, widths_of
from ffn2moe.containers.gguf.tokenizer import Vocabulary, vocabulary_of
from ffn2moe.containers.gguf.types import WeightType, require_type
from ffn2moe.containers.shards import Shards
from ffn2moe.moe.checkpoint import SPEC_FILE, load_spec
from ffn2moe.progress import Track, untracked


@dataclass(frozen=True)
class Written:
    """A written file: its architecture, its size, and what llama.cpp does differently with it."""

    path: Path
    architecture: str
    bytes: int
    notes: tuple[str, ...]


def write_gguf(folder: Path, path: Path, kind: str = "f16", *, track: Track = untracked) -> Written:
    """Write the model of a folder as the GGUF file `path`, its matrices in a type of `GGUF_TYPES`.

    `folder` is a native container or a dense language model. One tensor is in memory at a time, and the file appears
    whole. ValueError, with cause and remedy, before anything is written, for a model, a tokenizer, a rotary embedding
    or a type that llama.cpp cannot run or that do not fit each other.
    """
    weight_type = require_type(kind)
    if path.exists():
        raise ValueError(f"{path} exists: remove it, or name another file")
    try:
        plan = _plan(folder, weight_type)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be written as GGUF: {error}") from error
    needed = sum(tensor.bytes for tensor in plan.tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(f"{path} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are left: free some")
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write(partial, plan, weight_type, _name(folder), track)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Written(path, plan.architecture.name, path.stat().st_size, plan.notes)


def _name(folder: Path) -> str:
    """Return what programs show as the model's name."""
    if not (folder / SPEC_FILE).is_file():
        return folder.resolve().name
    spec = load_spec(folder)
    teacher = Path(spec.teacher).name.removeprefix("package:")
    return teacher if spec.is_dense else f"{teacher}, {spec.num_active} of {spec.num_experts} experts"


@dataclass(frozen=True)
class _Plan:
    """All that a file holds, before a weight is read."""

    architecture: Architecture
    metadata: dict[str, Any]
    tensors: list[Stored]
    notes: tuple[str, ...]


def _plan(folder: Path, weight_type: WeightType) -> _Plan:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type in ARCHITECTURES and not (folder / "tokenizer.json").is_file():
        raise ValueError("it has no tokenizer.json: put the model's own beside config.json")
    generates = (folder / "generation_config.json").is_file()
    ends = _ends(config, GenerationConfig.from_pretrained(folder) if generates else None)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    architecture, rope, vocabulary = carried(config.model_type, config, tokenizer, ends)
    shards = Shards(folder)
    widths = widths_of(architecture, config, shards, weight_type)
    if widths.varied:
        architecture = with_widths(architecture)
    tensors = tensors_of(architecture, config, shards, weight_type, widths)
    tensors += [_factors(name, array) for name, array in rope.tensors.items()]
    context, notes = _context(architecture, config)
    metadata = _metadata(architecture, config, widths, rope, context)
    return _Plan(architecture, metadata | vocabulary.metadata, tensors, (*vocabulary.notes, *rope.notes, *notes))


def carried(
    model_type: str, config: Any, tokenizer: Any, ends: Sequence[int] = ()
) -> tuple[Architecture, Rope, Vocabulary]:
    """Return what a file says of a model beside its weights; `config` may be that of the dense model before it.

    ValueError, with the remedy, for a model that llama.cpp cannot run as transformers does.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"it is a {model_type!r} model, and GGUF is written of {', '.join(ARCHITECTURES.names())}: serve the "
            "folder with transformers or ONNX Runtime"
        )
    architecture = ARCHITECTURES[model_type]
    _require_model(architecture, config)
    rope = rope_of(config, model_type, reads_factors=architecture.rope_factors)
    return architecture, rope, vocabulary_of(tokenizer, config, ends)


def with_widths(architecture: Architecture) -> Architecture:
    """Return the architecture that has a width for each FFN. ValueError, with the remedy, where llama.cpp has none."""
    if architecture.varied is None:
        raise ValueError(
            f"its FFNs have different widths, and llama.cpp reads one width for all layers of a {architecture.name}: "
            "convert again with --width-per-layer same, or run the pipeline with decompose.width_per_layer=same"
        )
    return replace(architecture, name=architecture.varied)


def _ends(config: Any, generation: Any) -> list[int]:
    """Return the tokens that end a text."""
    found = getattr(generation, "eos_token_id", None)
    found = config.eos_token_id if found is None else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _require_model(architecture: Architecture, config: Any) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"its activation is {config.hidden_act!r}, and llama.cpp runs a {architecture.name} with silu: serve the "
            "folder with transformers or ONNX Runtime"
        )
    if architecture.plain_heads and _head_width(config) * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"its heads are {_head_width(config)} wide, and llama.cpp takes hidden_size / num_attention_heads in a "
            f"{architecture.name}: serve the folder with transformers"
        )


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _context(architecture: Architecture, config: Any) -> tuple[int, tuple[str, ...]]:
    """Return the context length, and what limits it: full attention is the model's own up to its sliding window."""
    longest, window = config.max_position_embeddings, architecture.window(config)
    if not window or window >= longest:
        return longest, ()
    return window, (
        f"the context is limited to the sliding window, {window} of {longest} tokens: llama.cpp's {architecture.name} "
        "reads no window, and answers would differ beyond it",
    )


def _metadata(architecture: Architecture, config: Any, widths: Widths, rope: Rope, context: int) -> dict[str, Any]:
    head = _head_width(config)
    own = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": list(widths.layers) if widths.varied else widths.expert,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        **{f"rope.{key}": value for key, value in rope.metadata.items()},
    }
    if architecture.experts is not None:
        own |= {
            "expert_count": getattr(config, architecture.experts),
            "expert_used_count": config.num_experts_per_tok,
        }
        if architecture.width != "intermediate_size":  # another key holds the width of its experts
            own["feed_forward_length"] = config.intermediate_size
    own |= architecture.metadata(config, widths)
    return {f"{architecture.name}.{key}": value for key, value in own.items()}


def _factors(name: str, array: np.ndarray) -> Stored:
    import torch

    return Stored(name, array.shape, gguf.GGMLQuantizationType.F32, lambda: torch.from_numpy(array))


def _write(path: Path, plan: _Plan, weight_type: WeightType, name: str, track: Track) -> None:
    writer = gguf.GGUFWriter(path, plan.architecture.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[weight_type.file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in plan.metadata.items():
            _add(writer, key, value)
        for tensor in plan.tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in track(plan.tensors, len(plan.tensors), "writing tensors"):
            writer.write_tensor_data(tensor.array())
        writer.flush()
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)
