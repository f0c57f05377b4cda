"""Train the student of a conversion: for a number of steps, or for as many as fill the minutes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ffn2moe.conversion.data import Data
from ffn2moe.distill.distiller import Distiller, Training, compared_layers
from ffn2moe.distill.objectives import objective_for
from ffn2moe.distill.usual import usual_rate
from ffn2moe.moe import checkpoint
from ffn2moe.numerics import bf16_supported
from ffn2moe.spec import MoESpec

if TYPE_CHECKING:
    from ffn2moe.conversion.task import Task

TIMED_STEPS = 4  # of a trial, whose first step is not timed
CHECKPOINT_SECONDS = 60  # between the states that a stopped distillation resumes from
BALANCE_STEP = 1e-3  # of the bias that shifts the choice of experts, where a container has one


def distill(task: Task, student: Any, spec: MoESpec, data: Data, fingerprint: str) -> dict[str, Any]:
    """Train the student in place; return the steps, the learning rate, the seconds and the precision."""
    if task.settings.steps == 0:
        return {"steps": 0}
    if spec.head == "features" and len(spec.stacks) > 1:
        task.say("not distilled: the objective reads one output, and a model of several towers has several")
        return {"steps": 0}
    teacher = task.dense.model
    attention = [model.config._attn_implementation for model in (teacher, student)]
    distiller = _distiller(task, student, spec, data)
    steps = task.settings.steps or _steps(task, distiller)
    distiller.steps = steps
    seconds = _train(task, distiller, f"{fingerprint} {steps}")
    student.eval().requires_grad_(False)
    for model, implementation in zip((teacher, student), attention, strict=True):
        model.set_attn_implementation(implementation)
    training = distiller.training
    return {"steps": steps, "learning_rate": training.learning_rate, "seconds": seconds, "bf16": training.bf16}


def _distiller(task: Task, student: Any, spec: MoESpec, data: Data) -> Distiller:
    return Distiller(
        task.dense.model,
        student,
        data.train(),
        objective_for(spec.head, problem=spec.problem, teacher=task.dense.model),
        Training(
            steps=task.settings.steps or TIMED_STEPS,
            learning_rate=task.settings.learning_rate or usual_rate(spec, task.settings.scope),
            balance_step=0.0 if task.container and not task.container.choice_bias else BALANCE_STEP,
            scope=task.settings.scope,
            layers=compared_layers(spec),
            device=task.device,
            bf16=bf16_supported(task.device),
        ),
    )


def _train(task: Task, distiller: Distiller, key: str) -> float:
    """Run the steps, from the state of a stopped run where there is one; return the seconds."""
    steps, training, state = distiller.steps, distiller.training, task.work / "distill.safetensors"
    found = checkpoint.load_progress(state, fingerprint=key)
    if found is not None:
        distiller.restore(*found)
        task.say(f"resuming at step {distiller.step}")
    task.say(
        f"distilling: {steps} steps (--distill-steps {steps} repeats this), learning rate "
        f"{training.learning_rate:g}, {'bfloat16' if training.bf16 else 'float32'} on {task.device}"
    )
    start = saved = time.monotonic()
    for _ in task.track(distiller.run(), steps - distiller.step, "distilling"):
        if time.monotonic() - saved > CHECKPOINT_SECONDS and distiller.step < steps:
            checkpoint.save_progress(state, distiller.state(), step=distiller.step, fingerprint=key)
            saved = time.monotonic()
    return time.monotonic() - start


def _steps(task: Task, distiller: Distiller) -> int:
    """Return how many steps fill the minutes: time a few and undo them. A resumed run keeps the number."""
    minutes = task.case.training_minutes
    kept = task.work / f"steps-{minutes:g}"
    if kept.is_file():
        return int(kept.read_text())
    before = {name: tensor.clone() for name, tensor in distiller.state().items()}
    times = []
    for _ in task.track(distiller.run(), TIMED_STEPS, "timing a few steps"):
        times.append(time.monotonic())
    distiller.restore(0, before)
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    steps = max(1, int(60 * minutes / seconds))
    task.say(f"a step takes {seconds:.2f} s: {steps} of them fill {minutes:g} minutes")
    kept.write_text(str(steps))
    return steps
