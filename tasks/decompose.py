"""Stage 2: partition the neurons of every FFN into experts; nothing is trained.

The parameters may keep some of the layers and of the neurons only; the experts are made of what is left. One expert is
a student without experts: an ordinary model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffn2moe.choices import HEADS
from tasks.layer_map import in_order, layer_map
from tasks.length import text_length
from tasks.stage import StageRun, main
from tasks.tokens import read_tokens
from tasks.widths import fishers_of, widths_by_need

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.containers.container import Container
    from ffn2moe.containers.usual import Wanted
    from ffn2moe.data.batches import Batch
    from ffn2moe.decompose.layer_map import LayerResult
    from ffn2moe.dense.ffn import DenseFFN
    from ffn2moe.dense.reduction import Reduction
    from ffn2moe.spec import MoESpec

# Texts on which the mixture with all experts is compared with the dense model, and of one with a vocabulary of logits.
CHECKED_TEXTS, CHECKED_LONG_OUTPUTS = 32, 4


def run(stage: StageRun) -> None:
    from ffn2moe.decompose.inputs import layer_inputs
    from ffn2moe.decompose.widths import chosen_by_need
    from ffn2moe.dense.load import load_dense
    from ffn2moe.dense.locate import read_ffn
    from ffn2moe.dense.reduction import reduction
    from ffn2moe.numerics import choose_device

    params, root, settings = stage.params, stage.root, stage.params.decompose
    head = None if params.teacher.head == "auto" else params.teacher.head
    teacher, tokenizer = load_dense(str(root / "data/teacher"), head=head)
    kept = reduction(teacher, settings.keep_layers, settings.ffn_width)
    spec = describe(stage, teacher, tokenizer, kept)
    path = root / "data/corpus/calibration.jsonl"
    tokens = read_tokens(path, spec.head, tokenizer, spec.max_length, prompt=spec.prompt)
    check = next(tokens.in_order(CHECKED_LONG_OUTPUTS if HEADS[spec.head].generates else CHECKED_TEXTS))
    model = fewer_layers(stage, teacher, spec, check)
    device = choose_device(params.compute.device)
    batches = list(tokens.first_by_length(settings.calibration_tokens).in_order(tokens.at_once))
    inputs = layer_inputs(model, batches, max_tokens=settings.calibration_tokens, device=device, track=stage.track)
    model.to("cpu")
    fishers = None
    if spec.stacks[0].teacher_ffn_width is not None:
        fishers = fishers_of(stage, model, spec.head, tokens.in_order())
        if spec.is_dense and chosen_by_need(settings.width_per_layer, spec):
            ffns = [read_ffn(model, layer) for layer in range(spec.num_layers)]
            spec = widths_by_need(stage, spec, ffns, inputs, fishers)
    model, lost = narrower(stage, model, spec, inputs, fishers)
    if spec.is_dense:
        figures: dict[str, Any] = {"layers": [{"layer": index} for index in range(spec.num_layers)]}
        stage.say("a student without experts: there is nothing to partition")
    else:
        spec, figures = into_experts(stage, model, spec, inputs, check)
    figures["layers"] = [row | more for row, more in zip(figures["layers"], lost, strict=True)]
    save(stage, model, tokenizer, spec, figures | {"calibration_tokens": len(inputs[0])})


def save(stage: StageRun, model: Any, tokenizer: Any, spec: MoESpec, figures: dict[str, Any]) -> None:
    """Write the student and the metrics of the stage."""
    from ffn2moe.moe import checkpoint

    with stage.out("models/decomposed") as out:
        checkpoint.save(model, tokenizer, spec, out)
    widest = max(shape.expert_width for shape in spec.stacks)
    stage.write_json(
        "metrics/decompose.json", figures | {"expert_width": widest, "active_ffn_share": spec.active_share}
    )


def fewer_layers(stage: StageRun, teacher: Any, spec: MoESpec, check: Batch) -> Any:
    """Return the teacher with the layers that the parameters keep, all other weights as they are."""
    from ffn2moe.dense.reduction import with_layers

    shape = spec.stacks[0]
    if not shape.layers_kept:
        return teacher
    kept = ", ".join(map(str, shape.layers_kept))
    stage.say(f"keeping {shape.num_layers} of {shape.dense_layers} layers: {kept}")
    return with_layers(teacher, shape.layers_kept, spec.head, check.inputs)


def narrower(
    stage: StageRun, model: Any, spec: MoESpec, inputs: list[Tensor], fishers: list[Tensor] | None
) -> tuple[Any, list[dict[str, float]]]:
    """Return the model with FFNs of the width of the spec, and the error of each on the tokens of its fit."""
    from ffn2moe.decompose.narrow import with_narrow_ffns

    shape = spec.stacks[0]
    if shape.teacher_ffn_width is None:
        return model, [{} for _ in inputs]
    stage.say(f"keeping {shape.describe_neurons()} of each FFN")
    widths = [spec.shape_of(layer).ffn_width for layer in range(spec.num_layers)]
    model, errors = with_narrow_ffns(model, inputs, widths, spec.head, stage.track, fishers)
    return model, [{"narrow_error": error} for error in errors]


def into_experts(
    stage: StageRun, model: Any, spec: MoESpec, inputs: list[Tensor], check: Batch
) -> tuple[MoESpec, dict[str, Any]]:
    """Put mixtures in the place of the model's FFNs; return the spec with K of each layer, and the figures."""
    from ffn2moe.choices import GATES
    from ffn2moe.decompose.layer import mixture, output_of, require_identity
    from ffn2moe.dense.locate import read_ffn
    from ffn2moe.moe.install import install_moe

    ffns = [read_ffn(model, index) for index in range(len(inputs))]
    spec, decomposed, judged = decompose(stage, spec, ffns, inputs)
    layers = [
        mixture(ffn, done.tensors["neurons"], done.tensors["shared_neurons"], spec, done.layer)
        for ffn, done in zip(ffns, decomposed, strict=True)
    ]
    rows = [{"layer": index, **row, "num_active": spec.active_of(index)} for index, row in enumerate(judged)]
    dense = output_of(model, check)
    install_moe(model, layers)
    name = stage.params.teacher.source
    difference = require_identity(layers, dense, lambda: output_of(model, check), name=name, family=spec.family)
    for moe, row in zip(layers, rows, strict=True):
        moe.set_scale(row["scale"] * GATES[spec.gate].neutral_scale(spec.num_experts, moe.num_active))
    stage.say(f"all experts active differ from the dense model by {difference:.1e}")
    return spec, {"layers": rows, "identity_max_abs": difference}


