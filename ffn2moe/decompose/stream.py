"""Decompose and route a model layer by layer from its safetensors shards: memory is bounded by one layer.

The transformers model is built without weights. Calibration tokens are embedded, and then, layer by layer: its weights
are read, the hidden states go through it as the dense model sends them, its FFN is decomposed and its router fitted on
what the FFN saw, the finished layer is written as a shard, and its memory is given back. A layer's other arguments
(attention masks, rotary embeddings) are those that the model's own forward gives it: it is run once over layers that
do nothing but note them down.

What is finished stays on disk, in a folder beside the wanted one, so that a run that was stopped goes on where it was;
the wanted folder appears when it is whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.calls import LayerCall, embed_tokens, run_layers
from ffn2moe.decompose.layer import decompose_layer, every_expert
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.decompose.source import BIG_TENSOR, LARGEST_FLOAT16, Source, layers_path, only_stack, skeleton
from ffn2moe.dense.config import head_of, positions
from ffn2moe.dense.locate import ffn_paths, install, read_ffn
from ffn2moe.dense.weights import weight_files
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import Gate, Head, MoESpec, Pooling

IDENTITY_TOLERANCE = 1e-5  # of a layer's output with K = E, relative to its largest value
HELD_OUT_SHARE = 8  # of so many calibration batches, one is kept from the routers, to judge them by
_PROGRESS, _STATES = "progress.json", "states.safetensors"

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@torch.no_grad()
def decompose(
    folder: str | Path,
    out: str | Path,
    batches: Sequence[Batch],
    *,
    num_experts: int,
    num_active: int,
    max_length: int,
    teacher: str,
    head: Head | None = None,
    pooling: Pooling | None = None,
    partition: str = "coactivation",
    shared_width: int = 0,
    gate: Gate = "unit",
    router_bias: bool = True,
    container: str | None = None,
    width_multiple: int = 1,
    ridge: float = 1e-2,
    router_steps: int = 200,
    router_batch_tokens: int = 1024,
    learning_rate: float = 1e-2,
    refit: float = 1e-2,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    track: Track | None = None,
) -> list[dict[str, Any]]:
    """Write the model in `folder`, its FFNs as routed mixtures, to `out`; `checkpoint.load` opens it.

    `batches` are the calibration tokens: the routers are fitted on them, and judged on the one in `HELD_OUT_SHARE`
    that they are not fitted on; `refit` is the penalty of ffn2moe.decompose.reconstruct, 0 leaves that out. Computes in
    float32; writes weights in `dtype` (None: as the source has them) and routers in float32. Returns a row for each
    layer: what the partition and the router cost, and the seconds it took.

    A run that was stopped goes on at the layer where it was, if it is called with the same source and settings.
    ValueError or FileNotFoundError with the remedy for a source that cannot be used, damaged weights, a context longer
    than the model's, an `out` that exists, and values beyond `dtype`.
    """
    settings = {key: value for key, value in locals().items() if key not in ("folder", "out", "batches", "track")}
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or name another folder")
    model = skeleton(folder, head)
    stack, layers = only_stack(model)
    source = Source(folder, model)
    require_tokens(model.config, batches)
    spec = spec_of(
        model,
        head=head or head_of(model.config),
        num_experts=num_experts,
        num_active=num_active,
        partition=partition,
        teacher=teacher,
        max_length=max_length,
        shared_width=shared_width,
        gate=gate,
        router_bias=router_bias,
        container=container,
        width_multiple=width_multiple,
        pooling=pooling,
    )
    plan = _Plan(model, source, spec, dtype)
    work = _Work(out.with_name(f"{out.name}.partial"), _fingerprint(folder, settings, batches))
    rows, hidden = work.resume(plan)
    _give_memory_back(first=True)
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # the keys and values of layers that are gone are of no use
    calls = embed_tokens(model, source, layers, batches)
    hidden = hidden or calls.hidden
    held_out = max(1, len(batches) // HELD_OUT_SHARE) if len(batches) > 1 else 0
    router = RouterSettings(
        steps=router_steps,
        batch_tokens=router_batch_tokens,
        seed=seed,
        learning_rate=learning_rate,
        ridge=ridge,
        refit=refit,
    )
    todo = range(len(rows), len(layers))
    for index in track(todo, len(todo), "decomposing and routing layers") if track else todo:
        start = time.perf_counter()
        layer = layers[index]
        prefix = f"{layers_path(model)}{index}."
        layer.load_state_dict({name: source.read(prefix + name) for name in layer.state_dict()}, assign=True)
        after, inputs = run_layers(layer, stack, batches, hidden, [batch_calls[index] for batch_calls in calls.calls])
        ffn = read_ffn(model, index)
        layer.get_submodule(stack.install).to("meta")
        fitted = torch.cat(inputs[: len(inputs) - held_out])
        moe = decompose_layer(ffn, fitted, spec, index, seed=seed)
        del ffn
        install(model, index, moe)
        _require_identity(layer, moe, calls.calls[0][index], hidden[0], after[0], index, spec)
        judged = torch.cat(inputs[-held_out:]) if held_out else None
        row = {"layer": index, **route_layer(moe, fitted, router.for_layer(index), held_out_TD=judged).row}
        work.write(plan.shard_of_layer(index), plan.stored(prefix, layer.state_dict()))
        hidden = after
        layer.to("meta")
        del moe, inputs, fitted, judged, after
        rows.append(row | {"seconds": time.perf_counter() - start})
        work.keep(rows, hidden)
        _give_memory_back()
    for shard, names in plan.outer.items():
        work.write(shard, plan.stored("", {name: source.read(name, None) for name in names}))
    model.config.use_cache = use_cache
    work.finish(out, model, spec, plan, Path(folder))
    return rows


def _give_memory_back(first: bool = False) -> None:
    """Linux with glibc: what is freed goes back to the system, so that a long run grows no larger than a short one.

    Freed blocks of up to 32 MiB would stay in the heap, which their neighbours break up: 12 MiB a layer, measured. From
    the `first` call on, this process takes blocks of 1 MiB and more from the system and gives them back at once.
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
    """ValueError for texts that are longer than the model's context, and for tokens that it does not know."""
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


