"""Decompose and route a model layer by layer from its safetensors shards: memory is bounded by one layer.

The transformers model is built without weights. Calibration tokens are embedded, and then, layer by layer: its weights
are read, the hidden states pass through it as in the dense model, its FFN is decomposed, its router is fitted to what
the FFN saw, the finished layer is written as a shard, and its memory is given back. A layer's other arguments
(attention masks, rotary embeddings) are those of the model's own forward, which runs once over layers that only record
them.

Finished layers stay on disk, in a folder beside the wanted one, so that a run that was stopped resumes behind them; the
wanted folder appears when it is whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.calls import LayerCall, embed_tokens, run_layers
from ffn2moe.decompose.layer import decompose_layer, require_identity
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.decompose.shards import ShardLayout, UnfinishedCheckpoint
from ffn2moe.decompose.source import Source, layers_path, only_stack, skeleton
from ffn2moe.decompose.stream_weights import read_fisher
from ffn2moe.decompose.widths import widths_for
from ffn2moe.dense.families import positions
from ffn2moe.dense.locate import install, read_ffn
from ffn2moe.dense.weights import weight_files
from ffn2moe.progress import Track, untracked
from ffn2moe.spec import MoESpec

HELD_OUT_SHARE = 8  # of so many calibration batches, one is kept from the routers, to judge them by


@dataclass(frozen=True)
class StreamSettings:
    """What decides the result beside the model and its calibration tokens: a run resumes one with the same settings."""

    spec: MoESpec  # of the mixture that is made
    router: RouterSettings  # its seed is also that of the partitions
    dtype: torch.dtype | None = None  # of the weights that are written; None: as in the source
    widths: MoESpec | None = None  # the same spec with a width for each layer, which the fit of the routers gives
    fishers: Path | None = None  # what `stream_weights.weigh` wrote: the weights that neurons are chosen under

    @property
    def written(self) -> MoESpec:
        """The spec of the checkpoint."""
        return self.widths or self.spec

    def fingerprint(self) -> str:
        """Return the settings as text."""
        content = {
            "spec": self.written.to_dict(),
            "router": asdict(self.router),
            "dtype": str(self.dtype),
            "weighed": self.fishers is not None,
        }
        return json.dumps(content, sort_keys=True)


@torch.no_grad()
def decompose(
    folder: str | Path,
    out: str | Path,
    batches: Sequence[Batch],
    settings: StreamSettings,
    *,
    track: Track = untracked,
) -> list[dict[str, Any]]:
    """Write the model in `folder`, its FFNs as routed mixtures, to `out`; `checkpoint.load` opens it.

    `batches` are the calibration tokens: the routers are fitted to all but one in `HELD_OUT_SHARE`, which judges them.
    Computes in float32; writes routers in float32. Returns a row for each layer: the cost of the partition and of the
    router, and the seconds it took.

    A run that was stopped resumes if it is called with the same source, settings and tokens. ValueError or
    FileNotFoundError with the remedy for a source that cannot be used, damaged weights, a context longer than the
    model's, an `out` that exists, and values beyond the dtype; NotStreamable for a model that only fits in memory.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or name another folder")
    model = skeleton(folder, settings.spec.head)
    _, layers = only_stack(model)
    source = Source(folder, model)
    require_tokens(model.config, batches)
    shards = ShardLayout(model, source, settings.spec, settings.dtype)
    work = UnfinishedCheckpoint(out.with_name(f"{out.name}.partial"), _fingerprint(folder, settings, batches))
    rows, hidden = work.resume(shards)
    _return_memory(first=True)
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # layers that are gone need no keys and values
    calls = embed_tokens(model, source, layers, batches)
    hidden = hidden or calls.hidden
    todo = range(len(rows), len(layers))
    for index in track(todo, len(todo), "decomposing and routing layers"):
        start = time.perf_counter()
        layer, prefix = layers[index], f"{layers_path(model)}{index}."
        layer.load_state_dict({name: source.read(prefix + name) for name in layer.state_dict()}, assign=True)
        row, hidden = _route(model, index, batches, hidden, [found[index] for found in calls.calls], settings)
        work.write(shards.shard(index), shards.stored(prefix, layer.state_dict()))
        layer.to("meta")
        rows.append(row | {"seconds": time.perf_counter() - start})
        work.keep(rows, hidden)
        _return_memory()
    for shard, names in shards.outer.items():
        work.write(shard, shards.stored("", {name: source.read(name, None) for name in names}))
    model.config.use_cache = use_cache
    work.finish(out, model, settings.written, shards, Path(folder))
    return rows


