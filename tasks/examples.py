"""Show what models with logits give for held-out texts: a continuation, an answer, labels with their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import HEADS, PROBLEMS
from ffn2moe.table import Table
from tasks.stage import StageRun
from tasks.tokens import Tokens

if TYPE_CHECKING:
    import numpy as np

EXAMPLES, SNIPPET = 3, 400  # example texts, characters shown of each
PROMPT_TOKENS = 8  # of a held-out text, which a language model continues
MOST_LABELS = 5  # of a text that are shown, the likeliest first
OUTSIDE = "O"  # the label of a token that belongs to no entity


def examples(
    stage: StageRun, models: Mapping[str, Any], tokenizer: Any, tokens: Tokens, problem: str | None
) -> list[dict[str, Any]]:
    """Return what each model gives for the first held-out texts; `problem` is that of a model that classifies."""
    rows = []
    for place, ids in enumerate(tokens.ids[:EXAMPLES]):
        given = ids[: min(PROMPT_TOKENS, len(ids) - 1)] if tokens.head == "causal" else ids
        row: dict[str, Any] = {"given": snippet(tokenizer.decode(given, skip_special_tokens=True))}
        for name, model in models.items():
            if HEADS[tokens.head].generates:
                row[name] = _written(stage, model, tokenizer, given, tokens.head)
            else:
                row[name] = _classified(model, tokenizer, tokens.part(place, place + 1), str(problem))
        rows.append(row)
    return rows


def _written(stage: StageRun, model: Any, tokenizer: Any, ids: Sequence[int], head: str) -> str:
    """Return the greedy continuation of a prompt, or the greedy answer to a text."""
    import torch

    from ffn2moe.dense.families import positions

    ids_1L = torch.tensor([ids], device=model.device)
    length = stage.params.evaluate.continuation
    if head == "causal":
        length = min(length, (positions(model.config) or len(ids) + length) - len(ids))
    with torch.no_grad():
        found = model.generate(
            input_ids=ids_1L,
            attention_mask=torch.ones_like(ids_1L),
            max_new_tokens=max(1, length),
            do_sample=False,
            num_beams=1,
        )[0].tolist()
    said = tokenizer.decode(found, skip_special_tokens=True)
    if head == "causal":
        # Decode the whole text and remove the prompt: the new tokens alone lose the space before the first.
        said = said.removeprefix(tokenizer.decode(ids, skip_special_tokens=True))
    return snippet(said)


def _classified(model: Any, tokenizer: Any, tokens: Tokens, problem: str) -> str:
    """Return the labels of one text with their scores, or its tokens that have a label."""
    import torch

    batch = next(tokens.in_order(1)).to(model.device)
    with torch.no_grad():
        logits = model(**batch.inputs).logits[0].float().cpu().numpy()
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if logits.ndim == 1:
        return _LABELLED[problem](names, PROBLEMS[problem].scores(logits))
    words = tokenizer.convert_ids_to_tokens(tokens.ids[0])
    labels = [names[index] for index in logits.argmax(-1)]
    marked = [f"{word} {label}" for word, label in zip(words, labels, strict=True) if label != OUTSIDE]
    return snippet(", ".join(marked) or "no token with a label")


def _best(names: Sequence[str], score_C: np.ndarray) -> str:
    best = int(score_C.argmax())
    return f"{names[best]} ({100 * score_C[best]:.0f} %)"


def _each(names: Sequence[str], score_C: np.ndarray) -> str:
    order = score_C.argsort()[::-1][:MOST_LABELS]
    return ", ".join(f"{names[index]} {100 * score_C[index]:.0f} %" for index in order)


def _values(names: Sequence[str], score_C: np.ndarray) -> str:
    if len(score_C) == 1:
        return f"{score_C[0]:.4f}"
    return snippet(", ".join(f"{name} {score:.4f}" for name, score in zip(names, score_C, strict=True)))


_LABELLED: Table[Callable[[Sequence[str], np.ndarray], str]] = Table("problem")
_LABELLED.register("single_label", _best)
_LABELLED.register("multi_label", _each)
_LABELLED.register("regression", _values)
_LABELLED.register("one_label", _values)


def snippet(text: str) -> str:
    """Return a text as one line, shortened to SNIPPET characters."""
    line = " ".join(text.split())
    return line if len(line) <= SNIPPET else line[: SNIPPET - 1].rstrip() + "…"
