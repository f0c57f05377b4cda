"""Write the folder of a container: shards, config, tokenizer and licence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.containers.checks import audit
from ffn2moe.containers.container import Container
from ffn2moe.containers.shards import DTYPES, Shards, ShardWriter
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.containers.tensors import layer_tensors, native_config, outer_tensors
from ffn2moe.moe.checkpoint import FORMAT, SPEC_FILE, copy_assets, load_spec
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.spec import MoESpec

SHARD_BYTES = 5 * 2**30


def write(
    folder: str | Path,
    container: Container,
    spec: MoESpec,
    config: Any,
    pieces: Iterable[Mapping[str, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    assets: str | Path | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a container from tensors that arrive piece by piece; memory holds one shard and one piece.

    `config` is the dense model's; `pieces` come from `layer_tensors` and `outer_tensors`, in any order. `assets` is the
    dense model's folder: its tokenizer, chat template, generation config and licence are copied; without `assets` the
    `tokenizer` is saved. Everything is written to a hidden folder beside `folder`, audited and renamed at the end, so
    that a folder of that name is whole. ValueError if the container cannot hold the model, the folder is taken, a
    tensor overflows the dtype, or the audit fails.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"containers are written in float32, bfloat16 or float16, not in {dtype}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: remove it, or name another")
    native = native_config(container, config, spec)
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards = ShardWriter(partial, dtype, shard_bytes, float32_suffix=container.choice_bias)
        for piece in pieces:
            for name, tensor in piece.items():
                shards.add(name, tensor)
        shards.finish()
        _write_config(partial, container, native, dtype)
        _write_assets(partial, native, assets, tokenizer)
        summary = {"format": FORMAT, "container": container.name, "spec": spec.to_dict()}
        (partial / SPEC_FILE).write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")
        audit(partial)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def save(
    model: nn.Module,
    spec: MoESpec,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    assets: str | Path | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a student, a causal model whose FFNs are mixtures, as the container that its spec names.

    The other arguments and the errors are those of `write`.
    """
    container = _container_of(spec)
    layers = moe_layers(model)
    if len(layers) != spec.num_layers:
        raise ValueError(f"the model has {len(layers)} mixtures, its spec {spec.num_layers}")
    pieces = chain(
        outer_tensors(container, model.config, model.state_dict()),
        (layer_tensors(container, spec, layer, moe) for layer, moe in enumerate(layers)),
    )
    options: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes, "assets": assets, "tokenizer": tokenizer}
    return write(folder, container, spec, model.config, pieces, **options)


def save_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint of this project as the container that its spec names, with one layer in memory at a time."""
    from transformers import AutoConfig

    spec = load_spec(checkpoint)
    container = _container_of(spec)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if config.model_type in CONTAINERS:
        raise ValueError(f"{checkpoint} is a {config.model_type} container already: copy it")
    source = Shards(checkpoint)

    def mixtures() -> Iterator[dict[str, Tensor]]:
        for layer in range(spec.num_layers):
            prefix = f"model.layers.{layer}.mlp."
            held = {name.removeprefix(prefix): source[name] for name in source if name.startswith(prefix)}
            moe = MoEFFN(spec, layer, b_in="b_in" in held, b_out="b_out" in held, b_gate="b_gate" in held)
            moe.load_state_dict(held)
            yield layer_tensors(container, spec, layer, moe)

    pieces = chain(outer_tensors(container, config, source), mixtures())
    return write(folder, container, spec, config, pieces, dtype=dtype, shard_bytes=shard_bytes, assets=checkpoint)


def _container_of(spec: MoESpec) -> Container:
    if spec.container is None:
        raise ValueError(
            "the spec names no container: decompose with a container, which fixes the gate formula for distillation"
        )
    return CONTAINERS[spec.container]


def _write_config(folder: Path, container: Container, native: Any, dtype: torch.dtype) -> None:
    native.dtype = dtype
    native.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    # Engines still build on transformers 4, which reads these under their old names and silently uses its own defaults
    # (theta 10,000 or 1,000,000) where it does not find them. transformers 5 reads both.
    rope = values["rope_parameters"]
    values |= {"rope_theta": rope["rope_theta"], "torch_dtype": values["dtype"]}
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        values["rope_scaling"] = rope
    values |= {old: values[new] for old, new in container.old_keys.items()}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_assets(folder: Path, native: Any, assets: str | Path | None, tokenizer: Any) -> None:
    from transformers import GenerationConfig

    if assets is not None:
        copy_assets(assets, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(native).save_pretrained(folder)