def _route(
    model: Any,
    index: int,
    batches: Sequence[Batch],
    hidden: Sequence[Tensor],
    calls: Sequence[LayerCall],
    settings: StreamSettings,
) -> tuple[dict[str, Any], list[Tensor]]:
    """Replace a layer's FFN by a routed mixture; return its row and the dense hidden states after the layer."""
    stack, layers = only_stack(model)
    layer, spec = layers[index], settings.spec
    after, inputs = run_layers(layer, stack, batches, hidden, calls)
    held_out = max(1, len(batches) // HELD_OUT_SHARE) if len(batches) > 1 else 0
    ffn = read_ffn(model, index)
    layer.get_submodule(stack.install).to("meta")
    fitted_TD = torch.cat(inputs[: len(inputs) - held_out])
    moe = decompose_layer(ffn, fitted_TD, spec, index, seed=settings.router.seed)
    del ffn
    install(model, index, moe)
    require_identity([moe], after[0], lambda: calls[0].run(layer, hidden[0]), name=f"layer {index}", family=spec.family)
    judged_TD = torch.cat(inputs[-held_out:]) if held_out else None
    found = route_layer(
        moe,
        fitted_TD,
        settings.router.for_layer(index),
        partition=spec.partition,
        held_out_TD=judged_TD,
        widths=widths_for(settings.written, index),
        fisher_DD=read_fisher(settings.fishers, index) if settings.fishers else None,
    )
    return {"layer": index, **found.row}, after


def _return_memory(first: bool = False) -> None:
    """Return freed memory to the system, on Linux with glibc, so that a long run grows no larger than a short one.

    Freed blocks of up to 32 MiB would stay in the heap, which their neighbours break up: 12 MiB a layer, measured. From
    the `first` call on, this process takes blocks of 1 MiB and more from the system and returns them at once.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        if first:
            m_mmap_threshold = -3
            libc.mallopt(m_mmap_threshold, 2**20)
        libc.malloc_trim(0)


def require_tokens(config: Any, batches: Sequence[Batch]) -> None:
    """Raise ValueError for texts longer than the model's context, and for tokens that it does not know."""
    limit, vocabulary = positions(config), config.get_text_config().vocab_size
    if not batches:
        raise ValueError("there are no calibration tokens: give more text")
    for batch in batches:
        ids_BL = batch.inputs["input_ids"]
        if limit is not None and ids_BL.shape[1] > limit:
            raise ValueError(
                f"texts of {ids_BL.shape[1]} tokens are longer than the model's context, {limit} tokens: lower the "
                "length"
            )
        if ids_BL.max() >= vocabulary:
            raise ValueError(
                f"the texts hold token {int(ids_BL.max())} and the model knows {vocabulary}: the tokenizer belongs to "
                "another model"
            )


def _fingerprint(folder: str | Path, settings: StreamSettings, batches: Sequence[Batch]) -> str:
    """Return what names a run: its settings, its tokens, and the source's files by size and time."""
    digest = hashlib.sha256(settings.fingerprint().encode())
    for path in [Path(folder) / "config.json", *sorted(set(weight_files(folder).values()))]:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()):
            digest.update(f"{name} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
