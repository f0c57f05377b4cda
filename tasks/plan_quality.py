"""Judge each plan of an export by the figure that stage 5 judges the student by."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import HEADS
from ffn2moe.table import Table
from tasks import corpus
from tasks.measures import HEADLINES, at
from tasks.stage import StageRun
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ffn2moe.data.batches import Batch
    from ffn2moe.spec import MoESpec


MOST_TOKENS = 2**14  # of the held-out texts that judge a plan of a language model, which has more than ten plans


class PlanQuality:
    """Judge each plan: by what stage 5 found, or by measuring it where it computes something else."""

    def __init__(self, stage: StageRun, spec: MoESpec, teacher: Any, tokenizer: Any) -> None:
        from ffn2moe import metrics
        from ffn2moe.judges.reading import read

        root = stage.root
        self.stage = stage
        self.spec = spec
        self.headline = HEADLINES[spec.head]
        path = root / "data/corpus/evaluation.jsonl"
        self.tokens = read_tokens(path, spec.head, tokenizer, spec.max_length, packed=False, prompt=spec.prompt)
        self.ids = self.tokens.ids
        if spec.head == "causal":
            self.ids = self.tokens.beginning(MOST_TOKENS).ids
        evaluated = json.loads((root / "metrics/evaluate.json").read_text(encoding="utf-8"))
        self.known = {
            "teacher": at(evaluated["teacher"], self.headline.path, 1.0),
            "student": at(evaluated["student"], self.headline.path),
        }
        if len(self.ids) < len(self.tokens.ids):  # then every plan is judged on the same part, and so is the teacher
            judged = read({"teacher": teacher}, [ids for ids in self.ids if len(ids) > 1])["teacher"]
            self.known = {"teacher": metrics.perplexity(judged.nats_N, judged.positions_N)}
        self.pairs = corpus.read_jsonl(root / "data/benchmarks/retrieval.jsonl") if spec.head == "embedding" else []
        compared = spec.head == "seq2seq" or HEADS[spec.head].classifies
        self.expected = self.over_batches(lambda batch: teacher(**batch.inputs).logits) if compared else None

    def summary(self, entry: Mapping[str, Any]) -> str:
        return f"{self.headline.label} {entry[self.headline.key]:.4f}"

    def of(self, plan: str, entry: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path) -> dict[str, float]:
        """Return the figure of one plan, and the share of the teacher's that it keeps."""
        from ffn2moe.runtime import files as runtime_files
        from ffn2moe.runtime.export import open_graphs, opened
        from ffn2moe.runtime.plans import is_dense

        params = self.stage.params
        is_another = entry["precision"] != "float32" or "num_active" in entry or "dense_layers" in entry
        same = "teacher" if is_dense(plan) else "student"
        if is_another or entry["parity_max_abs"] > params.export.float_tolerance or same not in self.known:
            files = runtime_files.checked_files(folder, entry)
            graphs = open_graphs(files, plan, threads=params.compute.threads)
            figure = MEASURES[self.spec.head](self, opened(folder, plan, manifest, graphs))
        else:
            figure = self.known[same]
        kept = self.headline.retention(figure, self.known["teacher"])
        return {self.headline.key: round(figure, 6), "retention": round(kept, 6)}

    def over_batches(self, logits_of: Callable[[Batch], Tensor]) -> Tensor:
        """Return what is compared at every judged position: logits [N, C] of labels, or the chosen tokens, [N]."""
        import torch

        found = []
        with torch.no_grad():
            for batch in self.tokens.in_order(self.stage.params.evaluate.batch_texts):
                logits_NC = self.tokens.rows(logits_of(batch), batch.mask)
                found.append(logits_NC if HEADS[self.spec.head].classifies else logits_NC.argmax(-1))
        return torch.cat(found)


def retrieval(quality: PlanQuality, export: Any) -> float:
    """Return nDCG@10 of the retrieval benchmark."""
    import torch

    from ffn2moe import metrics

    query_ND, document_ND = (
        metrics.comparable(torch.from_numpy(export.encode([row[side] for row in quality.pairs])), export.sentence)
        for side in ("query", "document")
    )
    return metrics.retrieval(query_ND, document_ND)["ndcg_at_10"]


def perplexity(quality: PlanQuality, export: Any) -> float:
    """Return the perplexity of the held-out texts."""
    import torch

    from ffn2moe import metrics

    scores = [export.score(ids) for ids in quality.ids if len(ids) > 1]
    nats_N, tokens_N = (torch.tensor(column, dtype=torch.float64) for column in zip(*scores, strict=True))
    return metrics.perplexity(nats_N, tokens_N)


def kappa(quality: PlanQuality, export: Any) -> float:
    """Return the agreement with the teacher's choice of tokens in its own answers, above chance."""
    import torch

    from ffn2moe import metrics

    def logits_of(batch: Batch) -> Tensor:
        inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
        source = {name: array for name, array in inputs.items() if name != "decoder_input_ids"}
        return torch.from_numpy(export.run(source, inputs["decoder_input_ids"]))

    assert quality.expected is not None
    found = metrics.kappa(quality.expected, quality.over_batches(logits_of))
    assert found is not None, "prepare refuses a teacher that answers everything with one token"
    return found


def concordance(quality: PlanQuality, export: Any) -> float:
    """Return the concordance with the teacher's scores."""
    import torch

    from ffn2moe import metrics

    def logits_of(batch: Batch) -> Tensor:
        inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
        return torch.from_numpy(export.run(**inputs)["logits"])

    assert quality.expected is not None
    return metrics.fidelity(str(quality.spec.problem), quality.expected, quality.over_batches(logits_of))[metrics.KEPT]


MEASURES: Table[Callable[[PlanQuality, Any], float]] = Table("head")
MEASURES.register("embedding", retrieval)
MEASURES.register("causal", perplexity)
MEASURES.register("seq2seq", kappa)
MEASURES.register("classification", concordance)
MEASURES.register("token_classification", concordance)
