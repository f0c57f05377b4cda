"""Stage 3: the routers, each layer by itself on the dense teacher's inputs; no expert changes.

The oracle's choices are the labels, ridge regression the start, the repaired Prior-Approximate loss the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.stage import StageRun, main

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.moe import MoEFFN

REPORTED_EVERY = 10  # steps
HELD_OUT_TOKENS = 8192  # of the calibration texts, which the routers are not trained on


def run(stage: StageRun) -> None:
    from ffn2moe import checkpoint, oracle
    from ffn2moe.dense import ffn_modules, load_dense
    from ffn2moe.encode import choose_device, module_inputs
    from ffn2moe.moe import moe_layers

    params, root = stage.params, stage.root
    teacher, tokenizer = load_dense(str(root / "data/teacher"))
    student = checkpoint.load(root / "models/decomposed")
    spec = checkpoint.load_spec(root / "models/decomposed")

    def inputs_on(split: str, max_tokens: int) -> list[Tensor]:
        return module_inputs(
            teacher,
            ffn_modules(teacher),
            tokenizer,
            corpus.read_texts(root / f"data/corpus/{split}.jsonl"),
            max_length=params.teacher.max_length,
            max_tokens=max_tokens,
            device=choose_device(params.compute.device),
        )

    train = inputs_on("train", params.train_router.tokens)
    held_out = inputs_on("calibration", HELD_OUT_TOKENS)
    rows: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    for index, moe in stage.track(enumerate(moe_layers(student)), spec.num_layers, "training routers"):
        losses = fit(stage, moe, train[index], seed=params.seed + index)
        curve += [{"layer": index, "step": i, "loss": loss} for i, loss in enumerate(losses) if i % REPORTED_EVERY == 0]
        row = {"layer": index, **oracle.diagnose(moe, held_out[index]), "scale": moe.output_scale.item()}
        stage.log_metrics({f"router_error.layer_{index}": row["router_error"]})
        rows.append(row)
    with stage.out("models/routed") as out:
        checkpoint.save(student, tokenizer, spec, out)
    stage.write_json("metrics/train_router.json", {"layers": rows, "tokens": len(train[0])})
    stage.write_csv("metrics/plots/train_router.csv", curve or [{"layer": 0, "step": 0, "loss": 0.0}])
    recall = sum(row["router_recall"] for row in rows) / len(rows)
    stage.say(f"the routers find {100 * recall:.0f} % of the experts that the oracle chooses")


def fit(stage: StageRun, moe: MoEFFN, x_TD: Tensor, seed: int) -> list[float]:
    """Fits one layer's router to the oracle, and its scale and mean to the router; returns the losses."""
    from ffn2moe import oracle
    from ffn2moe.losses import softmax_target
    from ffn2moe.router import ridge
    from ffn2moe.train import train_router

    settings = stage.params.train_router
    survey = oracle.survey(moe, x_TD)
    moe.router.set(*ridge(x_TD, survey.norm_TE, settings.ridge))
    losses = train_router(
        moe.router,
        x_TD,
        softmax_target(survey.gain_TE, moe.num_active),
        steps=settings.steps,
        batch_tokens=settings.batch_tokens,
        learning_rate=settings.learning_rate,
        seed=seed,
    )
    curve = list(losses)
    moe.fit_scale_and_mean(x_TD)
    return curve


if __name__ == "__main__":
    main("train_router", run)
