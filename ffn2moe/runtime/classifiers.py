"""Run an export that classifies texts, pairs of texts, or the tokens of texts, and serve its scores.

The scores are those of transformers' pipelines: what the logits mean is `spec.problem`, a row of
`ffn2moe.choices.PROBLEMS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ffn2moe.choices import PROBLEMS, Problem
from ffn2moe.runtime.at_once import TOKEN_TYPES, ModelExport
from ffn2moe.runtime.batching import BATCH_TOKENS, batches_by_length, pad
from ffn2moe.runtime.files import token_id
from ffn2moe.runtime.opened import require_several, require_text
from ffn2moe.spec import MoESpec

Input = str | tuple[str, str]  # a text, or a pair, such as a query and a document
OUTSIDE = "O"  # the label of a token that belongs to no entity


class _Labels(ModelExport):
    """A model whose logits are those of labels."""

    @property
    def problem(self) -> Problem:
        """What the logits mean."""
        return PROBLEMS[str(MoESpec.from_dict(self.manifest["spec"]).problem)]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the logits."""
        named = self.manifest.get("model", {}).get("labels")
        return tuple(named or (f"LABEL_{index}" for index in range(int(self._graph.outputs["logits"][-1]))))

    def batch(self, texts: Iterable[Input]) -> dict[str, np.ndarray]:
        """Return the inputs for texts, or pairs of them, as one batch, int64 [B, L] each."""
        return self._inputs(self._encoded(texts, "batch"))

    def _inputs(self, encodings: Sequence[Any]) -> dict[str, np.ndarray]:
        ids_BL, mask_BL = pad([one.ids for one in encodings], self._pad_id)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if TOKEN_TYPES in self._graph.inputs and self.manifest.get("model", {}).get("token_types", True):
            inputs[TOKEN_TYPES] = pad([one.type_ids for one in encodings], 0)[0]
        return inputs

    def _encoded(self, texts: Iterable[Input], method: str) -> list[Any]:
        """Return the encoding of each text or pair, any iterable, read once. ValueError for what is neither."""
        self._require_text()
        require_several(texts, method)
        checked: list[Input] = []
        for index, text in enumerate(texts):
            if isinstance(text, tuple | list):
                if len(text) != 2:
                    raise ValueError(f"pair {index} has {len(text)} parts: give two texts")
                first, second = (require_text(part, f"text {n} of pair {index}") for n, part in enumerate(text, 1))
                checked.append((first, second))
            else:
                checked.append(require_text(text, f"text {index}"))
        found: list[Any] = self._tokenizer.encode_batch(checked)
        return found

    def _logits(self, encodings: Sequence[Any], batch_tokens: int) -> list[np.ndarray]:
        """Return the logits of each text, [labels] or [L, labels], in their order."""
        found: list[np.ndarray] = [np.empty(0)] * len(encodings)
        batches = batches_by_length([one.ids for one in encodings], batch_tokens)
        graph = self._graph_for(len(batches))
        for batch in batches:
            logits = self._run(graph, self._inputs([encodings[index] for index in batch]))["logits"]
            for row, index in enumerate(batch):
                found[index] = logits[row] if logits.ndim == 2 else logits[row, : len(encodings[index].ids)]
        return found


