"""Layerwise distillation: what took the place of each FFN learns by itself, before the model is trained end to end.

On the teacher's inputs the layers are independent of one another, so that they can be spread over processes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import BatchSource
from ffn2moe.decompose.inputs import layer_inputs, texts_of
from ffn2moe.decompose.jobs import dense_of, dense_parts, mixture_of
from ffn2moe.decompose.layer_map import LayerJob, LayerMap, LayerResult, here, in_processes, under
from ffn2moe.dense.families import Stack
from ffn2moe.dense.ffn import DenseFFN, install_in_block, installed_ffns
from ffn2moe.dense.locate import ffn_layers, read_ffn, stack_of
from ffn2moe.distill.distiller import FOLLOW_RATE, FOLLOWED_TOKENS, MAX_GRADIENT_NORM, Distiller, budget_of_step
from ffn2moe.distill.objectives import Objective
from ffn2moe.moe.checkpoint import load_progress, save_progress
from ffn2moe.moe.layer import MoEFFN, moe_layers, set_active
from ffn2moe.moe.texts import text_means
from ffn2moe.numerics import schedule
from ffn2moe.spec import MoESpec

Judge = Literal["alone", "stitched"]

MOST_NUMBERS = 2**28  # that the inputs of all layers together may have: 1 GiB
CHUNK = 4096  # tokens whose dense output is worked out at once


@dataclass(frozen=True)
class LayerCurve:
    """What came of one layer: the loss of every step."""

    layer: int
    losses: list[float]


@dataclass(frozen=True)
class _How:
    """What is the same for all layers."""

    steps: int
    batch_tokens: int
    learning_rate: float
    seed: int
    elastic: tuple[int, ...]
    device: str
    bf16: bool


def distil_layers(
    teacher: Any,
    student: Any,
    batches: BatchSource,
    objective: Objective,
    *,
    judge: Judge,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
    elastic: Sequence[int] = (),
    stitch: bool = False,
    workers: int = 1,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    folder: str | Path | None = None,
    fingerprint: str = "",
    do: LayerMap | None = None,
    spec: MoESpec | None = None,
) -> Iterator[LayerCurve]:
    """Train what was installed in the place of each FFN of `student`, layer by layer; yields a layer when it is done.

    - ``alone``: minimises ``||moe(h) - ffn(h)||^2 / ||ffn(h)||^2``, h being what the FFN gets in the dense teacher. The
      router learns with the experts, by the gradient that its gates pass.
    - ``stitched``: the layer stands in the teacher, in the place of its FFN, and learns what the teacher's output asks
      of it, by `objective`, batch after batch. This is m2mKD (arXiv 2402.16918) with the teacher as its meta model:
      that method puts module after module into a small model of its own, with linear stitches around it as widths
      differ, and throws the stitches away. Here the widths agree, and the layers around the module are those that it
      will stand among, so no stitch is needed. ``stitch=True`` trains one all the same, a linear map behind the module
      that starts as the identity, and throws it away with all that it has learnt.

    Alone, a layer learns in one thread and in an order of its own that depends on the seed: the result is the same for
    any number of `workers`, which are processes where there is more than one, and wherever `do` has the work done,
    which asks for the `spec` of a student of mixtures. Stitched, whole models run, which keep
    all threads busy, so the layers come one after another in this process. Layers that are done are kept in `folder`
    under the `fingerprint` of the training, and are not trained again. ValueError where the student has not one thing
    installed for each FFN; FloatingPointError when a loss is not finite; ChildProcessError when a worker fails or is
    killed. The student changes a layer at a time, and not by one that fails.
    """
    ffns = installed_ffns(student)
    if len(ffns) != len(ffn_layers(teacher)):
        raise ValueError(
            f"the student has something in the place of {len(ffns)} FFNs, of which the teacher has "
            f"{len(ffn_layers(teacher))}: layerwise distillation trains all of them"
        )
    how = _How(steps, batch_tokens, learning_rate, seed, tuple(elastic), str(device), bf16)
    with tempfile.TemporaryDirectory() as temporary:
        kept = _Kept(Path(folder or temporary), fingerprint)
        todo = [index for index in range(len(ffns)) if not kept.has(index)]
        for index in sorted(set(range(len(ffns))) - set(todo)):
            yield kept.put_back(ffns[index], index)
        if not todo:
            return
        trained: Iterator[LayerResult]
        if judge == "stitched":
            trained = (job.done() for job in _stitched(teacher, ffns, batches, objective, todo, stitch, how))
        else:
            jobs = _alone(teacher, ffns, batches, todo, how)
            if how.device != "cpu":
                trained = (job.done() for job in jobs)
            elif do and spec:
                trained = do([job.to_send(spec) for job in jobs])
            elif min(workers, len(todo)) > 1:
                trained = in_processes(jobs, min(workers, len(todo)), folder=kept.folder)
            else:
                trained = here(jobs)
        for result in trained:
            kept.put(result)
            yield kept.put_back(ffns[result.layer], result.layer)


class _Kept:
    """The layers that are done: what became of each, and its losses, in a file of its own."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.fingerprint = fingerprint

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def has(self, layer: int) -> bool:
        return load_progress(self._file(layer), fingerprint=self.fingerprint) is not None

    def put(self, result: LayerResult) -> None:
        losses = result.summary["losses"]
        tensors = {f"ffn.{name}": tensor.contiguous() for name, tensor in result.tensors.items()}
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        save_progress(self._file(result.layer), tensors, step=len(losses), fingerprint=self.fingerprint)

    def put_back(self, ffn: nn.Module, layer: int) -> LayerCurve:
        """Give `ffn` what its training came to."""
        found = load_progress(self._file(layer), fingerprint=self.fingerprint)
        assert found is not None
        losses = found[1].pop("losses").tolist()
        ffn.load_state_dict({name.removeprefix("ffn."): tensor for name, tensor in found[1].items()})
        return LayerCurve(layer, losses)


