"""Write a checkpoint a layer at a time, and read one a layer at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn2moe.decompose.source import BIG_TENSOR, LARGEST_FLOAT16, Source, layers_path, only_stack, skeleton
from ffn2moe.dense.locate import ffn_paths
from ffn2moe.dense.sentence import NAME
from ffn2moe.dense.sentence_folder import read_sentence_folder
from ffn2moe.dense.weights import weight_files
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec

_PROGRESS, _STATES, _SENTENCE = "progress.json", "states.safetensors", "model-sentence.safetensors"


class ShardLayout:
    """Which tensors go into which shard, and in which dtype: a shard a layer, then those outside the layers."""

    def __init__(self, model: Any, source: Source, spec: MoESpec, dtype: torch.dtype | None) -> None:
        self.dtype, self.path = dtype, layers_path(model)
        state = model.state_dict()
        self.source_dtype = {name: source.layout(name)[1] for name in state}
        stack, _ = only_stack(model)
        layers = range(spec.num_layers)
        self.ffn_dtype = [self.source_dtype[f"{self.path}{index}.{stack.w_in}.weight"] for index in layers]
        groups: list[list[str]] = [[]]
        for name in state:
            if name.startswith(self.path) or name in source.aliases:
                continue
            if source.bytes_of(name, dtype) >= BIG_TENSOR:
                groups.append([name])
            else:
                groups[0].append(name)
        groups = [group for group in groups if group]
        self.total = spec.num_layers + len(groups)
        self.outer = {self.shard(spec.num_layers + index): group for index, group in enumerate(groups)}

    def shard(self, index: int) -> str:
        """Return the file name of a shard; the first ones are the layers'."""
        return f"model-{index + 1:05d}-of-{self.total:05d}.safetensors"

    def stored(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors as they are written, by their full names: weights in the wanted dtype, routers in float32.

        ValueError for a value that the dtype cannot hold.
        """
        written = {}
        for key, tensor in tensors.items():
            name = prefix + key
            if tensor.is_floating_point() and not (".router." in name or name.endswith(".output_scale")):
                dtype = self.dtype or self._own_dtype(name)
                if dtype == torch.float16 and tensor.abs().max() > LARGEST_FLOAT16:
                    raise ValueError(
                        f"{name} reaches {tensor.abs().max():.3g}, and float16 ends at {LARGEST_FLOAT16:.0f}: "
                        "write bfloat16 or float32"
                    )
                tensor = tensor.to(dtype)
            written[name] = tensor.detach().contiguous()
        return written

    def _own_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the source; a mixture has that of the layer's FFN."""
        layer = name.removeprefix(self.path).split(".")[0]
        return self.source_dtype[name] if name in self.source_dtype else self.ffn_dtype[int(layer)]


class UnfinishedCheckpoint:
    """The folder of a checkpoint that is not whole: its shards, the last hidden states, and a row a layer."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def resume(self, shards: ShardLayout) -> tuple[list[dict[str, Any]], list[Tensor]]:
        """Return the rows of the finished layers and the hidden states after them.

        Where the folder belongs to another run, empty it and return nothing.
        """
        found = checkpoint.load_progress(self.folder / _STATES, fingerprint=self.fingerprint)
        if found is not None:
            step, tensors = found
            rows = json.loads((self.folder / _PROGRESS).read_text())[:step]
            if len(rows) == step and all((self.folder / shards.shard(index)).is_file() for index in range(step)):
                return rows, [tensors[f"hidden.{index}"] for index in range(len(tensors))]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return [], []

    def write(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """Write a shard, whole or not at all."""
        from safetensors.torch import save_file

        fresh = self.folder / f"{shard}.fresh"
        save_file(tensors, fresh, metadata={"format": "pt"})
        _sync(fresh)
        os.replace(fresh, self.folder / shard)

    def keep(self, rows: list[dict[str, Any]], hidden: Sequence[Tensor]) -> None:
        """Record the finished layers: a run that is stopped after this resumes behind them."""
        fresh = self.folder / f"{_PROGRESS}.fresh"
        fresh.write_text(json.dumps(rows))
        _sync(fresh)
        os.replace(fresh, self.folder / _PROGRESS)
        states = {f"hidden.{index}": tensor for index, tensor in enumerate(hidden)}
        checkpoint.save_progress(self.folder / _STATES, states, step=len(rows), fingerprint=self.fingerprint)

    def finish(self, out: Path, model: Any, spec: MoESpec, shards: ShardLayout, source: Path) -> None:
        """Write the modules that make embeddings, index, config and tokenizer; then give the folder the name `out`."""
        names = [shards.shard(index) for index in range(shards.total)]
        encoder = read_sentence_folder(source) if spec.sentence is not None else None
        held = encoder.module.state_dict() if encoder else {}
        tensors = {f"{NAME}.{name}": tensor for name, tensor in held.items()}
        if tensors:
            self.write(_SENTENCE, tensors)
            names.append(_SENTENCE)
        content = self._index(names)
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
        checkpoint.describe(model, spec, self.folder)
        checkpoint.copy_assets(source, self.folder)
        for name in (_PROGRESS, _STATES):
            (self.folder / name).unlink(missing_ok=True)
        os.replace(self.folder, out)

    def _index(self, shards: Sequence[str]) -> dict[str, Any]:
        """Return which shard holds which tensor, and the bytes of all."""
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        total = 0
        for shard in shards:
            with safe_open(self.folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    weight_map[name] = shard
            with open(self.folder / shard, "rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
            total += (self.folder / shard).stat().st_size - 8 - header
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def mixtures(folder: str | Path) -> Iterator[MoEFFN]:
    """Yield the mixtures of a checkpoint in order, in float32; each is read when it is asked for."""
    spec = checkpoint.load_spec(folder)
    files = weight_files(folder)
    for index, path in enumerate(ffn_paths(skeleton(folder, spec.head))):
        tensors = {name.removeprefix(f"{path}."): tensor for name, tensor in _named(files, f"{path}.")}
        biases = {name: name in tensors for name in ("b_in", "b_out", "b_gate")}
        moe = MoEFFN(spec, index, **biases)
        moe.load_state_dict(tensors)
        yield moe.eval()


def outside(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a checkpoint that belong to no mixture, a shard at a time."""
    paths = tuple(f"{path}." for path in ffn_paths(skeleton(folder, checkpoint.load_spec(folder).head)))
    return ((name, tensor) for name, tensor in _named(weight_files(folder), "") if not name.startswith(paths))


def _named(files: dict[str, Path], prefix: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in sorted({path for name, path in files.items() if name.startswith(prefix)}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    yield name, file.get_tensor(name).clone()


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