def _require_identity(
    layer: nn.Module, moe: MoEFFN, call: LayerCall, hidden: Tensor, dense: Tensor, index: int, spec: MoESpec
) -> None:
    """ValueError unless the layer with all its experts gives what it gave with its dense FFN."""
    with torch.no_grad(), every_expert([moe]):
        difference = (call.run(layer, hidden) - dense).abs().max().item() / max(1.0, dense.abs().max().item())
    if not difference <= IDENTITY_TOLERANCE:
        raise ValueError(
            f"with all experts active layer {index} differs from the dense one by {difference:.1e}, more than "
            f"{IDENTITY_TOLERANCE:.0e}: the model computes its FFNs in another way than the family {spec.family!r} "
            "says, so its experts would be wrong"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is written


class _Plan:
    """Which tensors go into which shard, and in which dtype."""

    def __init__(self, model: Any, source: Source, spec: MoESpec, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        path = layers_path(model)
        state = model.state_dict()
        self.source_dtype = {name: source.layout(name)[1] for name in state}
        stack, _ = only_stack(model)
        self.ffn_dtype = [self.source_dtype[f"{path}{index}.{stack.w_in}.weight"] for index in range(spec.num_layers)]
        groups: list[list[str]] = [[]]
        for name in state:
            if name.startswith(path) or name in source.aliases:
                continue
            if source.bytes_of(name, dtype) >= BIG_TENSOR:
                groups.append([name])
            else:
                groups[0].append(name)
        groups = [group for group in groups if group]
        self.layers, self.total = spec.num_layers, spec.num_layers + len(groups)
        self.outer = {self._shard(spec.num_layers + index): group for index, group in enumerate(groups)}
        self.path = path

    def _shard(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.total:05d}.safetensors"

    def shard_of_layer(self, index: int) -> str:
        return self._shard(index)

    def stored(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are written, by their full names: weights in the wanted dtype, routing in float32.

        ValueError for a value that the dtype cannot hold.
        """
        written = {}
        for key, tensor in tensors.items():
            name = prefix + key
            if tensor.is_floating_point() and not (".router." in name or name.endswith(".output_scale")):
                own = self.source_dtype.get(name)
                if own is None:  # of a mixture
                    own = self.ffn_dtype[int(name.removeprefix(self.path).split(".")[0])]
                dtype = self.dtype or own
                if dtype == torch.float16 and tensor.abs().max() > LARGEST_FLOAT16:
                    raise ValueError(
                        f"{name} reaches {tensor.abs().max():.3g}, and float16 ends at {LARGEST_FLOAT16:.0f}: "
                        "write bfloat16 or float32"
                    )
                tensor = tensor.to(dtype)
            written[name] = tensor.detach().contiguous()
        return written


class _Work:
    """The unfinished folder: finished shards, the calibration states after the last of them, and its rows."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def resume(self, plan: _Plan) -> tuple[list[dict[str, Any]], list[Tensor]]:
        """The rows of the finished layers and the hidden states after them; nothing where another run began here."""
        found = checkpoint.load_progress(self.folder / _STATES, fingerprint=self.fingerprint)
        if found is not None:
            step, tensors = found
            rows = json.loads((self.folder / _PROGRESS).read_text())[:step]
            if len(rows) == step and all((self.folder / plan.shard_of_layer(i)).is_file() for i in range(step)):
                return rows, [tensors[f"hidden.{index}"] for index in range(len(tensors))]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return [], []

    def write(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """A shard, in one piece."""
        from safetensors.torch import save_file

        fresh = self.folder / f"{shard}.fresh"
        save_file(tensors, fresh, metadata={"format": "pt"})
        _settle(fresh)
        os.replace(fresh, self.folder / shard)

    def keep(self, rows: list[dict[str, Any]], hidden: Sequence[Tensor]) -> None:
        """So far: whoever stops the run now loses nothing."""
        fresh = self.folder / f"{_PROGRESS}.fresh"
        fresh.write_text(json.dumps(rows))
        _settle(fresh)
        os.replace(fresh, self.folder / _PROGRESS)
        states = {f"hidden.{index}": tensor for index, tensor in enumerate(hidden)}
        checkpoint.save_progress(self.folder / _STATES, states, step=len(rows), fingerprint=self.fingerprint)

    def finish(self, out: Path, model: Any, spec: MoESpec, plan: _Plan, source: Path) -> None:
        """Index, config and tokenizer; then the folder gets its name."""
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        total = 0
        for index in range(plan.total):
            shard = plan._shard(index)
            with safe_open(self.folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    weight_map[name] = shard
            with open(self.folder / shard, "rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
            total += (self.folder / shard).stat().st_size - 8 - header
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
        checkpoint.describe(model, spec, self.folder)
        checkpoint.copy_assets(source, self.folder)
        for name in (_PROGRESS, _STATES):
            (self.folder / name).unlink(missing_ok=True)
        os.replace(self.folder, out)


def mixtures(folder: str | Path) -> Iterator[MoEFFN]:
    """The mixtures of a checkpoint in order, float32, each read when it is asked for."""
    spec = checkpoint.load_spec(folder)
    files = weight_files(folder)
    for index, path in enumerate(ffn_paths(skeleton(folder, spec.head))):
        tensors = {name.removeprefix(f"{path}."): tensor for name, tensor in _named(files, f"{path}.")}
        moe = MoEFFN(
            spec,
            index,
            b_in="b_in" in tensors,
            b_out="b_out" in tensors,
            b_gate="b_gate" in tensors,
        )
        moe.load_state_dict(tensors)
        yield moe.eval()


def outside(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint that are no mixture's, with their names, a shard at a time."""
    paths = tuple(f"{path}." for path in ffn_paths(skeleton(folder, checkpoint.load_spec(folder).head)))
    return ((name, tensor) for name, tensor in _named(weight_files(folder), "") if not name.startswith(paths))


def _named(files: dict[str, Path], prefix: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in sorted({path for name, path in files.items() if name.startswith(prefix)}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    yield name, file.get_tensor(name).clone()


def _settle(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _fingerprint(folder: str | Path, settings: dict[str, Any], batches: Sequence[Batch]) -> str:
    """Names this very run: its settings, its tokens, and the source's files by size and time."""
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
    for path in [Path(folder) / "config.json", *sorted(set(weight_files(folder).values()))]:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()):
            digest.update(f"{name} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
