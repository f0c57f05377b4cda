"""Stage 5: teacher, training-free mixture and distilled mixture, side by side on the same texts.

Everything is computed in float32 and nothing is timed, so that the same models give the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks import judge_embeddings, judge_logits
from tasks.stage import StageRun, main
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from ffn2moe.spec import MoESpec

DIAGNOSED_TOKENS = 8192  # of held-out texts, on which oracle, router and load of each layer are measured
TRAINING_FREE, STUDENT = "models/routed", "models/distilled"


def run(stage: StageRun) -> None:
    from ffn2moe import checkpoint, metrics
    from ffn2moe.dense import load_dense
    from ffn2moe.encode import choose_device

    params, root = stage.params, stage.root
    device = choose_device(params.compute.device)
    spec = checkpoint.load_spec(root / STUDENT)
    teacher, tokenizer = load_dense(str(root / "data/teacher"), head=spec.head)
    student = checkpoint.load(root / STUDENT)
    models = {"teacher": teacher, "training_free": checkpoint.load(root / TRAINING_FREE), "student": student}
    judge = judge_embeddings.judge if spec.head == "embedding" else judge_logits.judge
    payload = judge(stage, models, tokenizer, spec, device)

    layers = diagnose(stage, student, tokenizer, spec, device)
    teacher_flops, student_flops = metrics.flops_per_token(spec, teacher.config, params.teacher.max_length)
    payload |= {
        "layers": layers,
        "active_ffn_share": spec.active_share,
        "flops_per_token": {
            "teacher": teacher_flops.total,
            "student": student_flops.total,
            "length": params.teacher.max_length,
        },
        "amdahl_bound": metrics.amdahl_bound(teacher_flops, spec.active_share),
        "parameters": metrics.parameters(teacher, student),
    }
    payload = rounded(payload)
    stage.write_json("metrics/evaluate.json", payload)
    stage.write_csv(
        "metrics/plots/layers.csv",
        [{key: value for key, value in row.items() if key != "load"} for row in payload["layers"]],
    )
    stage.write_csv(
        "metrics/plots/load.csv",
        [
            {"layer": row["layer"], "expert": expert, "share": share}
            for row in payload["layers"]
            for expert, share in enumerate(row["load"])
        ],
    )


def diagnose(stage: StageRun, student: Any, tokenizer: Any, spec: MoESpec, device: str) -> list[dict[str, Any]]:
    """Oracle, router and load of every layer of the student, on its own inputs over held-out texts."""
    from ffn2moe import metrics, oracle
    from ffn2moe.factorise import layer_inputs, texts_of
    from ffn2moe.moe import moe_layers
    from ffn2moe.texts import text_means

    layers = moe_layers(student)
    tokens = read_tokens(
        stage.root / "data/corpus/evaluation.jsonl",
        spec.head,
        tokenizer,
        stage.params.teacher.max_length,
        packed=False,
    )
    batch_texts = stage.params.evaluate.batch_texts
    inputs = layer_inputs(student, tokens.in_order(batch_texts), max_tokens=DIAGNOSED_TOKENS, device=device)
    text_T = route_TD = None
    if spec.routing == "sequence":
        text_T = texts_of(tokens.in_order(batch_texts), DIAGNOSED_TOKENS)
        route_TD = text_means(inputs[0], text_T)
    student.to("cpu")
    rows = []
    for index, x_TD in stage.track(enumerate(inputs), len(layers), "diagnosing layers"):
        moe = layers[index]
        choice = moe.router.choose(moe.scores(x_TD, route_TD), moe.num_active)
        load = metrics.load(choice.pairs()[1], moe.num_experts)
        rows.append(
            {
                "layer": index,
                **oracle.diagnose(moe, x_TD, text_T=text_T, route_TD=route_TD),
                "max_over_mean_load": load.max_over_mean,
                "dead_experts": load.dead_experts,
                "load": load.share_E,
            }
        )
    return rows


def rounded(tree: Any) -> Any:
    """Six decimals: more than a benchmark of this size can tell apart, and readable."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return round(tree, 6) if isinstance(tree, float) else tree


if __name__ == "__main__":
    main("evaluate", run)
