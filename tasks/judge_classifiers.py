"""Judge models that classify texts, pairs of texts or tokens by how near their scores stay to the teacher's.

`ffn2moe.metrics.fidelity` gives the figures of each problem. The share that is kept is their concordance: 1 for equal
scores and 0 for a model that gives every text the same, which agreement alone can take for a good one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import PROBLEMS
from tasks import corpus
from tasks.examples import examples
from tasks.scores import Scores, payload
from tasks.stage import StageRun
from tasks.tokens import Tokens, read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.spec import MoESpec


def judge(stage: StageRun, models: Mapping[str, Any], tokenizer: Any, spec: MoESpec, device: str) -> dict[str, Any]:
    """Return the figures of `teacher`, `training_free` and `student`, what the last two keep, and examples."""
    for model in models.values():
        model.to(device).eval()
    path = stage.root / "data/corpus/evaluation.jsonl"
    tokens = read_tokens(path, spec.head, tokenizer, spec.max_length)
    logits = logits_of(stage, models, tokens)
    scores = {name: Scores() for name in models}
    for name in models:
        if name != "teacher":
            add_nearness(scores[name], str(spec.problem), logits["teacher"], logits[name], tokens, stage.params.seed)
            stage.say(f"{name}: {summary(scores[name])}")
    right = accuracies(stage, models, tokens.pad_id) if PROBLEMS[str(spec.problem)].chooses else {}
    for set_name, by_model in right.items():
        for name, right_N in by_model.items():
            add_accuracy(scores[name], set_name, right_N, by_model["teacher"], stage.params.seed)
    return payload(scores) | {
        "head": spec.head,
        "problem": spec.problem,
        "examples": examples(stage, models, tokenizer, tokens, spec.problem),
        "evaluated": {
            "texts": len(tokens.ids),
            "positions": len(logits["teacher"]),
            "classification": {name: len(by_model["teacher"]) for name, by_model in right.items()},
        },
    }


def logits_of(stage: StageRun, models: Mapping[str, Any], tokens: Tokens) -> dict[str, Tensor]:
    """Return the logits of each model, float32 [N, C]: a row for each text, or for each token."""
    import torch

    batch_texts = stage.params.evaluate.batch_texts
    total = -(-len(tokens.ids) // batch_texts)
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    with torch.no_grad():
        for batch in stage.track(tokens.in_order(batch_texts), total, "judging"):
            for name, model in models.items():
                moved = batch.to(model.device)
                found[name].append(tokens.rows(model(**moved.inputs).logits.float(), moved.mask).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def add_nearness(scores: Scores, problem: str, teacher_NC: Tensor, model_NC: Tensor, tokens: Tokens, seed: int) -> None:
    """Add how near the logits of a model are to the teacher's, and the share of its scores that they keep."""
    from ffn2moe import metrics

    figures = metrics.fidelity(problem, teacher_NC, model_NC)
    for name, value in figures.items():
        scores.add(("to_teacher", name), value)
    interval = metrics.concordance_interval(problem, teacher_NC, model_NC, text_N=tokens.text_of_rows(), seed=seed)
    scores.keep(("to_teacher", metrics.KEPT), figures[metrics.KEPT], interval)


def add_accuracy(scores: Scores, set_name: str, right_N: Tensor, teacher_N: Tensor, seed: int) -> None:
    """Add the accuracy on a labelled set; `right_N` and `teacher_N` say which texts are right."""
    from ffn2moe import metrics

    path = ("classification", set_name, "accuracy")
    accuracy, whole = right_N.double().mean().item(), teacher_N.double().mean().item()
    scores.add(path, accuracy)
    if whole:
        scores.keep(path, accuracy / whole, metrics.mean_ratio_interval(right_N, teacher_N, seed=seed))


def summary(scores: Scores) -> str:
    """Return the figures of a model beside the teacher as a line."""
    near = scores.figures["to_teacher"]
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in near.items())


def accuracies(stage: StageRun, models: Mapping[str, Any], pad_id: int) -> dict[str, dict[str, Tensor]]:
    """Return set -> model -> which labelled texts the model gets right, [N]."""
    import torch

    folder: Path = stage.root / "data/benchmarks/classification"
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        rows = corpus.read_jsonl(path / "dev.jsonl")
        tokens = Tokens("classification", [row["ids"] for row in rows], None, pad_id)
        label_N = torch.tensor([row["label"] for row in rows])
        logits = logits_of(stage, models, tokens)
        found[path.name] = {name: logits_NC.argmax(-1) == label_N for name, logits_NC in logits.items()}
    return found
