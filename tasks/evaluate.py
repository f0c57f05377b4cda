"""Stage 5: teacher, training-free mixture and distilled mixture, side by side on the same texts.

Everything is computed in float32 and nothing is timed, so that the same models give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.stage import StageRun, main

if TYPE_CHECKING:
    from torch import Tensor

    from ffn2moe.metrics import Interval

DIAGNOSED_TOKENS = 8192  # of held-out texts, on which oracle, router and load of each layer are measured
EXAMPLES, NEIGHBOURS, SNIPPET = 3, 3, 160  # queries to look at, documents found for each, characters shown
MODELS = {"training_free": "models/routed", "student": "models/distilled"}


@dataclass(frozen=True)
class Benchmarks:
    """What the models are judged by; all but retrieval only where a data folder was given."""

    pairs: list[dict[str, Any]]
    stsb: list[dict[str, Any]]
    classification: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]

    @classmethod
    def read(cls, folder: Path) -> Benchmarks:
        stsb, sets = folder / "sts" / "stsb.jsonl", folder / "classification"
        return cls(
            pairs=corpus.read_jsonl(folder / "retrieval.jsonl"),
            stsb=corpus.read_jsonl(stsb) if stsb.is_file() else [],
            classification={
                path.name: (corpus.read_jsonl(path / "train.jsonl"), corpus.read_jsonl(path / "dev.jsonl"))
                for path in (sorted(sets.iterdir()) if sets.is_dir() else ())
            },
        )

    def scores(self) -> Tensor:
        """What people said of the pairs of STS-B, [N]."""
        import torch

        return torch.tensor([row["score"] for row in self.stsb])

    def texts(self) -> list[str]:
        """Every distinct text in them, sorted: each model encodes it once."""
        found = {row[side] for row in self.pairs for side in ("query", "document")}
        found |= {row[side] for row in self.stsb for side in ("first", "second")}
        found |= {row["text"] for sets in self.classification.values() for part in sets for row in part}
        return sorted(found)


class Judged:
    """One model's figures on every benchmark, and what they are the means of."""

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


def run(stage: StageRun) -> None:
    from ffn2moe import checkpoint, metrics
    from ffn2moe.dense import load_dense
    from ffn2moe.encode import choose_device, encode

    params, root = stage.params, stage.root
    device = choose_device(params.compute.device)
    benchmarks = Benchmarks.read(root / "data/benchmarks")
    texts = benchmarks.texts()
    spec = checkpoint.load_spec(root / MODELS["student"])
    teacher, tokenizer = load_dense(str(root / "data/teacher"))
    student = checkpoint.load(root / MODELS["student"])

    def judge(name: str, model: Any) -> Judged:
        embeddings_ND = encode(
            model,
            tokenizer,
            texts,
            max_length=params.teacher.max_length,
            pooling=spec.pooling,
            batch_texts=params.evaluate.batch_texts,
            device=device,
            track=lambda items, total, _: stage.track(items, total, f"{name}: encoding"),
        )
        judged = Judged(benchmarks, texts, embeddings_ND, params.seed)
        stage.say(f"{name}: retrieval nDCG@10 {judged.figures['retrieval']['ndcg_at_10']:.4f}")
        return judged

    judged = {
        "teacher": judge("teacher", teacher),
        "training_free": judge("training_free", checkpoint.load(root / MODELS["training_free"])),
        "student": judge("student", student),
    }
    payload: dict[str, Any] = {name: model.figures for name, model in judged.items()}
    for name, suffix in (("student", ""), ("training_free", "_training_free")):
        payload[name]["embedding_cosine"] = metrics.embedding_cosine(
            judged[name].embeddings_ND, judged["teacher"].embeddings_ND
        )
        payload[f"retention{suffix}"], payload[f"retention_interval{suffix}"] = retention(
            judged[name], judged["teacher"], benchmarks, params.seed
        )

    layers = diagnose(stage, student, tokenizer, device)
    teacher_flops, student_flops = metrics.flops_per_token(spec, teacher.config, params.teacher.max_length)
    payload |= {
        "layers": layers,
        "active_ffn_share": spec.active_share,
        "flops_per_token": {
            "teacher": teacher_flops.total,
            "student": student_flops.total,
            "length": params.teacher.max_length,
        },
        "amdahl_bound": metrics.amdahl_bound(teacher_flops, spec.active_share),
        "parameters": metrics.parameters(teacher, student),
        "examples": examples(benchmarks, judged),
        "evaluated": {
            "retrieval_pairs": len(benchmarks.pairs),
            "stsb_pairs": len(benchmarks.stsb),
            "classification": {name: len(dev) for name, (_, dev) in benchmarks.classification.items()},
        },
    }
    payload = rounded(payload)
    stage.write_json("metrics/evaluate.json", payload)
    stage.write_csv(
        "metrics/plots/layers.csv",
        [{key: value for key, value in row.items() if key != "load"} for row in payload["layers"]],
    )
    stage.write_csv(
        "metrics/plots/load.csv",
        [
            {"layer": row["layer"], "expert": expert, "share": share}
            for row in payload["layers"]
            for expert, share in enumerate(row["load"])
        ],
    )


def retention(
    model: Judged, teacher: Judged, benchmarks: Benchmarks, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each figure of a model as a share of the teacher's, and its 95 % interval; nested as the figures."""
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
                f"the teacher scores 0 on {'.'.join(path)}, so nothing can be kept of it; is "
                "teacher.source a model of sentence embeddings?"
            )
        _set_leaf(ratios, path, _leaf(model.figures, path) / whole)
        _set_leaf(limits, path, asdict(interval))
    return ratios, limits


def examples(benchmarks: Benchmarks, judged: Mapping[str, Judged]) -> list[dict[str, Any]]:
    """What the first queries find with the teacher and with the student, to look at."""

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


def diagnose(stage: StageRun, student: Any, tokenizer: Any, device: str) -> list[dict[str, Any]]:
    """Oracle, router and load of every layer of the student, on its own inputs over held-out texts."""
    from ffn2moe import metrics, oracle
    from ffn2moe.encode import module_inputs
    from ffn2moe.moe import moe_layers

    layers = moe_layers(student)
    inputs = module_inputs(
        student,
        layers,
        tokenizer,
        corpus.read_texts(stage.root / "data/corpus/evaluation.jsonl"),
        max_length=stage.params.teacher.max_length,
        max_tokens=DIAGNOSED_TOKENS,
        batch_texts=stage.params.evaluate.batch_texts,
        device=device,
    )
    student.to("cpu")
    rows = []
    for index, x_TD in stage.track(enumerate(inputs), len(layers), "diagnosing layers"):
        moe = layers[index]
        load = metrics.load(moe.router.choose(moe.router(x_TD), moe.num_active), moe.num_experts)
        rows.append(
            {
                "layer": index,
                **oracle.diagnose(moe, x_TD),
                "max_over_mean_load": load.max_over_mean,
                "dead_experts": load.dead_experts,
                "load": load.share_E,
            }
        )
    return rows


def rounded(tree: Any) -> Any:
    """Six decimals: more than a benchmark of this size can tell apart, and readable."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return round(tree, 6) if isinstance(tree, float) else tree


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


if __name__ == "__main__":
    main("evaluate", run)
