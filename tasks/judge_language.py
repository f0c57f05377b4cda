"""Judge language models by the sets of the data folder: questions with several answers, and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks import language_sets
from tasks.measures import TASKS_KEPT
from tasks.scores import Scores
from tasks.stage import StageRun

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.judges.items import Item
    from ffn2moe.judges.reading import Reading

JUDGED = ("teacher", "training_free", "student")


def add_sets(
    stage: StageRun, models: Mapping[str, Any], tokenizer: Any, scores: Mapping[str, Scores]
) -> dict[str, Any]:
    """Add the figures of teacher, training-free mixture and student; return how much they were judged by."""
    from ffn2moe.dense.families import positions
    from ffn2moe.judges.items import spread

    sets = language_sets.read(stage.root / "data/benchmarks/language")
    longest = positions(models["teacher"].config)
    judged = {name: models[name] for name in JUDGED}
    told: dict[str, Any] = {"questions": {}}
    rights = {}
    for task, items in sets.questions.items():
        asked = spread(items, stage.params.evaluate.most_questions)
        told["questions"][task] = len(asked)
        rights[task] = asked, answered(stage, judged, tokenizer, task, asked, longest)
    add_answers(stage, scores, rights)
    if sets.text is not None:
        told["text_positions"] = add_text(stage, judged, tokenizer, scores, sets.text, longest)
    return told


def answered(
    stage: StageRun, models: Mapping[str, Any], tokenizer: Any, task: str, items: Sequence[Item], longest: int | None
) -> dict[str, dict[str, Tensor]]:
    """Return which questions each model answers rightly, [N], by the names of model and figure."""
    from ffn2moe.judges.answers import right
    from ffn2moe.judges.asked import ask
    from ffn2moe.judges.items import TASKS
    from ffn2moe.judges.likelihood import log_likelihoods

    sheet = ask(items, tokenizer, longest)
    found = {}
    for name, model in models.items():
        nats_A = log_likelihoods(model, sheet.asked, track=stage.track, what=f"{name}: {TASKS[task].title}")
        found[name] = {figure: right(items, nats_A, figure) for figure in TASKS[task].figures}
    return found


def add_answers(
    stage: StageRun,
    scores: Mapping[str, Scores],
    rights: Mapping[str, tuple[Sequence[Item], Mapping[str, Mapping[str, Tensor]]]],
) -> None:
    """Add accuracies, what is kept of the teacher's above chance, and the mean of that over the tasks."""
    from ffn2moe.judges.answers import Compared, kept, kept_interval
    from ffn2moe.judges.items import TASKS

    seed = stage.params.seed
    judged_by: dict[str, list[Compared]] = {name: [] for name in JUDGED}
    for task, (items, found) in rights.items():
        for name in JUDGED:
            for figure, right_N in found[name].items():
                path = ("tasks", task, figure)
                scores[name].add(path, right_N.mean().item())
                both = Compared.of(items, right_N, found["teacher"][figure])
                if not both.known:
                    continue
                if name != "teacher":
                    scores[name].keep(path, both.kept(), kept_interval([both], seed=seed))
                if figure == TASKS[task].figures[0]:
                    judged_by[name].append(both)
        first = TASKS[task].figures[0]
        if not Compared.of(items, *(found["teacher"][first],) * 2).known:
            stage.say(
                f"{TASKS[task].title}: the teacher is not above chance beyond the noise: there is nothing to keep"
            )
    for name, compared in judged_by.items():
        if compared:
            scores[name].add(TASKS_KEPT, kept(compared))
            if name != "teacher":
                scores[name].keep(TASKS_KEPT, kept(compared), kept_interval(compared, seed=seed))


def add_text(
    stage: StageRun,
    models: Mapping[str, Any],
    tokenizer: Any,
    scores: Mapping[str, Scores],
    text: str,
    longest: int | None,
) -> int:
    """Add perplexity, divergence and agreement on the text; return how many positions were judged."""
    from ffn2moe import metrics
    from ffn2moe.judges.reading import BLOCK, blocks, read

    found = blocks(tokenizer, text, BLOCK if longest is None else min(BLOCK, longest))
    readings = read(models, found, teacher="teacher", track=stage.track, what="reading the text")
    teacher, seed = readings["teacher"], stage.params.seed
    for name, reading in readings.items():
        perplexity = metrics.perplexity(reading.nats_N, reading.positions_N)
        scores[name].add(("text", "perplexity"), perplexity)
        if name == "teacher":
            continue
        interval = metrics.perplexity_ratio_interval(teacher.nats_N, reading.nats_N, reading.positions_N, seed=seed)
        whole = metrics.perplexity(teacher.nats_N, teacher.positions_N)
        scores[name].keep(("text", "perplexity"), whole / perplexity, interval)
        scores[name].add(("text", "divergence"), mean(reading.divergence_N, reading))
        scores[name].add(("text", "agreement"), mean(reading.agreed_N, reading))
    return int(teacher.positions_N.sum())


def mean(sums_N: Tensor, reading: Reading) -> float:
    """Return the mean of a figure over all judged positions."""
    return (sums_N.sum() / reading.positions_N.sum()).item()
