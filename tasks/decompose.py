"""Stage 2: statistics of the neurons, the partition, the experts; nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.stage import StageRun, main

if TYPE_CHECKING:
    from ffn2moe.dense import DenseFFN
    from ffn2moe.moe import MoEFFN
    from ffn2moe.spec import MoESpec

IDENTITY_TOLERANCE = 1e-5  # largest difference allowed between the dense model and its K = E mixture


def run(stage: StageRun) -> None:
    from ffn2moe import checkpoint, oracle
    from ffn2moe.activations import NeuronStatistics
    from ffn2moe.dense import ffn_modules, load_dense, read_ffn
    from ffn2moe.encode import choose_device, module_inputs
    from ffn2moe.experts import neurons_by_expert, slice_experts
    from ffn2moe.moe import MoEFFN, install_moe
    from ffn2moe.partition import partition

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
    spec = describe(stage, model, read_ffn(model, 0), len(inputs))

    layers: list[MoEFFN] = []
    rows: list[dict[str, Any]] = []
    for index, x_TD in stage.track(enumerate(inputs), len(inputs), "dividing layers"):
        ffn = read_ffn(model, index)
        statistics = NeuronStatistics(ffn.ffn_width)
        for x in x_TD.split(4096):
            statistics.update(ffn.neurons(x))
        neurons_EM = neurons_by_expert(
            partition(settings.partition, ffn, statistics, spec.num_experts, params.seed), spec.num_experts
        )
        moe = MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM), neurons_EM).eval()
        best = oracle.best_scale(moe, x_TD)
        layers.append(moe)
        rows.append({"layer": index, "oracle_error": best.error, "scale": best.scale})

    difference = identity(model, layers, tokenizer, texts[:32], params.teacher.max_length)
    if not difference <= IDENTITY_TOLERANCE:
        raise ValueError(
            f"with all experts active the mixture differs from the dense model by {difference:.1e}, more than "
            f"{IDENTITY_TOLERANCE:.0e}: {params.teacher.source} computes its FFNs in another way than the family "
            f"{spec.family!r} says, so its experts would be wrong"
        )
    install_moe(model, layers)
    for moe, row in zip(layers, rows, strict=True):
        moe.num_active = spec.num_active
        moe.set_scale(row["scale"])
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


def describe(stage: StageRun, model: Any, ffn: DenseFFN, num_layers: int) -> MoESpec:
    """The spec of the mixture that the parameters ask of this model; says so when experts need padding."""
    from ffn2moe.dense import family_of, pooling_of
    from ffn2moe.spec import MoESpec

    params = stage.params
    num_experts = params.decompose.num_experts
    expert_width = -(-ffn.ffn_width // num_experts)
    padding = num_experts * expert_width - ffn.ffn_width
    if padding:
        stage.say(
            f"{ffn.ffn_width} neurons do not divide by {num_experts} experts: {padding} zero neurons fill them up "
            f"to {expert_width} each, which changes no result"
        )
    return MoESpec(
        family=family_of(model).name,
        model_class=type(model).__name__,
        width=ffn.w_in_FD.shape[1],
        ffn_width=ffn.ffn_width,
        num_layers=num_layers,
        num_experts=num_experts,
        expert_width=expert_width,
        num_active=params.decompose.num_active,
        gated=ffn.gated,
        activation=ffn.activation,
        partition=params.decompose.partition,
        teacher=params.teacher.source,
        pooling=pooling_of(stage.root / "data/teacher"),
        max_length=params.teacher.max_length,
    )


def identity(model: Any, layers: list[MoEFFN], tokenizer: Any, texts: list[str], max_length: int) -> float:
    """Largest difference between the dense model's hidden states and those of its mixture with K = E."""
    import copy

    import torch

    from ffn2moe.moe import install_moe

    batch = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mixture = copy.deepcopy(model)
    install_moe(mixture, layers)
    for moe in layers:
        moe.num_active = moe.num_experts
    real_BL1 = inputs["attention_mask"].bool().unsqueeze(-1)
    with torch.no_grad():
        difference = model(**inputs).last_hidden_state - mixture(**inputs).last_hidden_state
    return (difference * real_BL1).abs().max().item()


if __name__ == "__main__":
    main("decompose", run)
