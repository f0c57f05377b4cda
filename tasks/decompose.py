"""Stage 2: statistics of the neurons, the partition, the experts; nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.stage import StageRun, main
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from ffn2moe.containers import Container
    from ffn2moe.spec import MoESpec

IDENTITY_TOLERANCE = 1e-5  # largest difference allowed between the dense model and its K = E mixture; of large
# outputs, as a share of the largest
CHECKED_TEXTS = 32  # on which that is looked at


def run(stage: StageRun) -> None:
    from ffn2moe import checkpoint, oracle
    from ffn2moe.dense import load_dense, read_ffn
    from ffn2moe.encode import choose_device
    from ffn2moe.factorise import carve, every_expert, layer_inputs, output_of
    from ffn2moe.moe import install_moe
    from ffn2moe.router import neutral_scale

    params, root = stage.params, stage.root
    settings = params.decompose
    head = None if params.teacher.head == "auto" else params.teacher.head
    model, tokenizer = load_dense(str(root / "data/teacher"), head=head)
    spec = describe(stage, model)
    tokens = read_tokens(root / "data/corpus/calibration.jsonl", spec.head, tokenizer, params.teacher.max_length)
    inputs = layer_inputs(
        model,
        tokens.in_order(),
        max_tokens=settings.calibration_tokens,
        device=choose_device(params.compute.device),
    )
    model.to("cpu")
    layers = [
        carve(read_ffn(model, index), x_TD, spec, index, seed=params.seed)
        for index, x_TD in stage.track(enumerate(inputs), len(inputs), "dividing layers")
    ]
    rows: list[dict[str, Any]] = []
    for index, (moe, x_TD) in enumerate(zip(layers, inputs, strict=True)):
        best = oracle.best_scale(moe, x_TD)
        rows.append({"layer": index, "oracle_error": best.error, "scale": best.scale})

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
        moe.set_scale(row["scale"] * neutral_scale(spec.gate, spec.num_experts, spec.num_active))
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


def describe(stage: StageRun, model: Any) -> MoESpec:
    """The spec of the mixture that the parameters ask of this model; says so when experts need padding.

    ValueError where the container that is asked for cannot hold the model, with the property that forbids it.
    """
    from ffn2moe.containers import require_fit
    from ffn2moe.dense import head_of, pooling_of
    from ffn2moe.moe import spec_of

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
        shared_width=settings.shared_width,
        gate=gate,
        router_bias=container is None,
        container=container.name if container else None,
        width_multiple=container.width_multiple if container else 1,
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
    from ffn2moe.containers import choose, container_named

    settings = stage.params.decompose
    if settings.container == "none":
        return None
    if settings.container != "auto":
        return container_named(settings.container)
    try:
        container, why = choose(model.config, shared_width=settings.shared_width)
    except ValueError as error:
        raise ValueError(f"decompose.container = auto, but {error}; set decompose.container=none") from None
    stage.say(f"container: {why}")
    return container


if __name__ == "__main__":
    main("decompose", run)
