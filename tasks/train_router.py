"""Stage 3: fit the routers, each layer alone on the dense teacher's inputs, then the experts' outputs.

`ffn2moe.decompose.route.route_layer` fits each router, judges it on held-out texts, and refits the experts' outputs to
the dense FFN in closed form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.layer_map import in_order, layer_map
from tasks.stage import StageRun, main
from tasks.tokens import Tokens, read_tokens
from tasks.widths import fishers_of, widths_by_need

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.spec import MoESpec

REPORTED_EVERY = 10  # steps
HELD_OUT_TOKENS = 8192  # of the calibration texts, which the routers are not trained on


def run(stage: StageRun) -> None:
    from ffn2moe.decompose.inputs import layer_inputs
    from ffn2moe.decompose.jobs import route_job
    from ffn2moe.decompose.layer import dense_ffn
    from ffn2moe.decompose.parts import mixture_from
    from ffn2moe.decompose.route import RouterSettings
    from ffn2moe.decompose.widths import chosen_by_need, experts_are_chosen, widths_for
    from ffn2moe.dense.load import load_dense
    from ffn2moe.dense.reduction import same_layers
    from ffn2moe.moe import checkpoint
    from ffn2moe.moe.install import install_moe
    from ffn2moe.moe.layer import moe_layers
    from ffn2moe.numerics import choose_device

    params, root, settings = stage.params, stage.root, stage.params.train_router
    student = checkpoint.load(root / "models/decomposed")
    spec = checkpoint.load_spec(root / "models/decomposed")
    teacher, tokenizer = load_dense(str(root / "data/teacher"), head=spec.head)
    if spec.is_dense:
        stage.say("a student without experts has no router: nothing is trained here")
        return save(stage, student, tokenizer, spec, [], [], tokens=0)
    teacher = same_layers(teacher, spec)

    device = choose_device(params.compute.device)

    def tokens_of(split: str) -> Tokens:
        path = root / f"data/corpus/{split}.jsonl"
        return read_tokens(path, spec.head, tokenizer, spec.max_length, prompt=spec.prompt)

    def inputs_on(split: str, max_tokens: int) -> list[Tensor]:
        """Return the inputs of every layer on the texts of a split."""
        tokens = tokens_of(split).first_by_length(max_tokens)
        batches = list(tokens.in_order(tokens.at_once))
        return layer_inputs(teacher, batches, max_tokens=max_tokens, device=device, track=stage.track)

    train, held_out = inputs_on("train", settings.tokens), inputs_on("calibration", HELD_OUT_TOKENS)
    rows: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    layers = moe_layers(student)
    wide, fishers = spec, None
    if experts_are_chosen(spec):
        fishers = fishers_of(stage, teacher, spec.head, tokens_of("train").in_order())
        if chosen_by_need(params.decompose.width_per_layer, spec):
            spec = widths_by_need(stage, spec, [dense_ffn(moe) for moe in layers], train, fishers)
    router = RouterSettings(
        steps=settings.steps,
        batch_tokens=settings.batch_tokens,
        seed=params.seed,
        learning_rate=settings.learning_rate,
        start=settings.start,
        ridge=settings.ridge,
        objective=settings.objective,
        refit=settings.refit,
    )
    jobs = [
        route_job(
            moe,
            wide,
            index,
            router.for_layer(index),
            x_TD=train[index],
            held_out_TD=held_out[index],
            widths=widths_for(spec, index),
            fisher_DD=fishers[index] if fishers else None,
        )
        for index, moe in enumerate(layers)
    ]
    for done in in_order(stage.track(layer_map()(jobs), len(jobs), "training routers")):
        layers[done.layer] = mixture_from(done.tensors, spec, done.layer)
        curve += [
            {"layer": done.layer, "step": step, "loss": loss}
            for step, loss in enumerate(done.summary["losses"])
            if step % REPORTED_EVERY == 0
        ]
        rows.append({"layer": done.layer, **done.summary["row"]})
        stage.log_metrics({f"router_error.layer_{done.layer}": rows[-1]["router_error"]})
    install_moe(student, layers)
    save(stage, student, tokenizer, spec, rows, curve, tokens=len(train[0]))
    recall = sum(row["router_recall"] for row in rows) / len(rows)
    stage.say(f"the routers find {100 * recall:.0f} % of the experts that the oracle chooses")


def save(
    stage: StageRun,
    student: Any,
    tokenizer: Any,
    spec: MoESpec,
    rows: list[dict[str, Any]],
    curve: list[dict[str, Any]],
    *,
    tokens: int,
) -> None:
    """Write the student, the metrics of the layers, and the curves of the losses."""
    from ffn2moe.moe import checkpoint

    with stage.out("models/routed") as out:
        checkpoint.save(student, tokenizer, spec, out)
    stage.write_json("metrics/train_router.json", {"layers": rows, "tokens": tokens})
    stage.write_csv("metrics/plots/train_router.csv", curve or [{"layer": 0, "step": 0, "loss": 0.0}])


if __name__ == "__main__":
    main("train_router", run)
