"""Decompose and route a model layer by layer from its safetensors shards: memory is bounded by one layer.

The transformers model is built without weights. Calibration tokens are embedded, and then, layer by layer: its weights
are read, the hidden states go through it as the dense model sends them, its FFN is carved and its router fitted on
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe import checkpoint, oracle
from ffn2moe.dense import (
    FAMILIES,
    Stack,
    auto_class,
    family_of,
    ffn_paths,
    head_of,
    install,
    positions,
    read_ffn,
    stacks_of,
    weight_files,
)
from ffn2moe.factorise import carve, chunk_of, every_expert, fit_router, outputs, real_tokens
from ffn2moe.moe import MoEFFN, spec_of
from ffn2moe.reconstruct import refit_outputs
from ffn2moe.spec import FFNShape, Gate, Head, MoESpec, Pooling
from ffn2moe.train import Batch

IDENTITY_TOLERANCE = 1e-5  # of a layer's output with K = E, relative to its largest value
HELD_OUT_SHARE = 8  # of so many calibration batches, one is kept from the routers, to judge them by
BIG_TENSOR = 64 * 2**20  # bytes of a tensor outside the layers that gets a shard of its own
LARGEST_FLOAT16 = 65504.0
OVERHEAD = 2**28  # bytes: what is imported on the way, and what allocators and kernels keep (measured)
_PROGRESS, _STATES = "progress.json", "states.safetensors"

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


class NotStreamable(ValueError):
    """This model cannot be worked through layer by layer, though it may be in memory."""


# ---------------------------------------------------------------------------------------------------------------------
# The model without its weights, and the weights by their names in it


def skeleton(folder: str | Path, head: Head | None = None) -> Any:
    """The transformers model of a folder on the meta device, in eval mode; what it computes itself is there.

    ValueError where its type is unknown to transformers.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    head = head or head_of(config)
    family = FAMILIES.get(config.model_type)
    name = auto_class(head, family.reads if family else "text", family)
    with torch.device("meta"):
        model = getattr(transformers, name).from_config(
            config, dtype=torch.float32, **(family.options_for(head) if family else {})
        )
    for module in model.modules():
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers[key]
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()  # parameters are on the meta device, where this does nothing: it fills the buffers
    return model.eval()


def only_stack(model: Any) -> tuple[Stack, nn.ModuleList]:
    """The one stack of layers of a model. ValueError where there are several: what passes between them is unknown."""
    found = stacks_of(model)
    if len(found) != 1:
        raise NotStreamable(
            f"{family_of(model).name} models have {len(found)} stacks of layers, and only models of one are decomposed "
            "layer by layer: convert this one in memory"
        )
    return found[0]


