"""Stage 4: distil the dense teacher into the mixtures, layer by layer if params.yaml asks for it, then end to end.

A run that is killed at any moment resumes from the last layer or checkpoint in .cache and ends in the same bytes. With
several processes (`distill.processes`) each works on its part of every batch; only the first reads and writes .cache
and outs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.layer_map import dask_map
from tasks.processes import PATIENCE, launch, launched, speaks, take_part
from tasks.stage import StageRun, main
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from ffn2moe.data.batches import BatchSource
    from ffn2moe.data.ranks import Ranks
    from ffn2moe.distill.distiller import Distiller, StepMetrics, Training
    from ffn2moe.distill.objectives import Objective
    from ffn2moe.spec import MoESpec

REPORTED_EVERY = 10  # steps between the rows of the loss curve
MOST_LOST = 120.0  # seconds of work that a kill may cost, where steps are slow
LAYERS = ".cache/layerwise"  # finished layers, until the stage is finished


def run(stage: StageRun) -> None:
    """Run the stage: in this process, in processes of its own, or as one of those that torchrun started."""
    from ffn2moe.data.ranks import ALONE
    from ffn2moe.numerics import choose_device

    settings = stage.params.distill
    if launched():
        # The others wait while the first process trains layer by layer.
        patience = timedelta(days=30) if settings.layerwise_steps else PATIENCE
        take_part(stage, distil, device=choose_device(stage.params.compute.device), patience=patience)
    elif settings.processes > 1:
        launch(stage, settings.processes, "-m", "tasks.distill")
    else:
        distil(stage, ALONE)


def distil(stage: StageRun, ranks: Ranks) -> None:
    """Run the stage in one of the processes that share its batches."""
    from ffn2moe.dense.load import load_dense
    from ffn2moe.dense.reduction import same_layers
    from ffn2moe.distill.distiller import Distiller
    from ffn2moe.moe import checkpoint

    if ranks.size != stage.params.distill.processes:
        raise ValueError(
            f"torchrun started {ranks.size} processes and distill.processes = {stage.params.distill.processes}: make "
            "the two agree (their number changes the last bits of the result, so it is a parameter)"
        )
    params, root, settings = stage.params, stage.root, stage.params.distill
    student = checkpoint.load(root / "models/routed")
    spec = checkpoint.load_spec(root / "models/routed")
    teacher, tokenizer = load_dense(str(root / "data/teacher"), head=spec.head)
    training = training_of(stage, spec, teacher.config)
    tokens = read_tokens(root / "data/corpus/train.jsonl", spec.head, tokenizer, spec.max_length, prompt=spec.prompt)
    batch_tokens = batch_tokens_of(stage, spec)
    batches = tokens.shuffled(batch_tokens=batch_tokens, seed=params.seed)
    epochs = training.steps / batches.per_epoch
    stage.say(
        f"{len(tokens.ids)} {'blocks' if spec.head == 'causal' else 'texts'}, {training.steps} steps of "
        f"{batch_tokens} tokens ({epochs:.1f} epochs), "
        f"{'bfloat16' if training.bf16 else 'float32'} on {training.device}"
    )
    objective = objective_of(stage, spec, teacher)
    fingerprint = run_fingerprint(stage)
    require_same(fingerprint, ranks)
    curve = []
    if ranks.first:  # the other processes get its state when they all start
        deep = same_layers(teacher, spec) if settings.layerwise_steps else teacher
        curve = train_layers(stage, deep, student, batches, spec, training, fingerprint)
    distiller = Distiller(teacher, student, batches, objective, training, ranks)
    if not ranks.first:
        for _ in distiller.run():
            pass
        return
    progress = Progress(root / ".cache" / "distill.safetensors", fingerprint)
    train(stage, distiller, progress)
    with stage.out("models/distilled") as out:
        checkpoint.save(student, tokenizer, spec, out)
    report(stage, progress.rows, curve, epochs=epochs, tokens=training.steps * batch_tokens, training=training)
    progress.discard()
    shutil.rmtree(root / LAYERS, ignore_errors=True)


def train(stage: StageRun, distiller: Distiller, progress: Progress) -> None:
    """Run the distiller from its last checkpoint to its last step; log metrics and write checkpoints."""
    settings = stage.params.distill
    progress.resume(distiller)
    if distiller.step:
        stage.say(f"resuming from the checkpoint at step {distiller.step}")
    saved = time.monotonic()
    steps = stage.track(distiller.run(), distiller.steps, "distilling", completed=distiller.step)
    for metrics in steps:
        progress.add(metrics)
        if metrics.step % REPORTED_EVERY == 0:
            stage.log_metrics({name: value for name, value in metrics.row().items() if name != "step"}, metrics.step)
        due = distiller.step % settings.checkpoint_every == 0 or time.monotonic() - saved > MOST_LOST
        if due and distiller.step < distiller.steps:
            progress.save(distiller)
            saved = time.monotonic()


def report(
    stage: StageRun,
    rows: list[dict[str, Any]],
    curve: list[dict[str, Any]],
    *,
    epochs: float,
    tokens: int,
    training: Training,
) -> None:
    """Write the metrics and the loss curves of the stage."""
    settings, last = stage.params.distill, rows[-50:]
    stage.write_json(
        "metrics/distill.json",
        {
            "steps": training.steps,
            "epochs": epochs,
            "tokens": tokens,
            "loss_last_50": sum(row["loss"] for row in last) / max(1, len(last)),
            "bf16": training.bf16,
            "layerwise_steps": settings.layerwise_steps,
        },
    )
    stage.write_csv("metrics/plots/layerwise.csv", curve or [{"layer": 0, "step": 0, "loss": 0.0}])
    stage.write_csv("metrics/plots/distill.csv", rows[::REPORTED_EVERY] or [{"step": 0, "loss": 0.0}])


def batch_tokens_of(stage: StageRun, spec: MoESpec) -> int:
    """Return the tokens of a step from params.yaml."""
    from ffn2moe.distill.usual import usual_batch_tokens

    asked = stage.params.distill.batch_tokens
    return usual_batch_tokens(spec.head, spec.stacks[-1].width, spec.max_length) if asked == "auto" else asked


def training_of(stage: StageRun, spec: MoESpec, config: Any) -> Training:
    """Return the settings of the training from params.yaml; `config` is the teacher's."""
    from ffn2moe.distill.distiller import Training, compared_layers
    from ffn2moe.distill.usual import usual_rate, usual_steps
    from ffn2moe.numerics import bf16_supported, choose_device

    params, settings = stage.params, stage.params.distill
    device = choose_device(params.compute.device)
    return Training(
        steps=usual_steps(spec, config, batch_tokens_of(stage, spec)) if settings.steps == "auto" else settings.steps,
        learning_rate=usual_rate(spec, settings.scope) if settings.learning_rate == "auto" else settings.learning_rate,
        balance_step=balance_step_of(stage, spec),
        scope=settings.scope,
        elastic=spec.elastic,
        layers=compared_layers(spec),
        seed=params.seed,
        device=device,
        bf16=bf16_supported(device) if params.compute.bf16 == "auto" else params.compute.bf16 == "on",
    )


