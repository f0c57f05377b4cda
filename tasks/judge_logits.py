"""Judge models that write text by the text itself, and by how close they stay to the teacher.

A language model predicts each token of held-out texts. A seq2seq model reads the teacher's own answers and predicts the
next token at each position; the share that it keeps of the teacher's choices is above chance, which a model that always
writes the same token does not reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tasks.examples import examples
from tasks.judge_language import add_sets
from tasks.scores import Scores, payload
from tasks.stage import StageRun
from tasks.tokens import Tokens, read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.data.batches import Batch
    from ffn2moe.spec import MoESpec


MOST_TOKENS = 2**15  # of the held-out texts that judge a language model: all of them would take most of a run


@dataclass(frozen=True)
class Judged:
    """One model on every text: sums over the positions of each text, [N], and its choice at each position, [T].

    Only language models have `nats_N`, because their text holds the next token.
    """

    positions_N: Tensor
    nats_N: Tensor | None
    divergence_N: Tensor  # of the teacher's distributions from the model's
    choice_T: Tensor  # the most probable token


def judge(stage: StageRun, models: Mapping[str, Any], tokenizer: Any, spec: MoESpec, device: str) -> dict[str, Any]:
    """Return the figures of `teacher`, `training_free` and `student`, what the last two keep, and examples."""
    for model in models.values():
        model.to(device).eval()
    path = stage.root / "data/corpus/evaluation.jsonl"
    tokens = read_tokens(path, spec.head, tokenizer, spec.max_length, packed=False)
    if spec.head == "causal":
        tokens = Tokens(tokens.head, [ids for ids in tokens.ids if len(ids) > 1], None, tokens.pad_id)
        tokens = tokens.beginning(MOST_TOKENS)
    judged = compare(stage, models, tokens)
    scores = {}
    for name, model in judged.items():
        scores[name] = Scores()
        add_perplexity(scores[name], model, judged["teacher"], stage.params.seed, name == "teacher")
        if name != "teacher":
            add_nearness(scores[name], model, judged["teacher"], spec.head, stage.params.seed)
        stage.say(f"{name}: {summary(scores[name])}")
    asked = add_sets(stage, models, tokenizer, scores) if spec.head == "causal" else {}
    return payload(scores) | {
        "head": spec.head,
        "examples": examples(stage, models, tokenizer, tokens, None),
        "evaluated": {
            "texts": len(tokens.ids),
            "positions": int(judged["teacher"].positions_N.sum()),
            "classification": {},
            **asked,
        },
    }


def add_perplexity(scores: Scores, model: Judged, teacher: Judged, seed: int, is_teacher: bool) -> None:
    """Add the perplexity of a language model, and the teacher's over it."""
    from ffn2moe import metrics

    if model.nats_N is None or teacher.nats_N is None:
        return
    path = ("language", "perplexity")
    perplexity = metrics.perplexity(model.nats_N, model.positions_N)
    interval = metrics.perplexity_interval(model.nats_N, model.positions_N, seed=seed)
    scores.add(path, perplexity)
    scores.add(("language", "perplexity_interval"), asdict(interval))
    kept = metrics.perplexity_ratio_interval(teacher.nats_N, model.nats_N, model.positions_N, seed=seed)
    scores.keep(path, metrics.perplexity(teacher.nats_N, model.positions_N) / perplexity, kept)


def add_nearness(scores: Scores, model: Judged, teacher: Judged, head: str, seed: int) -> None:
    """Add how near the distributions and choices of a model are to the teacher's."""
    import torch

    from ffn2moe import metrics

    text_T = torch.arange(len(model.positions_N)).repeat_interleave(model.positions_N.long())
    agreed_T = (model.choice_T == teacher.choice_T).double()
    agreed_N = torch.zeros_like(model.positions_N).index_add_(0, text_T, agreed_T)
    for key, sums_N in (("divergence", model.divergence_N), ("agreement", agreed_N)):
        value = (sums_N.sum() / model.positions_N.sum()).item()
        interval = metrics.mean_ratio_interval(sums_N, model.positions_N, seed=seed)
        scores.add(("to_teacher", key), value)
        scores.add(("to_teacher", f"{key}_interval"), asdict(interval))
        if key == "agreement":
            scores.keep(("to_teacher", key), value, interval)
    if head == "seq2seq":
        kappa = metrics.kappa(teacher.choice_T, model.choice_T)
        assert kappa is not None, "prepare refuses a teacher that answers everything with one token"
        interval = metrics.kappa_interval(teacher.choice_T, model.choice_T, text_N=text_T, seed=seed)
        scores.add(("to_teacher", "kappa"), kappa)
        scores.keep(("to_teacher", "kappa"), kappa, interval)


def summary(scores: Scores) -> str:
    """Return the figures as a line."""
    parts = []
    if "language" in scores.figures:
        parts.append(f"perplexity {scores.figures['language']['perplexity']:.3f}")
    if "to_teacher" in scores.figures:
        near = scores.figures["to_teacher"]
        parts.append(f"{near['divergence']:.4f} nats from the teacher, {100 * near['agreement']:.1f} % agreement")
        if "kappa" in near:
            parts.append(f"kappa {near['kappa']:.4f}")
    return ", ".join(parts) or "the reference of the others"


def compare(stage: StageRun, models: Mapping[str, Any], tokens: Tokens) -> dict[str, Judged]:
    """Run all models on the same batches, and return what is judged of each."""
    import torch

    from ffn2moe import metrics

    batch_texts = stage.params.evaluate.batch_texts
    sums: dict[str, list[tuple[float, ...]]] = {name: [] for name in models}
    choices: dict[str, list[Tensor]] = {name: [] for name in models}
    total = -(-len(tokens.ids) // batch_texts)
    with torch.no_grad():
        for batch in stage.track(tokens.in_order(batch_texts), total, "judging"):
            logits = {
                name: model(**batch.to(model.device).inputs).logits.float().cpu() for name, model in models.items()
            }
            for row in range(len(batch.inputs["input_ids"])):
                place, target = judged_positions(batch, tokens.head, row)
                teacher_TV = logits["teacher"][row, place]
                for name, found in logits.items():
                    model_TV = found[row, place]
                    nats = 0.0 if target is None else metrics.nats(model_TV, target).sum().item()
                    divergence = metrics.divergence(teacher_TV, model_TV).sum().item()
                    sums[name].append((len(model_TV), nats, divergence))
                    choices[name].append(model_TV.argmax(-1))
    judged = {}
    for name, rows in sums.items():
        positions_N, nats_N, divergence_N = torch.tensor(rows, dtype=torch.float64).unbind(1)
        told = nats_N if tokens.head == "causal" else None
        judged[name] = Judged(positions_N, told, divergence_N, torch.cat(choices[name]))
    return judged


def judged_positions(batch: Batch, head: str, row: int) -> tuple[slice, Tensor | None]:
    """Return which positions of a row of logits are judged, and the next token at each where the text holds it."""
    assert batch.mask is not None
    length = int(batch.mask[row].sum())
    if head == "causal":
        return slice(0, length - 1), batch.inputs["input_ids"][row, 1:length]
    return slice(0, length), None
