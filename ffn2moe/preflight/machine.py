"""Check the machine: the folder to make, the processor, disk and memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ffn2moe.decompose.memory import resident
from ffn2moe.numerics import bf16_supported
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.doubt import Doubt
from ffn2moe.preflight.room import all_memory, available_memory, room_of

GIB = 2**30


def output(case: Case) -> Iterator[str]:
    """Refuse a folder that exists, or that cannot be made."""
    out = case.request.out
    if out is None:
        return
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: remove it, or name another folder")
    parent = existing(out)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".ffn2moe-"):
            pass
    except OSError as error:
        raise ValueError(f"{out} cannot be made in {parent} ({error.strerror}): name another folder") from None
    yield f"{out} is made"


def existing(path: Path) -> Path:
    """Return the nearest folder of a path that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def processor(case: Case) -> Iterator[str]:
    """Name what computes."""
    precision = "bfloat16" if bf16_supported(case.device) else "float32"
    what = f"{torch.get_num_threads()} threads" if case.device == "cpu" else case.device
    yield f"trains on {what} in {precision}"


def disk(case: Case) -> Iterator[str]:
    """Refuse a disk without room for what is written."""
    folder, needed = existing(case.request.disk), room_of(case).disk
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"this takes about {needed / GIB:.1f} GiB of disk, and {folder} has {free / GIB:.1f} GiB left: make room, "
            "or name a folder on another disk"
        )
    yield f"about {needed / GIB:.1f} GiB of the {free / GIB:.1f} GiB that are free in {folder}"


def memory(case: Case) -> Iterator[str]:
    """Refuse what memory and swap together cannot hold; warn of what is not available now."""
    room, asked = room_of(case), case.request
    most, available = all_memory(), available_memory()
    recorded = "router_tokens" if asked.router_tokens else "calibration_tokens"  # the larger of the two
    without = "convert it with `ffn2moe convert`, --distill-steps 0 and --no-onnx"
    for needed, what, remedy in (
        (room.decomposing, "to decompose", f"lower {asked.call(recorded)}"),
        (room.held, "for teacher and student", without),
        (room.held + room.kept, "to train", f"lower {asked.call('batch_tokens')} (now {case.batch_tokens})"),
        (room.judging, "to judge", "take wikitext2, hellaswag and blimp out of data.folder"),
    ):
        if most is not None and needed > most:
            raise ValueError(
                f"this takes about {needed / GIB:.1f} GiB of memory {what}, and this machine has {most / GIB:.1f} GiB "
                f"with its swap: {remedy}, or take a larger machine"
            )
    after = f", then {(room.held + room.kept) / GIB:.1f} GiB for teacher and student" if room.held else ""
    yield f"about {room.decomposing / GIB:.1f} GiB to decompose{after}"
    if available is not None and room.memory - resident() > available:
        yield Doubt(
            f"{available / GIB:.1f} GiB are available now: it may be stopped by the system, or swap; a lower "
            f"{asked.call('batch_tokens')} or {asked.call(recorded)} needs less"
        )
