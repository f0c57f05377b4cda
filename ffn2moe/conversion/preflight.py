"""Check a conversion before its work: what the model can become, and the memory and disk that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ffn2moe.containers.fit import require_fit
from ffn2moe.conversion.data import CALIBRATION_BATCH
from ffn2moe.decompose.memory import available_memory, estimate, require_room
from ffn2moe.decompose.source import NotStreamable, skeleton

if TYPE_CHECKING:
    from ffn2moe.conversion.task import Task

GIB = 2**30
FLOAT32 = 4  # bytes


def preflight(task: Task, *, distilled: bool) -> None:
    """Say what the conversion takes. ValueError for a mixture that the model cannot become, and for a full disk."""
    dense, settings = task.dense, task.settings
    if dense.family is None:
        task.say(
            f"converting in memory: {dense.config.model_type!r} is no known family, so its FFNs are located by probing"
        )
        return
    spec = task.spec(skeleton(dense.folder, dense.head))
    if task.container:
        require_fit(task.container, dense.config, spec=spec)
    try:
        found = estimate(
            dense.folder,
            spec,
            calibration_tokens=settings.calibration_tokens,
            batch_tokens=CALIBRATION_BATCH * task.max_length,
            dtype=torch.float32,
            copies=3 + (6 if settings.onnx else 0),  # the routed and the distilled student, its container; the plans
        )
    except NotStreamable as reason:
        task.say(f"converting in memory: {reason}")
        return
    warning = require_room(found, task.out)
    task.say(f"decomposing takes about {found}")
    if distilled or settings.onnx:
        # Both models; of a student that is trained also gradients and the two moments of the optimizer.
        both = (2 + 3 * distilled) * FLOAT32 * dense.parameters() / GIB
        task.say(f"the steps after it hold teacher and student, up to {both:.1f} GiB of memory")
    if warning:
        task.say(f"warning: {warning}")


def both_fit(task: Task) -> bool:
    """Return whether teacher and student fit in memory together; True where the system does not tell."""
    available = available_memory()
    return available is None or 2 * FLOAT32 * task.dense.parameters() < available
