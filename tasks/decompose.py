"""Stage 2: statistics of the neurons, the partition, the experts; nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.layer_map import in_order, layer_map
from tasks.stage import StageRun, main
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.containers.container import Container
    from ffn2moe.decompose.layer_map import LayerResult
    from ffn2moe.dense.ffn import DenseFFN
    from ffn2moe.spec import MoESpec

IDENTITY_TOLERANCE = 1e-5  # largest difference allowed between the dense model and its K = E mixture; of large
# outputs, as a share of the largest
CHECKED_TEXTS = 32  # on which that is looked at


def run(stage: StageRun) -> None:
    from ffn2moe.decompose.inputs import layer_inputs, output_gradients, texts_of
    from ffn2moe.decompose.jobs import contributions_job, decompose_job
    from ffn2moe.decompose.layer import every_expert, mixture, output_of
    from ffn2moe.decompose.partition import super_neurons
    from ffn2moe.dense.load import load_dense
    from ffn2moe.dense.locate import read_ffn
    from ffn2moe.moe import checkpoint
    from ffn2moe.moe.layer import install_moe
    from ffn2moe.moe.router import neutral_scale
    from ffn2moe.numerics import choose_device

    params, root = stage.params, stage.root
    settings = params.decompose
    head = None if params.teacher.head == "auto" else params.teacher.head
    model, tokenizer = load_dense(str(root / "data/teacher"), head=head)
    spec = describe(stage, model, settings.shared_width)
    tokens = read_tokens(root / "data/corpus/calibration.jsonl", spec.head, tokenizer, params.teacher.max_length)
    device, most = choose_device(params.compute.device), settings.calibration_tokens
    inputs = layer_inputs(model, tokens.in_order(), max_tokens=most, device=device)
    gradients: list[Tensor | None] = [None] * len(inputs)
    if spec.partition == "gradient":
        gradients[:] = output_gradients(
            model,
            tokens.in_order(),
            head=spec.head,
            pooling=spec.pooling,
            max_tokens=most,
            seed=params.seed,
            device=device,
        )
    text_T = texts_of(tokens.in_order(), most) if spec.routing == "sequence" else None
    model.to("cpu")
    ffns = [read_ffn(model, index) for index in range(len(inputs))]
    do = layer_map()
    statistics = do(
        [contributions_job(ffn, x_TD, index) for index, (ffn, x_TD) in enumerate(zip(ffns, inputs, strict=True))]
    )
    found = super_neurons([done.tensors["largest_F"] for done in in_order(statistics)])
    guarded = found if settings.guard else [None] * len(found)
    needed = max(map(len, found)) if settings.guard else 0
    if needed > settings.shared_width:
        stage.say(
            f"decompose.guard: {sum(map(len, found))} neurons make massive activations, up to {needed} in a layer, so "
            f"that the shared experts hold {needed} neurons in place of {settings.shared_width}"
        )
        spec = describe(stage, model, needed)
    jobs = [
        decompose_job(
            ffns[index],
            x_TD,
            spec,
            index,
            seed=params.seed,
            every_budget=settings.active_per_layer == "budget",
            gradient_TD=gradients[index],
            guarded=guarded[index],
            text_T=text_T,
        )
        for index, x_TD in enumerate(inputs)
    ]
    decomposed = in_order(stage.track(do(jobs), len(jobs), "decomposing layers"))
    if settings.active_per_layer == "budget":
        spec, judged = within_budget(stage, spec, ffns, decomposed, inputs, text_T)
    else:
        judged = [done.summary for done in decomposed]
    layers = [
        mixture(ffn, done.tensors["neurons"], done.tensors["shared_neurons"], spec, done.layer)
        for ffn, done in zip(ffns, decomposed, strict=True)
    ]
    rows: list[dict[str, Any]] = [
        {
            "layer": index,
            **summary,
            "num_active": spec.active_of(index),
            "super_neurons": found[index].tolist(),
        }
        for index, summary in enumerate(judged)
    ]

    check = next(tokens.in_order(CHECKED_TEXTS))
    dense = output_of(model, check)
    install_moe(model, layers)
    with every_expert(layers):
        difference = (output_of(model, check) - dense).abs().max().item()
    tolerance = IDENTITY_TOLERANCE * max(1.0, dense.abs().max().item())  # logits may be large
    if not difference <= tolerance:
        raise ValueError(
            f"with all experts active the mixture differs from the dense model by {difference:.1e}, more than "
            f"{tolerance:.0e}: {params.teacher.source} computes its FFNs in another way than the family "
            f"{spec.family!r} says, so its experts would be wrong"
        )
    for moe, row in zip(layers, rows, strict=True):
        moe.set_scale(row["scale"] * neutral_scale(spec.gate, spec.num_experts, moe.num_active))
    with stage.out("models/decomposed") as out:
        checkpoint.save(model, tokenizer, spec, out)
    stage.write_json(
        "metrics/decompose.json",
        {
            "layers": rows,
            "identity_max_abs": difference,
            "expert_width": max(shape.expert_width for shape in spec.stacks),
            "active_ffn_share": spec.active_share,
            "calibration_tokens": len(inputs[0]),
        },
    )
    stage.say(f"all experts active differ from the dense model by {difference:.1e}")


def within_budget(
    stage: StageRun,
    spec: MoESpec,
    ffns: list[DenseFFN],
    decomposed: list[LayerResult],
    inputs: list[Tensor],
    text_T: Tensor | None,
) -> tuple[MoESpec, list[dict[str, Any]]]:
    """The spec with K of each layer by what the layer loses with fewer, in each stack K on average; what is lost then.

    Stacks of an encoder-decoder are not weighed against each other: they run a different number of tokens.
    """
    from dataclasses import replace

    import torch

    from ffn2moe.decompose import oracle
    from ffn2moe.decompose.jobs import judge_job

    errors_LE = torch.stack([done.tensors["errors_E"] for done in decomposed])
    parts = errors_LE.split([shape.num_layers for shape in spec.stacks])
    active = tuple(K for part in parts for K in oracle.allocate(part, spec.num_active))
    spec = replace(spec, active_per_layer=active)
    stage.say(f"experts a token runs, layer by layer: {', '.join(map(str, active))}")
    jobs = [
        judge_job(ffn, done.tensors["neurons"], done.tensors["shared_neurons"], x_TD, spec, done.layer, text_T=text_T)
        for ffn, done, x_TD in zip(ffns, decomposed, inputs, strict=True)
    ]
    return spec, [done.summary for done in in_order(stage.track(layer_map()(jobs), len(jobs), "judging layers"))]


def describe(stage: StageRun, model: Any, shared_width: int) -> MoESpec:
    """The spec of the mixture that the parameters ask of this model; says so when experts need padding.

    K of each layer is not in it where that is to be found within a budget.

    ValueError where the container that is asked for cannot hold the model, with the property that forbids it.
    """
    from ffn2moe.containers.fit import require_fit
    from ffn2moe.dense.families import head_of
    from ffn2moe.dense.load import pooling_of
    from ffn2moe.moe.describe import spec_of

    params, settings = stage.params, stage.params.decompose
    head = head_of(model.config) if params.teacher.head == "auto" else params.teacher.head
    container = container_of(stage, model)
    gate = settings.gate if settings.gate != "auto" else container.gate if container else "unit"
    spec = spec_of(
        model,
        head=head,
        num_experts=settings.num_experts,
        num_active=settings.num_active,
        partition=settings.partition,
        teacher=params.teacher.source,
        pooling=pooling_of(stage.root / "data/teacher") if head == "embedding" else None,
        max_length=params.teacher.max_length,
        shared_width=shared_width,
        gate=gate,
        router_bias=container is None,
        container=container.name if container else None,
        width_multiple=container.width_multiple if container else 1,
        selection="prefix" if settings.partition == "nested" else settings.selection,
        routing=settings.routing,
        active_per_layer=settings.active_per_layer if isinstance(settings.active_per_layer, tuple) else (),
        max_active=settings.max_active,
        elastic=tuple(sorted({*params.distill.elastic} - {settings.num_active})),
    )
    if container:
        require_fit(container, model.config, spec=spec)
    for shape in spec.stacks:
        padding = shape.shared_width + spec.num_experts * shape.expert_width - shape.ffn_width
        if padding:
            stage.say(
                f"{shape.ffn_width} neurons do not divide by {spec.num_experts} experts: {padding} zero neurons fill "
                f"them up to {shape.expert_width} each, which changes no result"
            )
    return spec


def container_of(stage: StageRun, model: Any) -> Container | None:
    """The native architecture that the parameters ask for; `auto` says which it takes, and why."""
    from ffn2moe.containers.fit import choose
    from ffn2moe.containers.table import CONTAINERS

    settings = stage.params.decompose
    if settings.container == "none":
        return None
    if settings.container != "auto":
        return CONTAINERS[settings.container]
    try:
        container, why = choose(model.config, shared_width=max(settings.shared_width, settings.guard))
    except ValueError as error:
        raise ValueError(f"decompose.container = auto, but {error}; set decompose.container=none") from None
    stage.say(f"container: {why}")
    return container


if __name__ == "__main__":
    main("decompose", run)
