"""Write a container folder in shards."""

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

from ffn2moe.containers.audit import audit
from ffn2moe.containers.shards import Shards
from ffn2moe.containers.table import CONTAINERS, DTYPES, Container, container_named
from ffn2moe.containers.tensors import layer_tensors, native_config, outer_tensors
from ffn2moe.dense.load import require_representable
from ffn2moe.moe.checkpoint import FORMAT, SPEC_FILE, copy_assets, load_spec
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.spec import MoESpec

SHARD_BYTES = 5 * 2**30


class _ShardWriter:
    """Tensors into numbered shards, no more than one of which is in memory."""

    def __init__(self, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total_bytes = self.shards = 0
        self.shard_of: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.shard_of or name in self.held:
            raise ValueError(f"{name} is written twice: the source holds it twice, or a layer was given twice")
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else self.dtype
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
        """Write what is left, give the shards their names and, where there are several, an index."""
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
    """Write a container from tensors that arrive piece by piece; memory is bounded by a shard and a piece.

    `config` is that of the dense model; `pieces` are what `layer_tensors` and `outer_tensors` give, in any order.
    `assets` is the dense model's folder, from which tokenizer, chat template, generation config and licence are
    copied; without it a `tokenizer` saves itself. Everything is written to a hidden folder beside `folder`, audited,
    and renamed at the end: a folder of that name is whole. ValueError if the container cannot hold the model, the
    folder is taken, a tensor overflows the dtype, or the audit fails.
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
        shards = _ShardWriter(partial, dtype, shard_bytes)
        for piece in pieces:
            for name, tensor in piece.items():
                shards.add(name, tensor)
        shards.finish()
        _write_config(partial, container, native, dtype)
        _write_assets(partial, native, assets, tokenizer)
        described = {"format": FORMAT, "container": container.name, "spec": spec.to_dict()}
        (partial / SPEC_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
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
    """Write a student, a causal model whose FFNs are mixtures, as the container that its spec names."""
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
    """Write a checkpoint of this project as the container that its spec names, one layer in memory at a time."""
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
        raise ValueError("the spec names no container: it is chosen before distillation, as it fixes the gate formula")
    return container_named(spec.container)


def _write_config(folder: Path, container: Container, native: Any, dtype: torch.dtype) -> None:
    native.dtype = dtype
    native.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    # transformers 4, which engines still build on, looks for these under their old names, and would silently take
    # its own defaults (theta 10,000 or 1,000,000) for what it does not find. transformers 5 reads both.
    rope = values["rope_parameters"]
    values |= {"rope_theta": rope["rope_theta"], "torch_dtype": values["dtype"]}
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        values["rope_scaling"] = rope
    if container.name == "qwen3_moe":
        values["num_experts"] = values["num_local_experts"]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_assets(folder: Path, native: Any, assets: str | Path | None, tokenizer: Any) -> None:
    from transformers import GenerationConfig

    if assets is not None:
        copy_assets(assets, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(native).save_pretrained(folder)
