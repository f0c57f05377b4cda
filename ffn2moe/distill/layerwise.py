"""Layerwise distillation: each layer learns by itself, before the model is trained end to end.

On the teacher's inputs the layers do not depend on each other, so that several processes can share them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import BatchSource
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer_map import LayerJob, LayerMap, LayerResult, here, in_processes, under
from ffn2moe.decompose.parts import dense_of, dense_parts, mixture_of
from ffn2moe.dense.blocks import installed_ffns
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.locate import ffn_layers, read_ffn
from ffn2moe.distill.steps import (
    FOLLOW_RATE,
    FOLLOWED_TOKENS,
    adamw,
    budget_of_step,
    budgets_of,
    require_finite,
    update,
)
from ffn2moe.moe.checkpoint import load_progress, save_progress
from ffn2moe.moe.layer import MoEFFN, moe_layers, set_active
from ffn2moe.spec import MoESpec

MOST_NUMBERS = 2**28  # elements that the inputs of all layers together may have: 1 GiB
CHUNK = 4096  # tokens per call of the dense FFN


@dataclass(frozen=True)
class LayerTraining:
    """The settings that all layers share."""

    steps: int
    batch_tokens: int
    learning_rate: float
    seed: int
    elastic: tuple[int, ...] = ()
    device: str = "cpu"
    bf16: bool = False


@dataclass(frozen=True)
class LayerCurve:
    """The loss of every step of one layer."""

    layer: int
    losses: list[float]


def distil_layers(
    teacher: Any,
    student: Any,
    batches: BatchSource,
    training: LayerTraining,
    *,
    workers: int = 1,
    folder: str | Path | None = None,
    fingerprint: str = "",
    do: LayerMap | None = None,
    spec: MoESpec | None = None,
) -> Iterator[LayerCurve]:
    """Train what stands in the place of each FFN of `student`, layer by layer; yield each layer when it is done.

    A layer minimises ``||moe(h) - ffn(h)||^2 / ||ffn(h)||^2``, with h the input of the FFN in the dense teacher. The
    router learns with the experts, by the gradient that its gates pass.

    Each layer learns in one thread, in an order that depends on the seed and the layer alone. So the result is the same
    for any number of `workers` (processes, if more than one) and wherever `do` runs the jobs, which needs the `spec` of
    the student's mixtures. Finished layers are kept in `folder` under the `fingerprint` of the training, and are not
    trained again. ValueError if the student has not one module for each FFN; FloatingPointError if a loss is not
    finite; ChildProcessError if a worker fails or is killed. A layer that fails does not change the student.
    """
    ffns = modules_for_ffns(teacher, student)
    with tempfile.TemporaryDirectory() as temporary:
        kept = KeptLayers(Path(folder or temporary), fingerprint)
        todo = kept.missing(len(ffns))
        for index in sorted(set(range(len(ffns))) - set(todo)):
            yield kept.put_back(ffns[index], index)
        if not todo:
            return
        jobs = layer_jobs(teacher, ffns, batches, todo, training)
        workers = min(workers, len(todo))
        trained: Iterator[LayerResult]
        if training.device != "cpu":
            trained = (job.done() for job in jobs)
        elif do and spec:
            trained = do([job.to_send(spec) for job in jobs])
        elif workers > 1:
            trained = in_processes(jobs, workers, folder=kept.folder)
        else:
            trained = here(jobs)
        for result in trained:
            kept.put(result)
            yield kept.put_back(ffns[result.layer], result.layer)


def modules_for_ffns(teacher: Any, student: Any) -> list[nn.Module]:
    """Return the modules in the place of the student's FFNs. ValueError if the teacher has more FFNs."""
    ffns = installed_ffns(student)
    if len(ffns) != len(ffn_layers(teacher)):
        raise ValueError(
            f"the student has a module in the place of {len(ffns)} FFNs and the teacher has "
            f"{len(ffn_layers(teacher))}: layerwise distillation trains all of them, so install one for each"
        )
    return ffns


