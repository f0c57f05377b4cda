"""Convert a dense model to a mixture of experts in one process: a model in, an export and a native container out.

The steps are in `ffn2moe.conversion`, and use the same functions as the stages of the pipeline. They work in a folder
beside the wanted one, which appears when it is whole; a conversion that was stopped resumes from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffn2moe.conversion.data import Data, text_data
from ffn2moe.conversion.distillation import distill
from ffn2moe.conversion.images import image_data
from ffn2moe.conversion.quality import judge as judge
from ffn2moe.conversion.quality import summary as summary
from ffn2moe.conversion.route import route
from ffn2moe.conversion.settings import Settings as Settings
from ffn2moe.conversion.task import Task, decide
from ffn2moe.conversion.workspace import open_workspace
from ffn2moe.conversion.write import write
from ffn2moe.moe import checkpoint
from ffn2moe.preflight.room import both_fit
from ffn2moe.progress import Say, Track, silent, untracked


def convert(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    say: Say = silent,
    track: Track = untracked,
) -> dict[str, Any]:
    """Convert the dense model `source` to the folder `out`, and return the manifest that is written there.

    `out` is an export that `ffn2moe.open_export` takes: a graph for each plan unless `settings.onnx` is off, the
    student as a checkpoint, and the native container in a folder of its name where one can hold the model.

    Calls `say` with a line about each step, and wraps long steps in `track` (items, how many, what is done). A
    conversion that was stopped resumes if it is called with the same source and settings. ValueError or
    FileNotFoundError with cause and remedy, before any work where that is possible.
    """
    out, settings = Path(out), settings or Settings()
    task = decide(source, out, settings, say, track)
    fingerprint = open_workspace(task)
    data = text_data(task) if task.dense.reads == "text" else image_data(task)
    route(task, data)
    if settings.steps == 0 and not settings.onnx and not both_fit(task.case.parameters):
        say("teacher and student do not fit in memory together, so the quality is not measured")
        summary_ = {"quality": {}, "distillation": {"steps": 0}, "data": data.summary}
        return write(task, None, checkpoint.load_spec(task.routed), summary_)
    return _train_and_write(task, data, fingerprint)


def _train_and_write(task: Task, data: Data, fingerprint: str) -> dict[str, Any]:
    """Judge the routed student, distill it, judge it again, and write it."""
    spec, student, teacher = checkpoint.load_spec(task.routed), checkpoint.load(task.routed), task.dense.model
    quality = {"routed": judge(teacher, student, data.evaluation, spec, task.device, task.track)}
    task.say(f"routed, before distillation: {summary(quality['routed'])}")
    distillation = distill(task, student, spec, data, fingerprint)
    if distillation["steps"]:
        quality["distilled"] = judge(teacher, student, data.evaluation, spec, task.device, task.track)
        task.say(f"distilled: {summary(quality['distilled'])}")
    for model in (teacher, student):
        model.to("cpu")
    summary_ = {"quality": quality, "distillation": distillation, "data": data.summary}
    return write(task, student, spec, summary_, data.calibration)
