"""Run an export that reads its whole input at once: hidden states, or the logits of labels (`classifiers`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ffn2moe.runtime.batching import pad
from ffn2moe.runtime.engines import Graph
from ffn2moe.runtime.opened import Opened
from ffn2moe.runtime.switch import Switch

TOKEN_TYPES = "token_type_ids"  # which text of a pair a token belongs to: 0 or 1


class AtOnce(Opened):
    """A model that reads its whole input at once."""

    def fix(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Compile the graph for exactly these batches [B, L], in place of earlier ones, where the engine is OpenVINO.

        The first batch of each shape takes longer, and each takes memory (docs/decisions/0015). Slightly smaller
        batches are padded to it; all others run as before.
        """
        self._graph.fix(shapes)

    @property
    def list_plan(self) -> str:
        """The plan that a call of several batches runs on; `plan` where each batch goes by its shape."""
        return (self._graph.lists if isinstance(self._graph, Switch) else None) or self.plan

    def _graph_for(self, batches: int) -> Graph:
        """Return the graph for a call of so many batches: several are a list, whose plan was chosen on lists."""
        return self._graph.for_lists() if batches > 1 and isinstance(self._graph, Switch) else self._graph


class ModelExport(AtOnce):
    """An open export of a model that gives hidden states: `run` it on its inputs."""

    gives = "states"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its inputs: `input_ids`, `attention_mask` and, of some classifiers, `token_type_ids` [B, L].

        A model of images has `pixel_values` [B, channels, H, W].
        """
        return tuple(self._graph.inputs)

    def batch(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """Return token ids and mask of texts as one batch, int64 [B, L] each."""
        self._require_text()
        ids_BL, mask_BL = pad(self._ids_of(texts, "batch"), self._pad_id)
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return outputs by name: `logits` [B, labels] or [B, L, labels] of a classifier, else `last_hidden_state`.

        Without `token_type_ids` all tokens belong to the first text, as in transformers.
        """
        return self._run(self._graph, inputs)

    def _run(self, graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if TOKEN_TYPES in graph.inputs and TOKEN_TYPES not in inputs:
            inputs = {**inputs, TOKEN_TYPES: np.zeros_like(inputs["input_ids"])}
        return dict(zip(self._outputs, graph.run(self._outputs, inputs), strict=True))

    def outputs(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every output by name for a sample of `ffn2moe.onnx.parity`."""
        return self.run(**sample)

    def _require_text(self) -> None:
        if self._tokenizer is None:
            raise ValueError("this model reads images: give `run` their pixel_values [B, channels, height, width]")