def train_layers(
    stage: StageRun,
    teacher: Any,
    student: Any,
    batches: BatchSource,
    spec: MoESpec,
    training: Training,
    fingerprint: str,
) -> list[dict[str, Any]]:
    """Train every layer of the student by itself, if params.yaml asks for it; return the curves of the losses."""
    import torch

    from ffn2moe.distill.layerwise import LayerTraining, distil_layers

    settings = stage.params.distill
    if not settings.layerwise_steps:
        return []
    layers = distil_layers(
        teacher,
        student,
        batches,
        LayerTraining(
            steps=settings.layerwise_steps,
            batch_tokens=batch_tokens_of(stage, spec),
            learning_rate=training.learning_rate,
            seed=training.seed,
            elastic=training.elastic,
            device=str(training.device),
            bf16=training.bf16,
        ),
        workers=torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1")),  # the others wait
        folder=stage.root / LAYERS,
        fingerprint=fingerprint,
        do=dask_map(),
        spec=spec,
    )
    rows = [
        {"layer": found.layer, "step": step, "loss": loss}
        for found in stage.track(layers, spec.num_layers, "training layers")
        for step, loss in enumerate(found.losses)
        if step % REPORTED_EVERY == 0
    ]
    return sorted(rows, key=lambda row: (row["layer"], row["step"]))  # layers finish in any order