def decompose(
    stage: StageRun, spec: MoESpec, ffns: list[DenseFFN], inputs: list[Tensor]
) -> tuple[MoESpec, list[LayerResult], list[dict[str, Any]]]:
    """Partition every layer; return the spec with K of each layer, the partitions, and the oracle's summaries."""
    from ffn2moe.decompose.jobs import decompose_job

    by_budget = stage.params.decompose.active_per_layer == "budget"
    jobs = [
        decompose_job(ffn, x_TD, spec, index, seed=stage.params.seed, every_budget=by_budget)
        for index, (ffn, x_TD) in enumerate(zip(ffns, inputs, strict=True))
    ]
    decomposed = in_order(stage.track(layer_map()(jobs), len(jobs), "decomposing layers"))
    if by_budget:
        spec, judged = within_budget(stage, spec, ffns, decomposed, inputs)
        return spec, decomposed, judged
    return spec, decomposed, [done.summary for done in decomposed]


def within_budget(
    stage: StageRun,
    spec: MoESpec,
    ffns: list[DenseFFN],
    decomposed: list[LayerResult],
    inputs: list[Tensor],
) -> tuple[MoESpec, list[dict[str, Any]]]:
    """Choose K of each layer by the oracle's errors, K on average in each stack; return the spec and the summaries.

    Stacks of an encoder-decoder have a budget each: they run a different number of tokens.
    """
    from dataclasses import replace

    import torch

    from ffn2moe.decompose import budget
    from ffn2moe.decompose.jobs import judge_job

    errors_LE = torch.stack([done.tensors["errors_E"] for done in decomposed])
    parts = errors_LE.split([shape.num_layers for shape in spec.stacks])
    active = tuple(K for part in parts for K in budget.allocate(part, spec.num_active * len(part)))
    spec = replace(spec, active_per_layer=active)
    stage.say(f"experts a token runs, layer by layer: {', '.join(map(str, active))}")
    jobs = [
        judge_job(ffn, done.tensors["neurons"], done.tensors["shared_neurons"], x_TD, spec, done.layer)
        for ffn, done, x_TD in zip(ffns, decomposed, inputs, strict=True)
    ]
    return spec, [done.summary for done in in_order(stage.track(layer_map()(jobs), len(jobs), "judging layers"))]