def layers_path(model: Any) -> str:
    """The full name of the stack's list of layers in the model, with a dot at the end."""
    _, layers = only_stack(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


class Source:
    """The weights of a folder, by their names in the model that transformers makes of it; read when asked for.

    FileNotFoundError for a missing shard; ValueError for tensors that are missing, doubled or of another shape, and
    for names that transformers would merge or split.
    """

    def __init__(self, folder: str | Path, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        self.folder = Path(folder)
        wanted = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
        self.place: dict[str, tuple[Path, str]] = {}
        for source, path in weight_files(folder).items():
            name, converted = rename_source_key(source, renamings, converters, model.base_model_prefix, wanted)
            if converted is not None:
                raise NotStreamable(
                    f"transformers makes the tensor {name} of others (such as {source}), which is not done layer by "
                    "layer: convert this model in memory"
                )
            if name in self.place:
                raise ValueError(f"{folder} holds {name} twice, as {self.place[name][1]} and as {source}: remove one")
            if name in wanted:
                self.place[name] = path, source
        self.aliases = checkpoint.tied(model)
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
        for name in wanted:
            shape, _ = self.layout(name)
            if shape != tuple(wanted[name].shape):
                raise ValueError(
                    f"{name} in {self.folder} is {list(shape)}, and by config.json {list(wanted[name].shape)}: "
                    "they belong to different models"
                )

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, from its file's header."""
        from safetensors import safe_open
        from safetensors.torch import _TYPES

        path, source = self.place[name]
        with safe_open(path, framework="pt") as file:
            view = file.get_slice(source)
            return tuple(view.get_shape()), _TYPES[view.get_dtype()]

    def read(self, name: str, dtype: torch.dtype | None = torch.float32, rows: Tensor | None = None) -> Tensor:
        """A copy of a tensor (None: in the dtype it has), or one in which only these rows are filled in.

        Rows that are not filled cost no memory until they are touched. The file is mapped no longer than this takes.
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
            raise ValueError(f"{path} cannot be read ({error}): fetch it again") from error
        if checked.is_floating_point() and not torch.isfinite(checked).all():
            raise ValueError(f"{self.folder} has NaN or infinite values in {name}: the weights are damaged")
        return tensor

    def bytes_of(self, name: str, dtype: torch.dtype | None) -> int:
        """What a tensor takes in this dtype (None: in the one it has)."""
        shape, own = self.layout(name)
        return torch.Size(shape).numel() * (dtype or own).itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Before the work: what it will take


@dataclass(frozen=True)
class Estimate:
    """What a run will take, in bytes, from config and headers alone; memory is that of the whole process."""

    layers: int
    layer: int  # one layer's weights, float32
    states: int  # the calibration states
    memory: int
    disk: int

    def __str__(self) -> str:
        gib = 2**30
        return (
            f"{self.memory / gib:.1f} GiB of memory ({self.layer / gib:.2f} for the weights of a layer and "
            f"{self.states / gib:.2f} for calibration states; the number of layers, {self.layers}, adds nothing) "
            f"and {self.disk / gib:.1f} GiB of disk"
        )


def estimate(
    folder: str | Path,
    *,
    num_experts: int,
    calibration_tokens: int,
    batch_tokens: int,
    shared_width: int = 0,
    dtype: torch.dtype | None = None,
    copies: int = 1,
) -> Estimate:
    """What decomposing the model in `folder` will take; no weight is read.

    `calibration_tokens` go through a layer in batches of `batch_tokens`; `dtype` is what is written (None: what the
    source has); `copies` is how many forms of the model are written, such as a container beside the checkpoint. The
    errors are those of `Source`.
    """
    model = skeleton(folder)
    path = layers_path(model)
    source = Source(folder, model)
    spec = spec_of(
        model,
        head=head_of(model.config),
        num_experts=num_experts,
        num_active=1,
        partition="coactivation",
        teacher="",
        max_length=1,
        shared_width=shared_width,
    )
    shape = spec.stacks[0]
    layer = sum(source.bytes_of(name, torch.float32) for name in model.state_dict() if name.startswith(f"{path}0."))
    written = sum(source.bytes_of(name, dtype) for name in model.state_dict() if name not in source.aliases)
    padded = (shape.shared_width + num_experts * shape.expert_width) / shape.ffn_width
    states = 4 * 3 * shape.width * calibration_tokens
    return Estimate(
        layers=shape.num_layers,
        layer=layer,
        states=states,
        memory=_resident() + OVERHEAD + states + layer + _work(shape, num_experts, calibration_tokens, batch_tokens),
        disk=int(copies * written * padded) + states,
    )


def _work(shape: FFNShape, num_experts: int, calibration_tokens: int, batch_tokens: int) -> int:
    """The most that a layer's steps take beside its weights and the calibration states, in bytes."""
    from ffn2moe.activations import MOST_KEPT_TOKENS, WIDEST_MOMENTS

    D, F = shape.width, shape.ffn_width
    ffn = 4 * (3 if shape.gated else 2) * D * F
    forward = 4 * batch_tokens * (4 * F + 8 * D)
    wide = F > WIDEST_MOMENTS
    statistics = 2 * min(calibration_tokens, MOST_KEPT_TOKENS) * F if wide else 5 * 8 * F * F
    dividing = 4 * 4 * chunk_of(F) * F + statistics
    slicing = 3 * ffn  # the dense weights, their slices, the mixture's
    outputs = 4 * 3 * chunk_of(num_experts * D) * num_experts * D
    fitting = ffn + max(outputs, 4 * 6 * calibration_tokens * D)
    # In float64: H'H and its factor; what is solved for and its copies. In float32: activations, tokens and outputs.
    refitting = 2 * 8 * F * F + 4 * 8 * F * D + 2 * 4 * chunk_of(F) * F + 4 * 3 * calibration_tokens * D
    return max(forward, ffn + dividing, slicing, fitting, refitting)


def _resident() -> int:
    """Memory of this process now, in bytes; half a GiB where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 2**29
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int | None:
    """Memory that can still be had without swapping, in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_room(found: Estimate, out: str | Path) -> str | None:
    """ValueError, with the numbers, where the disk of `out` is too small; a warning where memory may be, else None."""
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    free, gib = shutil.disk_usage(folder).free, 2**30
    if found.disk > free:
        raise ValueError(
            f"this takes about {found.disk / gib:.1f} GiB of disk, and {folder} has {free / gib:.1f} GiB left: "
            "make room, or name a folder on another disk"
        )
    available = available_memory()
    if available is not None and found.memory - _resident() > available:
        return (
            f"this takes about {found.memory / gib:.1f} GiB of memory, and {available / gib:.1f} GiB are available: "
            "it may be stopped by the system, or swap; fewer calibration tokens need less"
        )
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The work


@dataclass
class _Call:
    """How the model calls one layer on one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Unusable(Exception):
    """The layers of this model give something else than was tried."""


def record_calls(model: Any, layers: nn.ModuleList, batch: Batch) -> tuple[Tensor, list[_Call]]:
    """What the model sends into its first layer for a batch, and how it calls each layer; no layer is computed.

    Whatever is outside the layers must be there. ValueError where the model does more between its layers than to pass
    hidden states on.
    """
    for rest in (None, (), (None,)):  # what the layers of this model return: a tensor, or a tuple that begins with it
        try:
            return _record_calls(model, layers, batch, rest)
        except (_Unusable, TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise NotStreamable(
        f"{type(model).__name__} does not just pass hidden states from layer to layer ({reason}), so it is not "
        "decomposed layer by layer: convert it in memory"
    )


def _record_calls(
    model: Any, layers: nn.ModuleList, batch: Batch, rest: tuple[None, ...] | None
) -> tuple[Tensor, list[_Call]]:
    seen: list[Tensor] = []
    calls: list[_Call] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if seen and hidden.shape != seen[0].shape:
            raise _Unusable("a layer got a tensor of another shape than the first one did")
        seen.append(hidden)
        calls.append(_Call(args[1:], kwargs))
        return hidden if rest is None else (hidden, *rest)

    for layer in layers:
        layer.forward = forward
    try:
        model.base_model(**batch.inputs)
    finally:
        for layer in layers:
            del layer.forward
    if len(calls) != len(layers):
        raise _Unusable(f"{len(calls)} of {len(layers)} layers were called")
    return seen[0], calls


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
    that they are not fitted on; `refit` is the penalty of ffn2moe.reconstruct, 0 leaves that out. Computes in float32;
    writes weights in `dtype` (None: as the source has them) and routers in float32. Returns a row for each layer: what
    the partition and the router cost, and the seconds it took.

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
    calls = _embed(model, source, layers, batches)
    hidden = hidden or calls.hidden
    held_out = max(1, len(batches) // HELD_OUT_SHARE) if len(batches) > 1 else 0
    todo = range(len(rows), len(layers))
    for index in track(todo, len(todo), "carving and routing layers") if track else todo:
        start = time.perf_counter()
        layer = layers[index]
        prefix = f"{layers_path(model)}{index}."
        layer.load_state_dict({name: source.read(prefix + name) for name in layer.state_dict()}, assign=True)
        after, inputs = _through(layer, stack, batches, hidden, [batch_calls[index] for batch_calls in calls.calls])
        ffn = read_ffn(model, index)
        layer.get_submodule(stack.install).to("meta")
        fitted = torch.cat(inputs[: len(inputs) - held_out])
        with torch.enable_grad():
            moe = carve(ffn, fitted, spec, index, seed=seed)
            wanted_TD = outputs(ffn, fitted) if refit else None
            del ffn
            install(model, index, moe)
            _require_identity(layer, moe, calls.calls[0][index], hidden[0], after[0], index, spec)
            fit_router(
                moe,
                fitted,
                ridge=ridge,
                steps=router_steps,
                batch_tokens=router_batch_tokens,
                learning_rate=learning_rate,
                seed=seed + index,
            )
        judged = torch.cat(inputs[-held_out:]) if held_out else fitted
        row = {"layer": index, **oracle.diagnose(moe, judged, chunk_of(num_experts * judged.shape[1]))}
        row |= {"scale": moe.output_scale.item()}
        if wanted_TD is not None:
            refit_outputs(moe, fitted, wanted_TD, penalty=refit, chunk=chunk_of(moe.num_experts * moe.w_in.shape[1]))
        work.write(plan.shard_of_layer(index), plan.stored(prefix, layer.state_dict()))
        hidden = after
        layer.to("meta")
        del moe, inputs, fitted, judged, after, wanted_TD
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


@dataclass
class _Calls:
    """The embedded calibration tokens, and how the model calls each layer, by batch."""

    hidden: list[Tensor]
    calls: list[list[_Call]]


def _embed(model: Any, source: Source, layers: nn.ModuleList, batches: Sequence[Batch]) -> _Calls:
    """What goes into the first layer. All that is outside the layers is read for it and given back."""
    path, base = layers_path(model), model.base_model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    outer = [name for name in base.state_dict() if not f"{prefix}{name}".startswith(path)]
    embedding = model.get_input_embeddings().weight
    rows = torch.cat([batch.inputs["input_ids"].flatten() for batch in batches]).unique()
    tensors = {}
    for name in outer:
        needed = rows if dict(base.named_parameters()).get(name) is embedding else None
        tensors[name] = source.read(prefix + name, rows=needed)
    base.load_state_dict(tensors, strict=False, assign=True)
    found = _Calls([], [])
    for batch in batches:
        hidden, calls = record_calls(model, layers, batch)
        found.hidden.append(hidden)
        found.calls.append(calls)
    base.load_state_dict({name: tensor.to("meta") for name, tensor in tensors.items()}, strict=False, assign=True)
    return found


def _through(
    layer: nn.Module, stack: Stack, batches: Sequence[Batch], hidden: Sequence[Tensor], calls: Sequence[_Call]
) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden states after a dense layer, and what its FFN saw [T, D], of each batch."""
    seen: list[Tensor] = []
    hook = layer.get_submodule(stack.install).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        after = [call.run(layer, states) for call, states in zip(calls, hidden, strict=True)]
    finally:
        hook.remove()
    return after, [real_tokens(x, batch, stack.layers) for x, batch in zip(seen, batches, strict=True)]


def _require_identity(
    layer: nn.Module, moe: MoEFFN, call: _Call, hidden: Tensor, dense: Tensor, index: int, spec: MoESpec
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