def objective_of(stage: StageRun, spec: MoESpec, teacher: Any) -> Objective:
    """Return the objective of a student of this teacher, with the weights of params.yaml."""
    from ffn2moe.distill.objectives import LossWeights, objective_for

    settings = stage.params.distill
    weights = LossWeights(
        hidden=settings.hidden_weight,
        embedding=settings.embedding_weight,
        relational=settings.relational_weight,
        logits=settings.logits_weight,
        divergence=settings.divergence,
    )
    return objective_for(spec.head, weights, problem=spec.problem, teacher=teacher)


def balance_step_of(stage: StageRun, spec: MoESpec) -> float:
    """Return the step of the balance bias; 0 if the container has no bias that shifts the choice."""
    from ffn2moe.containers.table import CONTAINERS

    step = stage.params.distill.balance_step
    if step and spec.container and not CONTAINERS[spec.container].choice_bias:
        stage.say(f"{spec.container} has no bias that shifts the choice, so the load is not balanced")
        return 0.0
    return step


class Progress:
    """The checkpoint that a stopped distillation resumes from, with the metrics of the steps before it.

    Its file is not one of the stage's outs, because DVC removes those before the stage starts.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.rows: list[dict[str, Any]] = []

    def add(self, metrics: StepMetrics) -> None:
        """Keep the metrics of a step."""
        self.rows.append(metrics.row())

    def save(self, distiller: Distiller) -> None:
        """Write the checkpoint."""
        import torch

        from ffn2moe.moe.checkpoint import save_progress

        history = torch.tensor([list(row.values()) for row in self.rows], dtype=torch.float64)
        save_progress(
            self.path,
            distiller.state() | {"history": history},
            step=distiller.step,
            fingerprint=self.fingerprint,
        )

    def resume(self, distiller: Distiller) -> None:
        """Restore the distiller and the metrics from the checkpoint, if there is one of this distillation."""
        from ffn2moe.moe.checkpoint import load_progress

        found = load_progress(self.path, fingerprint=self.fingerprint)
        if found is None:
            return
        step, tensors = found
        names = ("step", "loss", *distiller.objective.terms, "gradient_norm", "max_over_mean_load")
        self.rows = [dict(zip(names, row, strict=True)) for row in tensors.pop("history").tolist()]
        for row in self.rows:
            row["step"] = int(row["step"])
        distiller.restore(step, tensors)

    def discard(self) -> None:
        """Delete the checkpoint."""
        self.path.unlink(missing_ok=True)


def require_same(fingerprint: str, ranks: Ranks) -> None:
    """Raise ValueError if the processes have different fingerprints."""
    import torch

    if not ranks.same(torch.tensor(list(bytes.fromhex(fingerprint)))):
        raise ValueError(
            "the processes read different parameters, teachers, students or texts: give every machine the same "
            "params.yaml, data/teacher, data/corpus and models/routed (dvc pull)"
        )


def run_fingerprint(stage: StageRun) -> str:
    """Return a digest of this distillation: its parameters and the content of its inputs."""
    params = stage.params
    digest = hashlib.sha256()
    settings = [
        params.distill.model_dump(),
        params.seed,
        params.teacher.max_length,
        params.compute.model_dump(),
    ]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    weights = [
        *sorted(stage.root.glob("data/teacher/*.safetensors")),
        *sorted(stage.root.glob("models/routed/*.safetensors")),
    ]
    for path in [*weights, stage.root / "data/corpus/train.jsonl"]:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


if __name__ == "__main__":
    main("distill", run, recorded=speaks())
