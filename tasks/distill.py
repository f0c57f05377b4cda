"""Stage 4: the mixtures learn, layer by layer and then end to end, to do what the dense teacher does.

Killed at any moment, it continues from the last layer or checkpoint in .cache and ends in the same bytes. In several
processes (`distill.processes`) each works on its part of every batch; the first alone reads and writes .cache and outs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
    from ffn2moe.distill.distiller import Distiller, StepMetrics
    from ffn2moe.distill.objectives import Objective
    from ffn2moe.spec import MoESpec

REPORTED_EVERY = 10  # steps between the rows of the loss curve
LAYERS = ".cache/layerwise"  # the layers that are done, until the stage is


def run(stage: StageRun) -> None:
    from ffn2moe.data.ranks import ALONE
    from ffn2moe.numerics import choose_device

    settings = stage.params.distill
    if launched():
        # The first trains layer by layer alone, for as long as that takes.
        patience = timedelta(days=30) if settings.layerwise_steps else PATIENCE
        take_part(stage, distil, device=choose_device(stage.params.compute.device), patience=patience)
    elif settings.processes > 1:
        launch(stage, settings.processes, "-m", "tasks.distill")
    else:
        distil(stage, ALONE)


def distil(stage: StageRun, ranks: Ranks) -> None:
    """The stage as one of the processes that share its batches."""
    from ffn2moe.dense.load import load_dense
    from ffn2moe.distill.distiller import Distiller, Training
    from ffn2moe.moe import checkpoint
    from ffn2moe.numerics import bf16_supported, choose_device

    if ranks.size != stage.params.distill.processes:
        raise ValueError(
            f"torchrun started {ranks.size} processes and distill.processes = {stage.params.distill.processes}: make "
            "the two agree (the result depends on their number in its last bits, so that it is a parameter)"
        )
    params, root, settings = stage.params, stage.root, stage.params.distill
    student = checkpoint.load(root / "models/routed")
    spec = checkpoint.load_spec(root / "models/routed")
    teacher, tokenizer = load_dense(str(root / "data/teacher"), head=spec.head)
    device = choose_device(params.compute.device)
    bf16 = bf16_supported(device) if params.compute.bf16 == "auto" else params.compute.bf16 == "on"
    tokens = read_tokens(root / "data/corpus/train.jsonl", spec.head, tokenizer, params.teacher.max_length)
    batches = tokens.shuffled(batch_tokens=settings.batch_tokens, seed=params.seed)
    stage.say(
        f"{len(tokens.ids)} {'blocks' if spec.head == 'causal' else 'texts'}, {settings.steps} steps of "
        f"{settings.batch_tokens} tokens ({settings.steps / batches.per_epoch:.1f} epochs), "
        f"{'bfloat16' if bf16 else 'float32'} on {device}"
    )
    objective = objective_of(stage, spec)
    fingerprint = run_fingerprint(stage)
    require_same(fingerprint, ranks)
    curve = []
    if ranks.first:  # the others get its state when they start together
        curve = train_layers(stage, teacher, student, batches, spec, bf16=bf16, fingerprint=fingerprint)
    distiller = Distiller(
        teacher,
        student,
        batches,
        objective,
        Training(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            balance_step=balance_step_of(stage, spec),
            scope=settings.scope,
            elastic=spec.elastic,
            seed=params.seed,
            device=device,
            bf16=bf16,
        ),
        ranks,
    )
    if not ranks.first:
        for _ in distiller.run():
            pass
        return
    progress = Progress(root / ".cache" / "distill.safetensors", fingerprint)
    progress.resume(distiller)
    if distiller.step:
        stage.say(f"continuing from the checkpoint at step {distiller.step}")
    steps = stage.track(distiller.run(), settings.steps, "distilling", completed=distiller.step)
    for metrics in steps:
        progress.add(metrics)
        if metrics.step % REPORTED_EVERY == 0:
            stage.log_metrics({name: value for name, value in metrics.row().items() if name != "step"}, metrics.step)
        if distiller.step % settings.checkpoint_every == 0 and distiller.step < settings.steps:
            progress.save(distiller)

    with stage.out("models/distilled") as out:
        checkpoint.save(student, tokenizer, spec, out)
    rows = progress.rows
    last = rows[-50:]
    stage.write_json(
        "metrics/distill.json",
        {
            "steps": settings.steps,
            "epochs": settings.steps / batches.per_epoch,
            "tokens": settings.steps * settings.batch_tokens,
            "loss_last_50": sum(row["loss"] for row in last) / max(1, len(last)),
            "bf16": bf16,
            "layerwise_steps": settings.layerwise_steps,
        },
    )
    stage.write_csv("metrics/plots/layerwise.csv", curve or [{"layer": 0, "step": 0, "loss": 0.0}])
    stage.write_csv("metrics/plots/distill.csv", rows[::REPORTED_EVERY] or [{"step": 0, "loss": 0.0}])
    progress.discard()
    shutil.rmtree(root / LAYERS, ignore_errors=True)


def train_layers(
    stage: StageRun,
    teacher: Any,
    student: Any,
    batches: BatchSource,
    spec: MoESpec,
    *,
    bf16: bool,
    fingerprint: str,
) -> list[dict[str, Any]]:
    """Train every layer of the student by itself, if that is asked; gives the curves of their losses."""
    import torch

    from ffn2moe.distill.layerwise import LayerTraining, distil_layers
    from ffn2moe.numerics import choose_device

    params, settings = stage.params, stage.params.distill
    if not settings.layerwise_steps:
        return []
    layers = distil_layers(
        teacher,
        student,
        batches,
        LayerTraining(
            steps=settings.layerwise_steps,
            batch_tokens=settings.batch_tokens,
            learning_rate=settings.learning_rate,
            seed=params.seed,
            elastic=spec.elastic,
            device=choose_device(params.compute.device),
            bf16=bf16,
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
    return sorted(rows, key=lambda row: (row["layer"], row["step"]))  # layers are done in any order


def objective_of(stage: StageRun, spec: MoESpec) -> Objective:
    """Return the objective of a student with this head, with the weights of params.yaml."""
    from ffn2moe.distill.objectives import LossWeights, objective_for

    settings = stage.params.distill
    weights = LossWeights(
        hidden=settings.hidden_weight,
        embedding=settings.embedding_weight,
        relational=settings.relational_weight,
        logits=settings.logits_weight,
        divergence=settings.divergence,
    )
    return objective_for(spec.head, spec.pooling, weights)


def balance_step_of(stage: StageRun, spec: MoESpec) -> float:
    """The step of the balance bias; 0 where the container has no bias that shifts the choice."""
    from ffn2moe.containers.table import CONTAINERS

    step = stage.params.distill.balance_step
    if step and spec.container and not CONTAINERS[spec.container].choice_bias:
        stage.say(f"{spec.container} has no bias that shifts the choice, so the load is not balanced")
        return 0.0
    return step


class Progress:
    """The checkpoint that a stopped distillation continues from, with the metrics of the steps behind it.

    It lies outside the stage's outs, which DVC removes before the stage starts.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.rows: list[dict[str, Any]] = []

    def add(self, metrics: StepMetrics) -> None:
        self.rows.append(metrics.row())

    def save(self, distiller: Distiller) -> None:
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
        """Puts the distiller where it was stopped, if it was."""
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
        self.path.unlink(missing_ok=True)


def require_same(fingerprint: str, ranks: Ranks) -> None:
    """ValueError when another of the processes has a fingerprint of its own."""
    import torch

    if not ranks.same(torch.tensor(list(bytes.fromhex(fingerprint)))):
        raise ValueError(
            "the processes read different parameters, teachers, students or texts: give every machine the same "
            "params.yaml, data/teacher, data/corpus and models/routed (dvc pull)"
        )


def run_fingerprint(stage: StageRun) -> str:
    """Names this very distillation: its parameters and the content of what it reads."""
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
