"""Judge embeddings by retrieval, similarity and classification, each model on the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.benchmark_texts import TEACHER, Benchmarks
from tasks.stage import StageRun

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.metrics import Interval
    from ffn2moe.spec import MoESpec

EXAMPLES, NEIGHBOURS, SNIPPET = 3, 3, 160  # example queries, documents shown for each, characters of a text


def judge(stage: StageRun, models: Mapping[str, Any], tokenizer: Any, spec: MoESpec, device: str) -> dict[str, Any]:
    """Return the figures of `teacher`, `training_free` and `student`, what the last two keep, and examples."""
    from safetensors.torch import load_file

    from ffn2moe import metrics
    from ffn2moe.data.encode import encode

    params = stage.params
    folder = stage.root / "data/benchmarks"
    benchmarks = Benchmarks.read(folder)
    general = corpus.general_sentences()
    texts = [*benchmarks.texts(), *general]
    judged_rows, general_rows = slice(-len(general)), slice(-len(general), None)
    judged = {}
    for name, model in models.items():
        embeddings_ND = (
            load_file(folder / TEACHER)["embeddings"]
            if name == "teacher"
            else encode(
                model,
                tokenizer,
                texts,
                max_length=spec.max_length,
                batch_texts=params.evaluate.batch_texts,
                device=device,
                track=lambda items, total, _, name=name: stage.track(items, total, f"{name}: encoding"),
            )
        )
        embeddings_ND = metrics.comparable(embeddings_ND, spec.sentence)
        judged[name] = Judged(benchmarks, texts, embeddings_ND, params.seed)
        stage.say(f"{name}: retrieval nDCG@10 {judged[name].figures['retrieval']['ndcg_at_10']:.4f}")
    found: dict[str, Any] = {name: model.figures for name, model in judged.items()}
    for name, suffix in (("student", ""), ("training_free", "_training_free")):
        student_ND, teacher_ND = judged[name].embeddings_ND, judged["teacher"].embeddings_ND
        found[name]["embedding_cosine"] = metrics.embedding_cosine(student_ND[judged_rows], teacher_ND[judged_rows])
        found[name]["general"] = metrics.general_agreement(student_ND[general_rows], teacher_ND[general_rows])
        found[f"retention{suffix}"], found[f"retention_interval{suffix}"] = retention(
            judged[name], judged["teacher"], benchmarks, params.seed
        )
    found["examples"] = examples(benchmarks, judged)
    found["evaluated"] = {
        "retrieval_pairs": len(benchmarks.pairs),
        "stsb_pairs": len(benchmarks.stsb),
        "classification": {name: len(dev) for name, (_, dev) in benchmarks.classification.items()},
    }
    return found


class Judged:
    """One model's figures on every benchmark, and the values for each text behind their means."""

    def __init__(self, benchmarks: Benchmarks, texts: Sequence[str], embeddings_ND: Tensor, seed: int) -> None:
        from ffn2moe import metrics

        place = {text: index for index, text in enumerate(texts)}

        def rows(found: Sequence[Mapping[str, Any]], key: str) -> Tensor:
            return embeddings_ND[[place[row[key]] for row in found]]

        self.embeddings_ND = embeddings_ND
        query_ND, document_ND = rows(benchmarks.pairs, "query"), rows(benchmarks.pairs, "document")
        self.nearest_NK = metrics.nearest(query_ND[:EXAMPLES], document_ND, NEIGHBOURS)
        self.ranks_N = metrics.retrieval_ranks(query_ND, document_ND)
        self.figures: dict[str, Any] = {"retrieval": metrics.retrieval(query_ND, document_ND)}
        self.similarity_N: Tensor | None = None
        self.right: dict[str, Tensor] = {}
        if benchmarks.stsb:
            self.similarity_N = metrics.similarity(rows(benchmarks.stsb, "first"), rows(benchmarks.stsb, "second"))
            self.figures["stsb"] = {"spearman": metrics.spearman(self.similarity_N, benchmarks.scores())}
        for name, (train, dev) in benchmarks.classification.items():
            labels = ([row["label"] for row in part] for part in (train, dev))
            self.right[name] = metrics.probe(
                rows(train, "text"), next(labels), rows(dev, "text"), next(labels), seed=seed
            )
            accuracy = self.right[name].double().mean().item()
            self.figures.setdefault("classification", {})[name] = {"accuracy": accuracy}


def retention(
    model: Judged, teacher: Judged, benchmarks: Benchmarks, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return each figure of a model as a share of the teacher's, and its 95 % interval; nested as the figures."""
    from ffn2moe import metrics

    intervals: dict[tuple[str, ...], Interval] = {}
    for key, of_query in (("ndcg_at_10", metrics.ndcg_at_10), ("mrr", metrics.reciprocal_rank)):
        intervals["retrieval", key] = metrics.mean_ratio_interval(
            of_query(model.ranks_N), of_query(teacher.ranks_N), seed=seed
        )
    if model.similarity_N is not None and teacher.similarity_N is not None:
        intervals["stsb", "spearman"] = metrics.spearman_ratio_interval(
            model.similarity_N, teacher.similarity_N, benchmarks.scores(), seed=seed
        )
    for name in model.right:
        intervals["classification", name, "accuracy"] = metrics.mean_ratio_interval(
            model.right[name], teacher.right[name], seed=seed
        )
    ratios: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for path, interval in intervals.items():
        whole = _leaf(teacher.figures, path)
        if whole == 0:
            raise ValueError(
                f"the teacher scores 0 on {'.'.join(path)}, so no share of it can be computed; check that "
                "teacher.source is a model of sentence embeddings"
            )
        _set_leaf(ratios, path, _leaf(model.figures, path) / whole)
        _set_leaf(limits, path, asdict(interval))
    return ratios, limits


def examples(benchmarks: Benchmarks, judged: Mapping[str, Judged]) -> list[dict[str, Any]]:
    """Return the documents that the first queries find with the teacher and with the student."""

    def snippet(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= SNIPPET else line[: SNIPPET - 1].rstrip() + "…"

    rows: list[dict[str, Any]] = [{"query": snippet(pair["query"])} for pair in benchmarks.pairs[:EXAMPLES]]
    for name in ("teacher", "student"):
        for place, row in enumerate(rows):
            found = judged[name].nearest_NK[place].tolist()
            row[name] = [
                {"document": snippet(benchmarks.pairs[index]["document"]), "right": index == place} for index in found
            ]
    return rows


def _leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> float:
    value: Any = tree
    for key in path:
        value = value[key]
    return float(value)


def _set_leaf(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
