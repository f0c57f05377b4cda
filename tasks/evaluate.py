"""Stage 5: judge teacher, training-free mixture and distilled mixture on the same texts.

Everything is computed in float32 and nothing is timed, so that the same models give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ffn2moe.table import Table
from tasks import judge_classifiers, judge_embeddings, judge_logits
from tasks.corpus import read_jsonl
from tasks.measures import at, headline
from tasks.stage import StageRun, main
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from ffn2moe.spec import MoESpec

DIAGNOSED_TOKENS = 8192  # held-out tokens that measure oracle, router and load of each layer
TRAINING_FREE, STUDENT = "models/routed", "models/distilled"
ELASTIC = "student_with_"  # followed by K: the name of the student with another of its budgets

JUDGES: Table[Callable[..., dict[str, Any]]] = Table("head")
JUDGES.register("embedding", judge_embeddings.judge)
JUDGES.register("causal", judge_logits.judge)
JUDGES.register("seq2seq", judge_logits.judge)
JUDGES.register("classification", judge_classifiers.judge)
JUDGES.register("token_classification", judge_classifiers.judge)


def run(stage: StageRun) -> None:
    """Write metrics/evaluate.json and the tables of layers and load."""
    from ffn2moe import metrics
    from ffn2moe.dense.load import load_dense
    from ffn2moe.moe import checkpoint
    from ffn2moe.moe.layer import set_active
    from ffn2moe.numerics import choose_device

    params, root = stage.params, stage.root
    device = choose_device(params.compute.device)
    spec = checkpoint.load_spec(root / STUDENT)
    teacher, tokenizer = load_dense(str(root / "data/teacher"), head=spec.head)
    student = checkpoint.load(root / STUDENT)
    models = {"teacher": teacher, "training_free": checkpoint.load(root / TRAINING_FREE), "student": student}
    for active in spec.elastic:
        models[f"{ELASTIC}{active}"] = checkpoint.load(root / STUDENT)
        set_active(models[f"{ELASTIC}{active}"], active)
    payload = JUDGES[spec.head](stage, models, tokenizer, spec, device)

    if spec.elastic:
        payload["budgets"] = budgets(payload, spec)
    layers = [] if spec.is_dense else diagnose(stage, teacher, student, tokenizer, spec, device)
    teacher_flops, student_flops = metrics.flops_per_token(spec, teacher.config, spec.max_length)
    payload |= {
        "layers": layers,
        "agreement": None if spec.is_dense else agreement(stage, student, tokenizer, spec, device),
        "active_ffn_share": spec.active_share,
        "flops_per_token": {
            "teacher": teacher_flops.total,
            "student": student_flops.total,
            "length": spec.max_length,
        },
        "amdahl_bound": metrics.amdahl_bound(teacher_flops, student_flops),
        "parameters": metrics.parameters(teacher, student),
    }
    payload = rounded(payload)
    stage.write_json("metrics/evaluate.json", payload)
    stage.write_csv(
        "metrics/plots/layers.csv",
        [{key: value for key, value in row.items() if not isinstance(value, list | dict)} for row in payload["layers"]]
        or [{"layer": 0, "oracle_error": 0.0, "router_error": 0.0}],
    )
    stage.write_csv(
        "metrics/plots/load.csv",
        [
            {"layer": row["layer"], "expert": expert, "share": share}
            for row in payload["layers"]
            for expert, share in enumerate(row["load"])
        ]
        or [{"layer": 0, "expert": 0, "share": 1.0}],
    )


def diagnose(
    stage: StageRun, teacher: Any, student: Any, tokenizer: Any, spec: MoESpec, device: str
) -> list[dict[str, Any]]:
    """Return the figures of oracle, router and load of every layer of the student, on its own held-out inputs."""
    from ffn2moe.decompose import diagnostics
    from ffn2moe.decompose.inputs import layer_inputs
    from ffn2moe.moe.layer import moe_layers

    layers = moe_layers(student)
    tokens = read_tokens(
        stage.root / "data/corpus/evaluation.jsonl",
        spec.head,
        tokenizer,
        spec.max_length,
        packed=False,
        prompt=spec.prompt,
    )
    batch_texts = stage.params.evaluate.batch_texts
    inputs = layer_inputs(student, tokens.in_order(batch_texts), max_tokens=DIAGNOSED_TOKENS, device=device)
    student.to("cpu")
    teacher.to("cpu")
    return [
        {"layer": index, **diagnostics.of_layer(layers[index], x_TD)}
        for index, x_TD in stage.track(enumerate(inputs), len(layers), "diagnosing layers")
    ]


def agreement(stage: StageRun, student: Any, tokenizer: Any, spec: MoESpec, device: str) -> dict[str, Any] | None:
    """Return how far the experts of each layer agree with the sources of texts; None, with a line, for one source.

    It uses the calibration texts: they come from every source of the training texts and are not trained on. The sources
    take turns, so that each is among the first tokens.
    """
    from dataclasses import asdict

    from ffn2moe.decompose import diagnostics
    from ffn2moe.decompose.inputs import layer_inputs, texts_of
    from ffn2moe.moe.layer import moe_layers

    path = stage.root / "data/corpus/calibration.jsonl"
    sources = [row.get("source", "unknown") for row in read_jsonl(path)]
    tokens = read_tokens(path, spec.head, tokenizer, spec.max_length, packed=False)
    batch_texts = stage.params.evaluate.batch_texts
    if len(spec.stacks) > 1 or len(set(sources)) < 2:
        why = "the model has two stacks" if len(spec.stacks) > 1 else f"all texts are from {sources[0]}"
        stage.say(f"agreement of experts with the sources of texts is skipped: {why}")
        return None
    order = in_turn(sources)
    sources = [sources[text] for text in order]
    type_ids = tokens.type_ids and [tokens.type_ids[text] for text in order]
    tokens = replace(tokens, ids=[tokens.ids[text] for text in order], type_ids=type_ids)
    text_T = texts_of(tokens.in_order(batch_texts), DIAGNOSED_TOKENS)
    inputs = layer_inputs(student, tokens.in_order(batch_texts), max_tokens=DIAGNOSED_TOKENS, device=device)
    student.to("cpu")
    rows = []
    for index, (moe, x_TD) in enumerate(zip(moe_layers(student), inputs, strict=True)):
        choice = diagnostics.chosen(moe, x_TD)
        rows.append({"layer": index, **asdict(diagnostics.agreement(choice, text_T, sources, moe.num_experts))})
    seen = [sources[text] for text in text_T.unique().tolist()]
    return {"layers": rows, "texts": {source: seen.count(source) for source in sorted(set(seen))}}


def in_turn(sources: Sequence[str]) -> list[int]:
    """Return the numbers of texts such that their sources take turns; texts of one source stay in order."""
    seen: Counter[str] = Counter()
    turns = []
    for number, source in enumerate(sources):
        turns.append((seen[source], number))
        seen[source] += 1
    return [number for _, number in sorted(turns)]


def budgets(payload: dict[str, Any], spec: MoESpec) -> list[dict[str, Any]]:
    """Return what each K of an elastic student keeps, largest K first; remove their figures from the payload."""
    path = headline(payload).path
    teacher_figure = at(payload["teacher"], path)
    rows = []
    for active in sorted({*spec.elastic, spec.num_active}, reverse=True):
        figures = payload["student"] if active == spec.num_active else payload.pop(f"{ELASTIC}{active}")
        figure = at(figures, path)
        rows.append(
            {
                "num_active": active,
                "active_ffn_share": replace(spec, num_active=active, elastic=()).active_share,
                "figure": figure,
                "retention": figure if teacher_figure is None else headline(payload).retention(figure, teacher_figure),
            }
        )
    return rows


def rounded(tree: Any) -> Any:
    """Round numbers to six decimals: a benchmark of this size resolves no more."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return round(tree, 6) if isinstance(tree, float) else tree


if __name__ == "__main__":
    main("evaluate", run)
