"""Estimate the memory and disk that a streamed conversion takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ffn2moe.decompose.gradients import FISHER_TOKENS, TOKENS_AT_ONCE
from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.decompose.source import Source, layers_path, skeleton
from ffn2moe.numerics import chunk_of
from ffn2moe.spec import FFNShape, MoESpec

CGROUP = Path("/sys/fs/cgroup")
LOGITS = 4  # copies of a batch's logits that a gradient takes
OVERHEAD = 2**28  # bytes of later imports, and of what allocators and kernels keep (measured)


@dataclass(frozen=True)
class Estimate:
    """What a run takes, in bytes, from config and headers alone; memory is that of the whole process."""

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
    spec: MoESpec,
    *,
    calibration_tokens: int,
    batch_tokens: int,
    dtype: torch.dtype | None = None,
    copies: int = 1,
    by_need: bool = False,
) -> Estimate:
    """Return what decomposing the model in `folder` into the mixture of `spec` takes; no weight is read.

    `calibration_tokens` pass through a layer in batches of `batch_tokens`; `dtype` is that of the written weights
    (None: as in the source); `copies` is how many forms of the model are written, such as a container beside the
    checkpoint; `by_need` says whether each layer gets a width of its own. The errors are those of `Source`.
    """
    model = skeleton(folder, spec.head)
    path = layers_path(model)
    source = Source(folder, model)
    shape = spec.stacks[0]
    layer = sum(source.bytes_of(name, torch.float32) for name in model.state_dict() if name.startswith(f"{path}0."))
    written = sum(source.bytes_of(name, dtype) for name in model.state_dict() if name not in source.aliases)
    padded = (shape.shared_width + spec.num_experts * shape.expert_width) / shape.ffn_width
    states = 4 * 3 * shape.width * calibration_tokens
    work, waiting = _work(shape, spec.num_experts, calibration_tokens, batch_tokens), 0
    if PARTITIONS[spec.partition].refilled:
        work = max(work, _refilling(shape, spec.num_experts))
        outside = (name for name in model.state_dict() if not name.startswith(path) and name not in source.aliases)
        head = LOGITS * 4 * TOKENS_AT_ONCE * model.config.get_text_config().vocab_size
        work = max(work, sum(source.bytes_of(name, torch.float32) for name in outside) + head)
        waiting = 4 * shape.num_layers * (FISHER_TOKENS + shape.width) * shape.width
    if by_need:
        work = max(work, _weighing(shape))
        waiting += 4 * shape.num_layers * _moments(shape)
    return Estimate(
        layers=shape.num_layers,
        layer=layer,
        states=states,
        memory=resident() + OVERHEAD + states + layer + work,
        disk=int(copies * written * padded) + states + waiting,
    )


def _work(shape: FFNShape, num_experts: int, calibration_tokens: int, batch_tokens: int) -> int:
    """Return the most that a layer's steps take beside its weights and the calibration states, in bytes."""
    from ffn2moe.decompose.statistics import MOST_KEPT_TOKENS
    from ffn2moe.numerics import WIDEST_MOMENTS

    D, F = shape.width, shape.ffn_width
    ffn = 4 * (3 if shape.gated else 2) * D * F
    forward = 4 * batch_tokens * (4 * F + 8 * D)
    wide = F > WIDEST_MOMENTS
    statistics = 2 * min(calibration_tokens, MOST_KEPT_TOKENS) * F if wide else 5 * 8 * F * F
    partitioning = 4 * 4 * chunk_of(F) * F + statistics
    slicing = 3 * ffn  # the dense weights, their slices, the mixture's
    outputs = 4 * 3 * chunk_of(num_experts * D) * num_experts * D
    fitting = ffn + max(outputs, 4 * 6 * calibration_tokens * D)
    # In float64: H'H and its factor; what is solved for and its copies. In float32: activations, tokens and outputs.
    refitting = 2 * 8 * F * F + 4 * 8 * F * D + 2 * 4 * chunk_of(F) * F + 4 * 3 * calibration_tokens * D
    return max(forward, ffn + partitioning, slicing, fitting, refitting)


def _moments(shape: FFNShape) -> int:
    """Return how many second moments of a layer's neurons are kept."""
    from ffn2moe.numerics import WIDEST_MOMENTS

    return shape.ffn_width if shape.ffn_width > WIDEST_MOMENTS else shape.ffn_width**2


def _weighing(shape: FFNShape) -> int:
    """Return what finding the cost of each width of a layer takes, in bytes: an elimination, mostly in float32."""
    D, F = shape.width, shape.ffn_width
    return 4 * (3 if shape.gated else 2) * D * F + 4 * 8 * _moments(shape) + 8 * 4 * D * D + 4 * 4 * chunk_of(F) * F


def _refilling(shape: FFNShape, num_experts: int) -> int:
    """Return what `token_experts.fill` takes beside the calibration states, in bytes."""
    from ffn2moe.decompose.token_experts import BASIS_TOKENS
    from ffn2moe.numerics import WIDEST_MOMENTS

    D, F = shape.width, shape.ffn_width
    ffn = 4 * (3 if shape.gated else 2) * D * F
    clustering = 3 * 4 * BASIS_TOKENS * F
    # Second moments of each expert in float32, and what the elimination makes of one of them in float64.
    choosing = 0 if F > WIDEST_MOMENTS else (4 * (num_experts + 2) + 4 * 8) * F * F
    return 3 * ffn + max(clustering, choosing)


def resident() -> int:
    """Return the memory of this process now, in bytes; half a GiB where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 2**29
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int | None:
    """Return the memory that is available without swapping, in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:  # a container may have less
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no limit
        return free
    return limit - used if free is None else min(free, limit - used)
