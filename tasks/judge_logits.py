"""Judge models with logits by the text itself, and by how close they stay to the teacher.

A language model predicts each token of held-out texts. A seq2seq model reads the teacher's own answers and predicts the
next token at each position. A classifier gives one distribution for a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.stage import StageRun
from tasks.tokens import Tokens, read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.data.batches import Batch
    from ffn2moe.spec import MoESpec

EXAMPLES, SNIPPET = 3, 400  # example texts, characters shown of each
PROMPT_TOKENS = 8  # of a held-out text, which a language model continues


@dataclass(frozen=True)
class Judged:
    """One model on every text, [N] each: sums over the positions of a text.

    Only language models have `nats_N`, because their text holds the next token.
    """

    positions_N: Tensor
    nats_N: Tensor | None
    divergence_N: Tensor  # of the teacher's distributions from the model's
    agreed_N: Tensor  # positions with the teacher's most probable token, or class


def judge(stage: StageRun, models: Mapping[str, Any], tokenizer: Any, spec: MoESpec, device: str) -> dict[str, Any]:
    """Return the figures of `teacher`, `training_free` and `student`, what the last two keep, and examples."""
    seed, batch_texts = stage.params.seed, stage.params.evaluate.batch_texts
    for model in models.values():
        model.to(device).eval()
    path = stage.root / "data/corpus/evaluation.jsonl"
    tokens = read_tokens(path, spec.head, tokenizer, spec.max_length, packed=False)
    if spec.head == "causal":
        tokens = Tokens(tokens.head, [ids for ids in tokens.ids if len(ids) > 1], None, tokens.pad_id)
    judged, _ = compare(stage, models, tokens, batch_texts, device)
    scores = {name: Scores.of(model, judged["teacher"], seed, name == "teacher") for name, model in judged.items()}
    for name, score in scores.items():
        stage.say(f"{name}: {score.summary()}")
    right = accuracies(stage, models, batch_texts, device, tokens.pad_id) if spec.head == "classification" else {}
    for set_name, by_model in right.items():
        for name, right_N in by_model.items():
            scores[name].add_accuracy(set_name, right_N, by_model["teacher"], seed, name == "teacher")
    found: dict[str, Any] = {name: score.figures for name, score in scores.items()}
    for name, suffix in (("student", ""), ("training_free", "_training_free")):
        found[f"retention{suffix}"], found[f"retention_interval{suffix}"] = scores[name].ratios, scores[name].limits
    found["head"] = spec.head
    found["examples"] = examples(stage, models, tokenizer, tokens, device)
    found["evaluated"] = {
        "texts": len(tokens.ids),
        "positions": int(judged["teacher"].positions_N.sum()),
        "classification": {name: len(by_model["teacher"]) for name, by_model in right.items()},
    }
    return found


@dataclass(frozen=True)
class Scores:
    """One model's figures, their shares of the teacher's, and the 95 % intervals of the shares; nested alike."""

    figures: dict[str, Any]
    ratios: dict[str, Any]
    limits: dict[str, Any]

    @classmethod
    def of(cls, model: Judged, teacher: Judged, seed: int, is_teacher: bool) -> Scores:
        """Return the scores of a model on the held-out texts; the teacher has none beside itself."""
        from ffn2moe import metrics

        scores = cls({}, {}, {})
        if model.nats_N is not None and teacher.nats_N is not None:
            perplexity = metrics.perplexity(model.nats_N, model.positions_N)
            interval = metrics.perplexity_interval(model.nats_N, model.positions_N, seed=seed)
            scores.figures["language"] = {"perplexity": perplexity, "perplexity_interval": asdict(interval)}
            ratio = metrics.perplexity(teacher.nats_N, model.positions_N) / perplexity
            scores.ratios["language"] = {"perplexity": ratio}
            kept = metrics.perplexity_ratio_interval(teacher.nats_N, model.nats_N, model.positions_N, seed=seed)
            scores.limits["language"] = {"perplexity": asdict(kept)}
        if not is_teacher:
            near = {}
            for key, sums_N in (("divergence", model.divergence_N), ("agreement", model.agreed_N)):
                near[key] = (sums_N.sum() / model.positions_N.sum()).item()
                interval = metrics.mean_ratio_interval(sums_N, model.positions_N, seed=seed)
                near[f"{key}_interval"] = asdict(interval)
            scores.figures["to_teacher"] = near
            scores.ratios["to_teacher"] = {"agreement": near["agreement"]}
            scores.limits["to_teacher"] = {"agreement": near["agreement_interval"]}
        return scores

    def add_accuracy(self, set_name: str, right_N: Tensor, teacher_N: Tensor, seed: int, is_teacher: bool) -> None:
        """Add the accuracy on a labelled set; `right_N` and `teacher_N` say which texts are right."""
        from ffn2moe import metrics

        accuracy, whole = right_N.double().mean().item(), teacher_N.double().mean().item()
        self.figures.setdefault("classification", {})[set_name] = {"accuracy": accuracy}
        if not is_teacher and whole:
            interval = metrics.mean_ratio_interval(right_N, teacher_N, seed=seed)
            self.ratios.setdefault("classification", {})[set_name] = {"accuracy": accuracy / whole}
            self.limits.setdefault("classification", {})[set_name] = {"accuracy": asdict(interval)}

    def summary(self) -> str:
        """Return the figures as a line."""
        parts = []
        if "language" in self.figures:
            parts.append(f"perplexity {self.figures['language']['perplexity']:.3f}")
        if "to_teacher" in self.figures:
            near = self.figures["to_teacher"]
            parts.append(f"{near['divergence']:.4f} nats from the teacher, {100 * near['agreement']:.1f} % agreement")
        return ", ".join(parts) or "the reference of the others"


def compare(
    stage: StageRun, models: Mapping[str, Any], tokens: Tokens, batch_texts: int, device: str
) -> tuple[dict[str, Judged], dict[str, Tensor]]:
    """Run all models on the same batches; return their sums, and the top choice of each at the last position, [N]."""
    import torch

    from ffn2moe import metrics

    sums: dict[str, list[tuple[float, ...]]] = {name: [] for name in models}
    choices: dict[str, list[int]] = {name: [] for name in models}
    total = -(-len(tokens.ids) // batch_texts)
    with torch.no_grad():
        for batch in stage.track(tokens.in_order(batch_texts), total, "judging"):
            moved = batch.to(torch.device(device))
            logits = {name: model(**moved.inputs).logits.float().cpu() for name, model in models.items()}
            for row in range(len(batch.inputs["input_ids"])):
                place, target = judged_positions(batch, tokens.head, row)
                teacher_TV = logits["teacher"][row].reshape(-1, logits["teacher"].shape[-1])[place]
                for name, found in logits.items():
                    model_TV = found[row].reshape(-1, found.shape[-1])[place]
                    agreed = model_TV.argmax(-1) == teacher_TV.argmax(-1)
                    nats = 0.0 if target is None else metrics.nats(model_TV, target).sum().item()
                    divergence = metrics.divergence(teacher_TV, model_TV).sum().item()
                    sums[name].append((len(model_TV), nats, divergence, agreed.sum().item()))
                    choices[name].append(int(model_TV[-1].argmax()))
    judged = {}
    for name, rows in sums.items():
        positions_N, nats_N, divergence_N, agreed_N = torch.tensor(rows, dtype=torch.float64).unbind(1)
        judged[name] = Judged(positions_N, nats_N if tokens.head == "causal" else None, divergence_N, agreed_N)
    return judged, {name: torch.tensor(found) for name, found in choices.items()}


def judged_positions(batch: Batch, head: str, row: int) -> tuple[slice, Tensor | None]:
    """Return which positions of a row of logits are judged, and the next token at each where the text holds it."""
    if batch.mask is None:
        return slice(0, 1), None
    length = int(batch.mask[row].sum())
    if head == "causal":
        return slice(0, length - 1), batch.inputs["input_ids"][row, 1:length]
    return slice(0, length), None


def accuracies(
    stage: StageRun, models: Mapping[str, Any], batch_texts: int, device: str, pad_id: int
) -> dict[str, dict[str, Tensor]]:
    """Return set -> model -> which labelled texts the model gets right, [N]."""
    import torch

    folder: Path = stage.root / "data/benchmarks/classification"
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        rows = corpus.read_jsonl(path / "dev.jsonl")
        tokens = Tokens("classification", [row["ids"] for row in rows], None, pad_id)
        _, choices = compare(stage, models, tokens, batch_texts, device)
        label_N = torch.tensor([row["label"] for row in rows])
        found[path.name] = {name: choice_N == label_N for name, choice_N in choices.items()}
    return found


def examples(
    stage: StageRun, models: Mapping[str, Any], tokenizer: Any, tokens: Tokens, device: str
) -> list[dict[str, Any]]:
    """Return what each model gives for the first held-out texts: a continuation, an answer, or a class."""
    rows = []
    for ids in tokens.ids[:EXAMPLES]:
        given = ids[: min(PROMPT_TOKENS, len(ids) - 1)] if tokens.head == "causal" else ids
        row: dict[str, Any] = {"given": snippet(tokenizer.decode(given, skip_special_tokens=True))}
        for name, model in models.items():
            row[name] = answer(stage, model, tokenizer, given, tokens.head, device)
        rows.append(row)
    return rows


def answer(stage: StageRun, model: Any, tokenizer: Any, ids: Sequence[int], head: str, device: str) -> str:
    """Return the most probable class, or the greedy continuation or answer."""
    import torch

    from ffn2moe.dense.families import positions

    ids_1L = torch.tensor([ids], device=device)
    with torch.no_grad():
        if head == "classification":
            share_C = model(input_ids=ids_1L).logits[0].float().softmax(-1)
            label = model.config.id2label[int(share_C.argmax())]
            return f"{label} ({100 * share_C.max().item():.0f} %)"
        room = (positions(model.config) or len(ids) + stage.params.evaluate.continuation) - len(ids)
        length = (
            stage.params.evaluate.continuation if head == "seq2seq" else min(stage.params.evaluate.continuation, room)
        )
        found = model.generate(
            input_ids=ids_1L,
            attention_mask=torch.ones_like(ids_1L),
            max_new_tokens=max(1, length),
            do_sample=False,
            num_beams=1,
        )[0].tolist()
    said = tokenizer.decode(found, skip_special_tokens=True)
    if head == "seq2seq":
        return snippet(said)
    # Decode the whole text and remove the prompt: the new tokens alone lose the space before the first.
    return snippet(said.removeprefix(tokenizer.decode(ids, skip_special_tokens=True)))


def snippet(text: str) -> str:
    """Return a text as one line, shortened to SNIPPET characters."""
    line = " ".join(text.split())
    return line if len(line) <= SNIPPET else line[: SNIPPET - 1].rstrip() + "…"