def _finite(loss: Tensor, layer: int, step: int) -> float:
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise FloatingPointError(
            f"the loss of layer {layer} is {value} at step {step} of its own training: lower the learning rate, or "
            "switch bfloat16 off"
        )
    return value


# --- alone --------------------------------------------------------------------------------------------------------


@dataclass
class _Alone:
    layer: int
    ffn: nn.Module
    dense: DenseFFN
    x_TD: Tensor
    route_TD: Tensor | None  # what its router reads, where that is not x
    how: _How

    def done(self) -> LayerResult:
        return LayerResult(self.layer, {"losses": self.losses()}, dict(self.ffn.state_dict()))

    def losses(self) -> list[float]:
        """Train `ffn` in place; the loss of each step. FloatingPointError when one is not finite."""
        how, device = self.how, torch.device(self.how.device)
        ffn, x_TD = self.ffn.to(device).train(), self.x_TD.to(device)
        mixtures = moe_layers(ffn)
        budgets = tuple(dict.fromkeys((mixtures[0].num_active, *how.elastic))) if how.elastic and mixtures else ()
        y_TD = self._wanted(x_TD)
        trained = [parameter.requires_grad_(True) for parameter in ffn.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=0.0, fused=True)
        generator = torch.Generator().manual_seed(how.seed + self.layer)
        losses = []
        for step in range(how.steps):
            rows = torch.randint(len(x_TD), (min(how.batch_tokens, len(x_TD)),), generator=generator).to(device)
            if budgets:
                set_active(ffn, budget_of_step(budgets, step, how.seed))
            read = {} if self.route_TD is None else {"route_TD": self.route_TD.to(device)[rows]}
            with torch.autocast(device.type, torch.bfloat16) if how.bf16 else nullcontext():
                found_TD = ffn(x_TD[rows], **read)
            wanted_TD = y_TD[rows]
            loss = (found_TD.float() - wanted_TD).square().sum() / wanted_TD.square().sum()
            losses.append(_finite(loss, self.layer, step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * schedule(step, how.steps)
            optimizer.step()
            with torch.no_grad():
                for moe in mixtures:
                    some = rows[:FOLLOWED_TOKENS]
                    scores_TE = moe.scores(
                        x_TD[some], None if self.route_TD is None else self.route_TD.to(device)[some]
                    )
                    moe.router.follow(scores_TE, moe.num_active, FOLLOW_RATE)
        if budgets:
            set_active(ffn, budgets[0])
        return losses

    def to_send(self, spec: MoESpec) -> LayerJob:
        """The same job for workers elsewhere. ValueError where what is trained is no mixture."""
        if not isinstance(self.ffn, MoEFFN):
            raise ValueError(
                f"layer {self.layer} of the student is a {type(self.ffn).__name__}, and only mixtures are trained "
                "elsewhere: train it on this machine"
            )
        settings = {"spec": spec.to_dict(), "activation": self.dense.activation, "how": asdict(self.how)}
        return LayerJob("distil", self.layer, settings, self.parts())

    def parts(self) -> dict[str, Tensor]:
        """All tensors of the job by name."""
        found = {f"ffn.{name}": tensor for name, tensor in self.ffn.state_dict().items()}
        found |= dense_parts(self.dense) | {"x_TD": self.x_TD}
        return found if self.route_TD is None else found | {"route_TD": self.route_TD}

    def shell(self) -> _Alone:
        """The job without the contents of its tensors."""
        return self.filled({name: tensor.to("meta") for name, tensor in self.parts().items()})

    def filled(self, tensors: Mapping[str, Tensor]) -> _Alone:
        """The same job with these tensors."""
        ffn = copy.deepcopy(self.ffn)
        ffn.load_state_dict(under("ffn.", tensors), assign=True)
        dense = replace(self.dense, **under("dense.", tensors))
        return replace(self, ffn=ffn, dense=dense, x_TD=tensors["x_TD"], route_TD=tensors.get("route_TD"))

    @torch.no_grad()
    def _wanted(self, x_TD: Tensor) -> Tensor:
        tensors = {name: value.to(x_TD.device) for name, value in vars(self.dense).items() if isinstance(value, Tensor)}
        dense = replace(self.dense, **tensors)
        return torch.cat([dense(x) for x in x_TD.split(CHUNK)])


def distillation(job: LayerJob) -> LayerResult:
    """Do the job of a layer that learns alone: the mixture's tensors, and the `losses` of each step."""
    how = _How(**{**job.settings["how"], "elastic": tuple(job.settings["how"]["elastic"])})
    route_TD = job.tensors.get("route_TD")
    return _Alone(job.layer, mixture_of(job), dense_of(job), job.tensors["x_TD"], route_TD, how).done()


def _alone(
    teacher: Any, ffns: Sequence[nn.Module], batches: BatchSource, todo: Sequence[int], how: _How
) -> list[_Alone]:
    """The jobs of layers that are judged by what the FFN itself makes of the teacher's inputs."""
    dense = [read_ffn(teacher, index) for index in range(len(ffns))]
    most = MOST_NUMBERS // sum(ffn.w_in_FD.shape[1] for ffn in dense)
    tokens = max(1, min(how.steps * how.batch_tokens, most))
    inputs = layer_inputs(teacher, batches.from_step(0), max_tokens=tokens, device=how.device)
    route_TD = None
    if any(moe.routing == "sequence" for ffn in ffns for moe in moe_layers(ffn)):
        route_TD = text_means(inputs[0], texts_of(batches.from_step(0), tokens))
    return [_Alone(index, copy.deepcopy(ffns[index]), dense[index], inputs[index], route_TD, how) for index in todo]


# --- stitched -----------------------------------------------------------------------------------------------------


@dataclass
class _Stitched:
    layer: int
    ffn: nn.Module
    teacher: Any
    block: str  # the path of the layer in the teacher
    stack: Stack
    stitch_width: int | None  # D, where a stitch is trained
    batches: BatchSource
    objective: Objective
    how: _How

    def done(self) -> LayerResult:
        return LayerResult(self.layer, {"losses": self.losses()}, dict(self.ffn.state_dict()))

    def losses(self) -> list[float]:
        how = self.how
        # A copy of the teacher's structure around its own, frozen weights.
        mixed = copy.deepcopy(self.teacher, {id(tensor): tensor for tensor in self.teacher.parameters()})
        placed = self.ffn
        if self.stitch_width:
            stitch = nn.Linear(self.stitch_width, self.stitch_width)
            nn.init.eye_(stitch.weight)
            nn.init.zeros_(stitch.bias)
            placed = nn.Sequential(self.ffn, stitch)
        install_in_block(mixed.get_submodule(self.block), self.stack, placed)
        run = Distiller(
            self.teacher,
            mixed,
            self.batches,
            self.objective,
            steps=how.steps,
            learning_rate=how.learning_rate,
            balance_step=0.0,
            elastic=how.elastic,
            seed=how.seed,
            device=how.device,
            bf16=how.bf16,
        )
        try:
            return [metrics.loss for metrics in run.run()]
        except FloatingPointError as error:
            raise FloatingPointError(f"layer {self.layer}, stitched into the teacher: {error}") from error


def _stitched(
    teacher: Any,
    ffns: Sequence[nn.Module],
    batches: BatchSource,
    objective: Objective,
    todo: Sequence[int],
    stitch: bool,
    how: _How,
) -> list[_Stitched]:
    """The jobs of layers that are judged by the teacher's output with the layer in its place."""
    if any(moe.routing == "sequence" for ffn in ffns for moe in moe_layers(ffn)):
        raise ValueError(
            "routing 'sequence' reads what the first mixture of the model is given, which a layer that stands in the "
            "teacher alone does not see: train the layers alone, or end to end"
        )
    path_of = {id(module): path for path, module in teacher.named_modules()}
    blocks = [path_of[id(block)] for block in ffn_layers(teacher)]
    return [
        _Stitched(
            layer=index,
            ffn=copy.deepcopy(ffns[index]),
            teacher=teacher,
            block=blocks[index],
            stack=stack_of(teacher, index),
            stitch_width=len(read_ffn(teacher, index).w_out_DF) if stitch else None,
            batches=batches,
            objective=objective,
            how=how,
        )
        for index in todo
    ]