class Classifier(_Labels):
    """An open export of a classifier: `classify` texts or pairs of texts, or `run` it on its inputs.

    Texts are batched with others of their length, up to `batch_tokens` with padding. In an int8 plan the batch has one
    scale of the activations, so that a score depends a little on its neighbours.
    """

    gives = "labels"

    def classify(self, texts: Iterable[Input], *, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """Return logits [N, labels], float32, of texts or pairs `(first, second)`, in their order; any iterable.

        A pair that is too long loses tokens of its longer text first, as in transformers. ValueError for a text that is
        empty, no string or no valid Unicode.
        """
        found = self._logits(self._encoded(texts, "classify"), batch_tokens)
        return np.stack(found) if found else np.empty((0, len(self.labels)), np.float32)

    def scores(self, texts: Iterable[Input], *, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """Return what is served, [N, labels]: probabilities, or values as they are, by the model's problem."""
        return self.problem.scores(self.classify(texts, batch_tokens=batch_tokens))

    def answers(self, texts: Iterable[Input], *, batch_tokens: int = BATCH_TOKENS) -> list[list[dict[str, Any]]]:
        """Return for each text every `label` with its `score`, highest first: as a pipeline with `top_k=None`."""
        found = []
        for score_C in self.scores(texts, batch_tokens=batch_tokens):
            named = zip(self.labels, map(float, score_C), strict=True)
            ordered = sorted(named, key=lambda pair: pair[1], reverse=True)
            found.append([{"label": label, "score": score} for label, score in ordered])
        return found


class TokenClassifier(_Labels):
    """An open export of a classifier of tokens: find `entities` in texts, or `run` it on its inputs."""

    gives = "entities"

    def classify(self, texts: Iterable[Input], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Return for each text the logits of its tokens, [L, labels], with those of special tokens."""
        return self._logits(self._encoded(texts, "classify"), batch_tokens)

    def scores(self, texts: Iterable[Input], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Return for each text the probabilities of its tokens, [L, labels], with those of special tokens."""
        return [self.problem.scores(logits) for logits in self.classify(texts, batch_tokens=batch_tokens)]

    def entities(
        self, texts: Iterable[str], *, grouped: bool = True, batch_tokens: int = BATCH_TOKENS
    ) -> list[list[dict[str, Any]]]:
        """Return the entities of each text, as transformers' pipeline gives them.

        `grouped` joins neighbouring tokens of one entity (the aggregation strategy "simple"): `entity_group`, `score`,
        `word`, and `start` and `end` in characters. Else each token is one: `entity` and `index` in place of the group.
        """
        texts = list(texts)
        encodings = self._encoded(texts, "entities")
        found = []
        for text, encoding, logits in zip(texts, encodings, self._logits(encodings, batch_tokens), strict=True):
            tokens = self._tokens(text, encoding, self.problem.scores(logits))
            kept = [self._group(part) for part in _parts(tokens)] if grouped else tokens
            found.append([one for one in kept if one["entity_group" if grouped else "entity"] != OUTSIDE])
        return found

    def answers(self, texts: Iterable[str], *, batch_tokens: int = BATCH_TOKENS) -> list[list[dict[str, Any]]]:
        """Return for each text its grouped `entities`."""
        return self.entities(texts, batch_tokens=batch_tokens)

    def _tokens(self, text: str, encoding: Any, score_LC: np.ndarray) -> list[dict[str, Any]]:
        """Return every token of a text with its best label, without the special tokens."""
        unknown = token_id(self.path / "tokenizer", self._tokenizer, "unk_token")
        labels, found = self.labels, []
        for index, score_C in enumerate(score_LC):
            if encoding.special_tokens_mask[index]:
                continue
            (start, end), best, token = encoding.offsets[index], int(score_C.argmax()), encoding.ids[index]
            found.append(
                {
                    "entity": labels[best],
                    "score": float(score_C[best]),
                    "index": index,
                    "word": text[start:end] if token == unknown else self._tokenizer.id_to_token(token),
                    "start": start,
                    "end": end,
                }
            )
        return found

    def _group(self, tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
        decoder, words = self._tokenizer.decoder, [one["word"] for one in tokens]
        return {
            "entity_group": tokens[0]["entity"].split("-", 1)[-1],
            "score": float(np.mean([one["score"] for one in tokens])),
            "word": decoder.decode(words) if decoder is not None else " ".join(words),
            "start": tokens[0]["start"],
            "end": tokens[-1]["end"],
        }


def _parts(tokens: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return runs of tokens with one tag; a tag that begins with B- begins a run."""
    parts: list[list[dict[str, Any]]] = []
    for token in tokens:
        label = token["entity"]
        if parts and not label.startswith("B-") and _tag(label) == _tag(parts[-1][-1]["entity"]):
            parts[-1].append(token)
        else:
            parts.append([token])
    return parts


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
