"""Stage 2: statistics of the neurons, the partition, the experts; nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.stage import StageRun, main

if TYPE_CHECKING:
    from ffn2moe.spec import MoESpec

IDENTITY_TOLERANCE = 1e-5  # largest difference allowed between the dense model and its K = E mixture


def run(stage: StageRun) -> None:
    from ffn2moe import checkpoint, oracle
    from ffn2moe.dense import ffn_modules, load_dense, read_ffn
    from ffn2moe.encode import choose_device, module_inputs
    from ffn2moe.factorise import carve, every_expert, output_of
    from ffn2moe.moe import install_moe
    from ffn2moe.router import neutral_scale
    from ffn2moe.train import Batch

    params, root = stage.params, stage.root
    settings = params.decompose
    model, tokenizer = load_dense(str(root / "data/teacher"))
    texts = corpus.read_texts(root / "data/corpus/calibration.jsonl")
    inputs = module_inputs(
        model,
        ffn_modules(model),
        tokenizer,
        texts,
        max_length=params.teacher.max_length,
        max_tokens=settings.calibration_tokens,
        device=choose_device(params.compute.device),
    )
    model.to("cpu")
    spec = describe(stage, model)
    layers = [
        carve(read_ffn(model, index), x_TD, spec, index, seed=params.seed)
        for index, x_TD in stage.track(enumerate(inputs), len(inputs), "dividing layers")
    ]
    rows: list[dict[str, Any]] = []
    for index, (moe, x_TD) in enumerate(zip(layers, inputs, strict=True)):
        best = oracle.best_scale(moe, x_TD)
        rows.append({"layer": index, "oracle_error": best.error, "scale": best.scale})

    batch = tokenizer(
        texts[:32], truncation=True, max_length=params.teacher.max_length, padding=True, return_tensors="pt"
    )
    check = Batch({name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"])
    dense = output_of(model, check)
    install_moe(model, layers)
    with every_expert(layers):
        difference = (output_of(model, check) - dense).abs().max().item()
    if not difference <= IDENTITY_TOLERANCE:
        raise ValueError(
            f"with all experts active the mixture differs from the dense model by {difference:.1e}, more than "
            f"{IDENTITY_TOLERANCE:.0e}: {params.teacher.source} computes its FFNs in another way than the family "
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
            "expert_width": spec.expert_width,
            "active_ffn_share": spec.active_share,
            "calibration_tokens": len(inputs[0]),
        },
    )
    stage.say(f"all experts active differ from the dense model by {difference:.1e}")


def describe(stage: StageRun, model: Any) -> MoESpec:
    """The spec of the mixture that the parameters ask of this model; says so when experts need padding."""
    from ffn2moe.dense import head_of, pooling_of
    from ffn2moe.moe import spec_of

    params = stage.params
    head = head_of(model.config)
    spec = spec_of(
        model,
        head=head,
        num_experts=params.decompose.num_experts,
        num_active=params.decompose.num_active,
        partition=params.decompose.partition,
        teacher=params.teacher.source,
        pooling=pooling_of(stage.root / "data/teacher") if head == "embedding" else None,
        max_length=params.teacher.max_length,
    )
    for shape in spec.stacks:
        padding = shape.shared_width + spec.num_experts * shape.expert_width - shape.ffn_width
        if padding:
            stage.say(
                f"{shape.ffn_width} neurons do not divide by {spec.num_experts} experts: {padding} zero neurons fill "
                f"them up to {shape.expert_width} each, which changes no result"
            )
    return spec


if __name__ == "__main__":
    main("decompose", run)