def describe(stage: StageRun, model: Any, tokenizer: Any, kept: Reduction | None) -> MoESpec:
    """Return the spec that the parameters ask for; say so where experts need padding.

    K of each layer is not in it yet where it is chosen within a budget. ValueError, with the property that forbids it,
    where the container cannot hold the model.
    """
    from ffn2moe.containers.fit import require_fit
    from ffn2moe.containers.usual import Wanted, usual_experts
    from ffn2moe.decompose.partition import PARTITIONS, settled
    from ffn2moe.decompose.widths import chosen_by_need
    from ffn2moe.dense.config import head_of
    from ffn2moe.moe.describe import spec_of

    params, settings = stage.params, stage.params.decompose
    head = head_of(model.config, stage.root / "data/teacher") if params.teacher.head == "auto" else params.teacher.head
    several = settings.active_per_layer != "same" or bool(params.distill.elastic)
    wanted = Wanted.of(settings, several_budgets=several)
    E, S = usual_experts(wanted, model, head, kept.ffn_width if kept else None)
    container = container_of(stage, wanted, model, head, E, S)
    gate = settings.gate if settings.gate != "auto" else container.gate if container else "unit"
    spec = spec_of(
        model,
        head=head,
        num_experts=E,
        num_active=settings.num_active,
        partition=settings.partition,
        teacher=params.teacher.source,
        max_length=text_length(stage, stage.root / "data/teacher", model, head, tokenizer),
        shared_width=S,
        gate=gate,
        router_bias=container is None,
        container=container.name if container else None,
        width_multiple=container.width_multiple if container else 1,
        active_per_layer=settings.active_per_layer if isinstance(settings.active_per_layer, tuple) else (),
        elastic=tuple(sorted({*params.distill.elastic} - {settings.num_active})),
        reduction=kept,
    )
    spec = settled(spec, settings.expert_width, container.width_multiple if container else 1)
    if container:
        require_fit(container, model.config, spec=spec)
    chosen_by_need(settings.width_per_layer, spec)
    for shape in spec.stacks:
        padding = shape.shared_width + spec.num_experts * shape.expert_width - shape.ffn_width
        if padding and not PARTITIONS[spec.partition].refilled:
            stage.say(
                f"{shape.ffn_width} neurons do not divide by {spec.num_experts} experts: {padding} zero neurons fill "
                f"them up to {shape.expert_width} each, which changes no result"
            )
    return spec


def container_of(stage: StageRun, wanted: Wanted, model: Any, head: str, E: int, S: int) -> Container | None:
    """Return the native architecture that the parameters ask for; with `auto` say which, and why."""
    from ffn2moe.containers.table import CONTAINERS
    from ffn2moe.containers.usual import usual_container

    if wanted.container == "none" or E == 1:
        return None  # a student without experts is an ordinary folder of its own architecture
    if wanted.container != "auto":
        return CONTAINERS[wanted.container]
    container, why = usual_container(wanted, model.config, head, S)
    if head == "causal":
        stage.say(f"container: {why}")
    return container


if __name__ == "__main__":
    main("decompose", run)