class KeptLayers:
    """The finished layers in a folder: one file each, with the weights and the losses."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.fingerprint = fingerprint

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def missing(self, count: int) -> list[int]:
        """Return those of `count` layers that have no file of this training."""
        return [n for n in range(count) if load_progress(self._file(n), fingerprint=self.fingerprint) is None]

    def put(self, result: LayerResult) -> None:
        """Write a finished layer."""
        losses = result.summary["losses"]
        tensors = {f"ffn.{name}": tensor.contiguous() for name, tensor in result.tensors.items()}
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        save_progress(self._file(result.layer), tensors, step=len(losses), fingerprint=self.fingerprint)

    def put_back(self, ffn: nn.Module, layer: int) -> LayerCurve:
        """Load a finished layer into `ffn`; return its losses."""
        found = load_progress(self._file(layer), fingerprint=self.fingerprint)
        assert found is not None
        losses = found[1].pop("losses").tolist()
        ffn.load_state_dict({name.removeprefix("ffn."): tensor for name, tensor in found[1].items()})
        return LayerCurve(layer, losses)


@dataclass
class LayerDistillation:
    """The training of one layer: the module, the dense FFN that it learns from, and the tokens."""

    layer: int
    ffn: nn.Module
    dense: DenseFFN
    x_TD: Tensor
    training: LayerTraining

    def done(self) -> LayerResult:
        """Train the layer; return its weights and the `losses` of its steps."""
        return LayerResult(self.layer, {"losses": self.losses()}, dict(self.ffn.state_dict()))

    def losses(self) -> list[float]:
        """Train `ffn` in place; return the loss of each step. FloatingPointError if one is not finite."""
        how, device = self.training, torch.device(self.training.device)
        ffn, x_TD = self.ffn.to(device).train(), self.x_TD.to(device)
        mixtures = moe_layers(ffn)
        budgets = budgets_of(mixtures[0].num_active, how.elastic) if mixtures else ()
        y_TD = self._wanted(x_TD)
        trained = [parameter.requires_grad_(True) for parameter in ffn.parameters()]
        optimizer = adamw(trained, how.learning_rate)
        generator = torch.Generator().manual_seed(how.seed + self.layer)
        losses = []
        for step in range(how.steps):
            rows = torch.randint(len(x_TD), (min(how.batch_tokens, len(x_TD)),), generator=generator).to(device)
            if budgets:
                set_active(ffn, budget_of_step(budgets, step, how.seed))
            with torch.autocast(device.type, torch.bfloat16) if how.bf16 else nullcontext():
                found_TD = ffn(x_TD[rows])
            wanted_TD = y_TD[rows]
            loss = (found_TD.float() - wanted_TD).square().sum() / wanted_TD.square().sum()
            named = f"the loss of layer {self.layer}", f"step {step} of its own training"
            losses.append(require_finite(loss.item(), *named))
            optimizer.zero_grad()
            loss.backward()
            update(optimizer, trained, how.learning_rate, step, how.steps)
            with torch.no_grad():
                some = rows[:FOLLOWED_TOKENS]
                for moe in mixtures:
                    moe.router.follow(moe.scores(x_TD[some]), moe.num_active, FOLLOW_RATE)
        if budgets:
            set_active(ffn, budgets[0])
        return losses

    def to_send(self, spec: MoESpec) -> LayerJob:
        """Return the job for workers elsewhere. ValueError if the module is not a mixture."""
        if not isinstance(self.ffn, MoEFFN):
            raise ValueError(
                f"layer {self.layer} of the student is a {type(self.ffn).__name__}, and other machines train mixtures "
                "alone: train it on this machine"
            )
        settings = {"spec": spec.to_dict(), "activation": self.dense.activation, "training": asdict(self.training)}
        return LayerJob("distil", self.layer, settings, self.parts())

    def parts(self) -> dict[str, Tensor]:
        """Return all tensors of the job by name."""
        found = {f"ffn.{name}": tensor for name, tensor in self.ffn.state_dict().items()}
        return found | dense_parts(self.dense) | {"x_TD": self.x_TD}

    def shell(self) -> LayerDistillation:
        """Return the job without the contents of its tensors."""
        return self.filled({name: tensor.to("meta") for name, tensor in self.parts().items()})

    def filled(self, tensors: Mapping[str, Tensor]) -> LayerDistillation:
        """Return the job with these tensors."""
        ffn = copy.deepcopy(self.ffn)
        ffn.load_state_dict(under("ffn.", tensors), assign=True)
        dense = replace(self.dense, **under("dense.", tensors))
        return replace(self, ffn=ffn, dense=dense, x_TD=tensors["x_TD"])

    @torch.no_grad()
    def _wanted(self, x_TD: Tensor) -> Tensor:
        tensors = {name: value.to(x_TD.device) for name, value in vars(self.dense).items() if isinstance(value, Tensor)}
        dense = replace(self.dense, **tensors)
        return torch.cat([dense(x) for x in x_TD.split(CHUNK)])


def distillation(job: LayerJob) -> LayerResult:
    """Do the job of a layer: return the mixture's tensors and the `losses` of its steps."""
    settings = job.settings["training"]
    training = LayerTraining(**{**settings, "elastic": tuple(settings["elastic"])})
    return LayerDistillation(job.layer, mixture_of(job), dense_of(job), job.tensors["x_TD"], training).done()


def layer_jobs(
    teacher: Any, ffns: Sequence[nn.Module], batches: BatchSource, todo: Sequence[int], training: LayerTraining
) -> list[LayerDistillation]:
    """Return the jobs of the layers `todo`, with the inputs of their FFNs in the teacher."""
    dense = [read_ffn(teacher, index) for index in range(len(ffns))]
    most = MOST_NUMBERS // sum(ffn.w_in_FD.shape[1] for ffn in dense)
    tokens = max(1, min(training.steps * training.batch_tokens, most))
    inputs = layer_inputs(teacher, batches.from_step(0), max_tokens=tokens, device=training.device)
    return [
        LayerDistillation(index, copy.deepcopy(ffns[index]), dense[index], inputs[index], training) for index in todo
    ]
