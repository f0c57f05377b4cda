"""Write every form of the student: ONNX graphs, checkpoint, native container."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffn2moe.containers import write as containers
from ffn2moe.containers.tensors import layer_tensors, outer_tensors
from ffn2moe.decompose.shards import mixtures, outside
from ffn2moe.decompose.source import skeleton
from ffn2moe.moe.layer import moe_layers
from ffn2moe.onnx.write import bare_manifest, export_or_checkpoint, write_manifest
from ffn2moe.spec import MoESpec

if TYPE_CHECKING:
    from ffn2moe.conversion.task import Task
    from ffn2moe.data.batches import Batch

SHARD_BYTES = 2**30  # of the container's files: as much is in memory while one is written


def write(
    task: Task, student: Any | None, spec: MoESpec, summary: dict[str, Any], calibration: Iterable[Batch] = ()
) -> dict[str, Any]:
    """Write the student, and give the finished folder its name; return the manifest.

    None for the student writes the routed checkpoint as it is, a layer at a time. `summary` goes into the manifest,
    beside the settings. Ranges of activations are measured on `calibration`, for plans that need them.
    """
    result = task.work / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    if student is None:
        task.dense.reader.save_pretrained(result / "tokenizer")
        shutil.copytree(task.routed, result / "checkpoint", copy_function=os.link)
        manifest = bare_manifest(skeleton(task.routed, spec.head), spec, task.dense.reader)
    else:
        manifest = export_or_checkpoint(
            student,
            task.dense.model if task.settings.every_plan else None,
            task.dense.reader,
            spec,
            result,
            onnx=task.settings.onnx,
            every_plan=task.settings.every_plan,
            calibration=[{name: tensor.numpy() for name, tensor in batch.inputs.items()} for batch in calibration],
            say=task.say,
            track=task.track,
        )
    if task.container:
        manifest["container"] = _write_container(task, student, spec, result)
    manifest["convert"] = {"settings": task.settings.identity(), **summary}
    write_manifest(result, manifest)
    os.replace(result, task.out)
    shutil.rmtree(task.work)
    return manifest


def _write_container(task: Task, student: Any | None, spec: MoESpec, result: Path) -> dict[str, str]:
    """Write the native container, and return its entry of the manifest."""
    assert task.container is not None
    dtype = _dtype(task)
    containers.write(
        result / task.container.name,
        task.container,
        spec,
        task.dense.config if student is None else student.config,
        _pieces(task, student, spec),
        dtype=dtype,
        shard_bytes=SHARD_BYTES,
        assets=task.dense.folder,
    )
    return {"folder": task.container.name, "dtype": str(dtype).removeprefix("torch.")}


def _pieces(task: Task, student: Any | None, spec: MoESpec) -> Iterator[Mapping[str, Tensor]]:
    """Yield the container's tensors, a layer or a tensor at a time."""
    assert task.container is not None
    outer: Any = outside(task.routed) if student is None else student.state_dict()
    yield from outer_tensors(task.container, task.dense.config, outer)
    layers = mixtures(task.routed) if student is None else moe_layers(student)
    for index, moe in enumerate(layers):
        yield layer_tensors(task.container, spec, index, moe)


def _dtype(task: Task) -> torch.dtype:
    if task.settings.dtype != "auto":
        found: torch.dtype = getattr(torch, task.settings.dtype)
        return found
    own = getattr(task.dense.config, "dtype", None)
    return own if own in (torch.bfloat16, torch.float16) else torch.float32
