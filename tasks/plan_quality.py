"""Judge each plan of an export by the figure that stage 5 judges the student by."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.measures import HEADLINES, at
from tasks.stage import StageRun
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ffn2moe.spec import MoESpec


class PlanQuality:
    """Judge each plan: by what stage 5 found, or by measuring it where it computes something else."""

    def __init__(self, stage: StageRun, spec: MoESpec, teacher: Any, tokenizer: Any) -> None:
        root = stage.root
        self.stage = stage
        self.head = spec.head
        self.headline = HEADLINES[spec.head]
        path = root / "data/corpus/evaluation.jsonl"
        self.tokens = read_tokens(path, spec.head, tokenizer, spec.max_length, packed=False, prompt=spec.prompt)
        self.ids = self.tokens.ids
        evaluated = json.loads((root / "metrics/evaluate.json").read_text(encoding="utf-8"))
        self.known = {
            "teacher": at(evaluated["teacher"], self.headline.path, 1.0),
            "student": at(evaluated["student"], self.headline.path),
        }
        self.pairs = corpus.read_jsonl(root / "data/benchmarks/retrieval.jsonl") if spec.head == "embedding" else []
        self.choices = self.teachers_choices(teacher) if spec.head in ("classification", "seq2seq") else []

    def summary(self, entry: Mapping[str, Any]) -> str:
        return f"{self.headline.label} {entry[self.headline.key]:.4f}"

    def of(self, plan: str, entry: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path) -> dict[str, float]:
        """Return the figure of one plan, and the share of the teacher's that it keeps."""
        from ffn2moe.runtime import files as runtime_files
        from ffn2moe.runtime.export import open_graphs, opened
        from ffn2moe.runtime.plans import is_dense

        params = self.stage.params
        is_another = entry["precision"] != "float32" or "num_active" in entry or "dense_layers" in entry
        if is_another or entry["parity_max_abs"] > params.export.float_tolerance:
            files = runtime_files.checked_files(folder, entry)
            graphs = open_graphs(files, plan, threads=params.compute.threads)
            figure = self.measured(opened(folder, plan, manifest, graphs))
        else:
            figure = self.known["teacher" if is_dense(plan) else "student"]
        kept = self.headline.retention(figure, self.known["teacher"])
        return {self.headline.key: round(figure, 6), "retention": round(kept, 6)}

    def measured(self, export: Any) -> float:
        """Measure the figure of an open plan on the texts of stage 5."""
        import torch

        from ffn2moe import metrics

        if self.head == "embedding":
            query_ND, document_ND = (
                metrics.comparable(torch.from_numpy(export.encode([row[side] for row in self.pairs])), export.sentence)
                for side in ("query", "document")
            )
            return metrics.retrieval(query_ND, document_ND)["ndcg_at_10"]
        if self.head == "causal":
            scores = [export.score(ids) for ids in self.ids if len(ids) > 1]
            nats_N, tokens_N = (torch.tensor(column, dtype=torch.float64) for column in zip(*scores, strict=True))
            return metrics.perplexity(nats_N, tokens_N)
        found = []
        for batch in self.tokens.in_order(self.stage.params.evaluate.batch_texts):
            inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
            if self.head == "seq2seq":
                logits = export.run(
                    {name: array for name, array in inputs.items() if name != "decoder_input_ids"},
                    inputs["decoder_input_ids"],
                )
            else:
                logits = export.run(**inputs)["logits"]
            found.append(self.choices_of(torch.from_numpy(logits), batch.mask))
        return (torch.cat(found) == torch.cat(self.choices)).double().mean().item()

    def teachers_choices(self, teacher: Any) -> list[Tensor]:
        """Return the teacher's most probable class or token at every judged position, a tensor a batch."""
        import torch

        found = []
        with torch.no_grad():
            for batch in self.tokens.in_order(self.stage.params.evaluate.batch_texts):
                found.append(self.choices_of(teacher(**batch.inputs).logits, batch.mask))
        return found

    @staticmethod
    def choices_of(logits: Tensor, mask: Tensor | None) -> Tensor:
        chosen = logits.argmax(-1)
        return chosen if mask is None else chosen[mask.bool()]
