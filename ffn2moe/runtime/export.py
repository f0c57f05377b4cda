"""Open an export and use it, by any of its plans: embeddings, generated text, classes, hidden states.

Needs numpy, tokenizers and the plan's engine (`ffn2moe.runtime.engines`), and no torch: an export is light to serve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ffn2moe.runtime.at_once import AtOnce, ModelExport
from ffn2moe.runtime.batching import BATCH_TOKENS, batches_by_length, pad, windows
from ffn2moe.runtime.classifiers import Classifier, TokenClassifier
from ffn2moe.runtime.decoders import CausalExport, Seq2SeqExport
from ffn2moe.runtime.engines import CPU, ENGINES, EngineMissing, Graph, Precision, cores, open_graph
from ffn2moe.runtime.files import checked_files, load_tokenizer, no_such_plan, read_manifest, read_plan
from ffn2moe.runtime.opened import require_several, require_text
from ffn2moe.runtime.plans import decodes, default_plan, library_of, plan_of
from ffn2moe.runtime.selftest import self_tests
from ffn2moe.runtime.switch import Switch, places, plan_for_lists
from ffn2moe.sentence import SentenceModules
from ffn2moe.table import Table

_log = logging.getLogger(__name__)


class Export(AtOnce):
    """An open export of a text encoder: `encode` texts, or `run` token ids."""

    gives = "embedding"

    @property
    def width(self) -> int:
        """The dimensions of an embedding."""
        return self.sentence.embedding_width(int(self.manifest["spec"]["stacks"][0]["width"]))

    @cached_property
    def sentence(self) -> SentenceModules:
        """How embeddings are made, and the prompts of the model."""
        return SentenceModules.of_spec(self.manifest["spec"])

    def token_ids(self, texts: Iterable[str], *, prompt: str = "") -> list[list[int]]:
        """Return the token ids of each text behind a prompt, truncated to the export's length."""
        return self._ids_of(texts, "encode", prompt=prompt)

    def encode(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> np.ndarray:
        """Return embeddings, float32 [N, width], in the order of `texts`, any iterable, which is read once.

        Before each text stands `prompt`, or the model's prompt of the name `prompt_name`, or its default prompt, if it
        has one. ValueError for a text that is empty, no string or no valid Unicode, and for an unknown prompt.

        Texts are batched with others of their length (`ffn2moe.runtime.batching`), up to `batch_tokens` with padding.
        In an int8 plan the batch has one scale of the activations, so an embedding depends a little on its neighbours.
        """
        require_several(texts, "encode")
        if isinstance(texts, Sequence):  # before the work; the texts of another iterable are checked as they come
            for index, text in enumerate(texts):
                require_text(text, f"text {index}")
        found = list(self.stream(texts, prompt=prompt, prompt_name=prompt_name, batch_tokens=batch_tokens))
        return np.concatenate([np.empty((0, self.width), dtype=np.float32), *found])

    def stream(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Iterator[np.ndarray]:
        """Yield what `encode` returns, float32 [n, width], for the next texts: `TEXTS_AT_ONCE`, or fewer long ones.

        The memory does not grow with the number of texts.
        """
        require_several(texts, "stream")
        before, done = self.sentence.prompt(prompt, prompt_name), 0
        for part in windows(texts):
            ids = self._ids_of(part, "stream", prompt=before, first=done)
            embeddings_ND = np.empty((len(ids), self.width), dtype=np.float32)
            batches = batches_by_length(ids, batch_tokens)
            graph = self._graph_for(done + len(batches))  # another part of a list belongs to the list
            for batch in batches:
                ids_BL, mask_BL = pad([ids[index] for index in batch], self._pad_id)
                embeddings_ND[batch] = graph.run(
                    ["sentence_embedding"], {"input_ids": ids_BL, "attention_mask": mask_BL}
                )[0]
            yield embeddings_ND
            done += len(part)

    def batch(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and mask of the texts as one batch, int64 [B, L] each."""
        return pad(self.token_ids(texts), self._pad_id)

    def run(self, ids_BL: np.ndarray, mask_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return hidden states [B, L, D] and embeddings [B, D] of token ids and their mask, int64 [B, L]."""
        hidden_BLD, embedding_BD = self._graph.run(
            ["last_hidden_state", "sentence_embedding"], {"input_ids": ids_BL, "attention_mask": mask_BL}
        )
        return hidden_BLD, embedding_BD

    def outputs(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every output by name for a sample of `ffn2moe.onnx.parity`."""
        hidden_BLD, embedding_BD = self.run(sample["input_ids"], sample["attention_mask"])
        return {"last_hidden_state": hidden_BLD, "sentence_embedding": embedding_BD}


def open_export(
    path: str | Path,
    plan: str | None = None,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    precision: Precision | None = None,
) -> Any:
    """Open the export in folder `path` as the class of its head (`OPENED`).

    `plan` None takes what was chosen by measuring (plan.json, `ffn2moe.planning.plan_file`), or `sorted` where nothing
    was. Where this machine lacks an engine or operator of what was chosen, the export's portable plan is opened, and a
    line says so. If several plans were chosen, a batch runs on the one for its shape, and a call of several batches (a
    list of texts) on the one for lists; each is opened when first needed (`ffn2moe.runtime.switch`). What was chosen in
    OpenVINO is compiled for the shapes that it was chosen for, apart, when the first batch of each comes (of a model
    that reads all at once; for other plans and shapes: `Export.fix`). The graphs must have the sha256 of the manifest,
    and a plan that rests on a MoE op must pass `self_test` on this runtime. `threads` None takes one a core;
    `precision` is OpenVINO's (`ffn2moe.runtime.engines.open_graph`). Raises FileNotFoundError or ValueError, with cause
    and remedy.
    """
    path = Path(path)
    manifest = read_manifest(path)
    plans = manifest["plans"]
    measured = read_plan(path) if plan is None and tuple(providers) == CPU else None
    if measured and _lacks_what_was_chosen(path, manifest, measured):
        plan, measured = manifest["portable"], None
    chosen = places(measured, threads or cores()) if measured else []
    lists = plan_for_lists(measured, threads or cores()) if measured and chosen else None
    by_shape = tuple(dict.fromkeys(place.plan for place in chosen))
    first = plan or default_plan(path, plans)
    if by_shape and first not in by_shape:  # chosen for another number of threads
        first = by_shape[0]

    def graphs_of(name: str) -> list[Graph]:
        if name not in plans:
            raise ValueError(no_such_plan(path, manifest, name))
        files = checked_files(path, plans[name])
        self_tests(name, manifest["spec"], providers)
        return open_graphs(files, name, threads=threads, providers=providers, precision=precision)

    def fixed_graphs(name: str) -> list[Graph]:
        graphs = graphs_of(name)
        if not decodes(manifest["spec"]["head"]):
            graphs[0].fix((place.batch, place.sequence) for place in chosen if place.plan == name and place.fixed)
        return graphs

    if len(by_shape) > 1 or (lists is not None and lists != first):
        return opened(path, first, manifest, [Switch(chosen, lambda name: fixed_graphs(name)[0], first, lists)])
    return opened(path, first, manifest, fixed_graphs(first))


def _lacks_what_was_chosen(path: Path, manifest: Mapping[str, Any], measured: Mapping[str, Any]) -> bool:
    """Return whether a chosen plan cannot run on this machine and the portable one can; a line says so."""
    portable = manifest.get("portable")
    if portable not in manifest["plans"]:
        return False
    for name in dict.fromkeys([measured["default_plan"], *measured.get("plans", ())]):
        reason = lacking(name)
        if reason is not None:
            _log.warning("%s: %s cannot run here: %s; using %s", path, name, reason, portable)
            return True
    return False


def lacking(plan: str) -> str | None:
    """Return why a plan cannot run on this machine: its engine is missing, or its operator is not built; else None."""
    row = plan_of(plan)
    try:
        ENGINES[row.engine].require()
        library_of(row)
    except (EngineMissing, FileNotFoundError) as error:
        return str(error)
    return None


def open_graphs(
    files: Sequence[Path],
    plan: str,
    *,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    precision: Precision | None = None,
) -> list[Graph]:
    """Open the graphs of a plan in its engine (`ffn2moe.runtime.engines.open_graph`).

    FileNotFoundError, with the remedy, where the plan needs an operator that is not built.
    """
    row = plan_of(plan)
    extension = library_of(row)
    return [
        open_graph(file, row.engine, threads=threads, providers=providers, precision=precision, extension=extension)
        for file in files
    ]


def opened(path: Path, plan: str, manifest: Mapping[str, Any], graphs: Sequence[Graph]) -> Any:
    """Return the object for the head of the export over open graphs: its own, and then its encoder's."""
    head, spec = manifest["spec"]["head"], manifest["spec"]
    tokenizer = None
    if manifest.get("model", {}).get("reads", "text") != "images":
        cut = None if decodes(head) else int(spec["max_length"])
        tokenizer = load_tokenizer(path / "tokenizer", cut)
    return OPENED[head](path, plan, manifest, graphs, tokenizer)


OPENED: Table[Any] = Table("head")
for _head, _kind in (
    ("embedding", Export),
    ("causal", CausalExport),
    ("seq2seq", Seq2SeqExport),
    ("classification", Classifier),
    ("token_classification", TokenClassifier),
    ("features", ModelExport),
):
    OPENED.register(_head, _kind)
