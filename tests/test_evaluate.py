"""Evaluation compares three models on what prepare wrote, and the same models give the same bytes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import ffn_layers, read_ffn
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.sentence import SentenceModules
from tasks import benchmark_texts, corpus, evaluate, judge_embeddings, prepare
from tasks.benchmark_texts import Benchmarks
from tests.texts import make_stage, make_texts, write_corpus

SMALL = (
    "data.corpus=texts.jsonl",
    "data.folder=sets",
    "data.calibration_texts=20",
    "data.evaluation_pairs=30",
    "teacher.max_length=32",
)
E = 4


def carve(teacher: Path, folder: Path, num_active: int) -> None:
    """The teacher with its FFNs cut into E experts, of which K are chosen by a random router."""
    model, tokenizer = load_dense(str(teacher))
    spec = spec_of(
        model,
        head="embedding",
        num_experts=E,
        num_active=num_active,
        partition="contiguous",
        teacher="tiny",
        max_length=32,
        sentence=SentenceModules(),
    )
    layers = []
    for index in range(len(ffn_layers(model))):
        neurons_EM = neurons_by_expert(torch.arange(64) // 16, E)
        moe = MoEFFN.from_experts(spec, slice_experts(read_ffn(model, index), neurons_EM), neurons_EM)
        torch.manual_seed(index)
        torch.nn.init.normal_(moe.router.weight)
        layers.append(moe)
    install_moe(model, layers)
    checkpoint.save(model, tokenizer, spec, folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_teacher) -> Path:
    """What evaluation reads: a student that uses every expert, a training-free mixture that does not."""
    root = tmp_path_factory.mktemp("evaluate")
    write_corpus(root / "texts.jsonl", make_texts(300))
    for name in ("stsb", "sst2"):
        (root / "sets" / name).mkdir(parents=True)
    sentences = [text.split("\n")[0] for text in make_texts(80, seed=5)]
    (root / "sets/stsb/dev.csv").write_text(
        "".join(f"a\tb\tc\td\t{n % 6}\t{sentences[n]}\t{sentences[n + 1]}\n" for n in range(30))
    )
    (root / "sets/sst2/train.tsv").write_text("".join(f"{text}\t{n % 2}\n" for n, text in enumerate(sentences[:50])))
    (root / "sets/sst2/dev.tsv").write_text("".join(f"{text}\t{n % 2}\n" for n, text in enumerate(sentences[50:])))
    prepare.run(make_stage("prepare", root, f"teacher.source={tiny_teacher}", *SMALL))
    carve(root / "data/teacher", root / "models/routed", num_active=1)
    carve(root / "data/teacher", root / "models/distilled", num_active=E)
    return root


@pytest.fixture(scope="module")
def found(workspace) -> dict:
    evaluate.run(make_stage("evaluate", workspace, *SMALL))
    return json.loads((workspace / "metrics/evaluate.json").read_text())


def test_each_model_has_every_figure(found):
    for name in ("teacher", "training_free", "student"):
        assert 0 < found[name]["retrieval"]["ndcg_at_10"] <= 1
        assert 0 < found[name]["retrieval"]["mrr"] <= 1
        assert -100 <= found[name]["stsb"]["spearman"] <= 100
        assert 0 <= found[name]["classification"]["sst2"]["accuracy"] <= 1
    assert found["evaluated"] == {"retrieval_pairs": 30, "stsb_pairs": 30, "classification": {"sst2": 30}}


def test_a_student_that_uses_every_expert_keeps_everything(found):
    assert found["student"]["embedding_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["retention"]["retrieval"] == {"ndcg_at_10": 1.0, "mrr": 1.0}
    assert found["retention_interval"]["retrieval"]["mrr"] == {"low": 1.0, "high": 1.0}
    assert found["retention"]["stsb"]["spearman"] == pytest.approx(1, abs=1e-3)
    assert found["student"]["general"] == pytest.approx({"rank_correlation": 1, "cosine": 1, "cosine_low": 1}, abs=1e-5)
    assert found["active_ffn_share"] == 1 and found["amdahl_bound"] == 1
    assert all(row["oracle_error"] < 1e-3 and row["router_recall"] == 1 for row in found["layers"])


def test_a_mixture_that_leaves_experts_out_differs(found):
    assert found["training_free"]["embedding_cosine"] < 0.999
    assert 0 < found["training_free"]["general"]["rank_correlation"] < 0.999
    interval = found["retention_interval_training_free"]["retrieval"]["ndcg_at_10"]
    assert interval["low"] < found["retention_training_free"]["retrieval"]["ndcg_at_10"] < interval["high"]


def test_retention_is_student_over_teacher(found):
    for model, key in (("student", "retention"), ("training_free", "retention_training_free")):
        for group, name in (("retrieval", "ndcg_at_10"), ("retrieval", "mrr"), ("stsb", "spearman")):
            ratio = found[model][group][name] / found["teacher"][group][name]
            assert found[key][group][name] == pytest.approx(ratio, rel=1e-3)


def test_parameters_and_flops_count_what_is_active(found):
    assert found["parameters"]["student_active"] == found["parameters"]["student"]
    assert found["flops_per_token"]["length"] == 32
    routers = 2 * 2 * 32 * E
    assert found["flops_per_token"]["student"] == found["flops_per_token"]["teacher"] + routers


def test_every_layer_is_diagnosed_and_plotted(workspace, found):
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    for row in found["layers"]:
        assert sum(row["load"]) == pytest.approx(1, abs=1e-5) and row["dead_experts"] == 0
        assert row["gap"] == pytest.approx(row["router_error"] - row["oracle_error"], abs=2e-6)
    layers = list(csv.DictReader((workspace / "metrics/plots/layers.csv").open()))
    load = list(csv.DictReader((workspace / "metrics/plots/load.csv").open()))
    assert float(layers[1]["router_recall"]) == found["layers"][1]["router_recall"]
    assert len(load) == 2 * E and float(load[5]["share"]) == found["layers"][1]["load"][1]


def test_the_teacher_is_judged_as_sentence_transformers_would(workspace, found):
    """A second way to the same figure: plain transformers, text by text."""
    model, tokenizer = load_dense(str(workspace / "data/teacher"))
    pairs = corpus.read_jsonl(workspace / "data/benchmarks/retrieval.jsonl")

    def embed(text: str) -> torch.Tensor:
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            return torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0)

    scores = (
        torch.stack([embed(pair["query"]) for pair in pairs])
        @ torch.stack([embed(pair["document"]) for pair in pairs]).T
    )
    ranks = 1 + (scores > scores.diagonal().unsqueeze(1)).sum(1)
    assert found["teacher"]["retrieval"]["mrr"] == pytest.approx((1 / ranks).mean().item(), abs=1e-5)


def test_examples_show_what_queries_find(found):
    assert len(found["examples"]) == 3
    for row in found["examples"]:
        assert row["query"] and len(row["teacher"]) == len(row["student"]) == 3
        assert row["teacher"] == row["student"], "the student with every expert finds what the teacher finds"
        assert sum(neighbour["right"] for neighbour in row["teacher"]) <= 1


def test_evaluating_again_gives_the_same_bytes_and_needs_no_data_folder(workspace, found, tmp_path):
    shutil.copytree(workspace / "data", tmp_path / "data")
    shutil.copytree(workspace / "models", tmp_path / "models")
    stage = make_stage("evaluate", tmp_path, *SMALL)
    evaluate.run(stage)
    for name in ("evaluate.json", "plots/layers.csv", "plots/load.csv"):
        assert (tmp_path / "metrics" / name).read_bytes() == (workspace / "metrics" / name).read_bytes()

    benchmarks = tmp_path / "data/benchmarks"
    shutil.rmtree(benchmarks / "sts")
    shutil.rmtree(benchmarks / "classification")
    benchmark_texts.embed(stage, benchmarks, *load_dense(str(tmp_path / "data/teacher")), 32)
    evaluate.run(stage)
    found = json.loads((tmp_path / "metrics/evaluate.json").read_text())
    assert set(found["student"]) == {"retrieval", "embedding_cosine", "general"}
    assert set(found["retention"]) == {"retrieval"}


def test_a_teacher_that_finds_nothing_is_refused(workspace):
    from ffn2moe.metrics import retrieval_ranks

    benchmarks = Benchmarks.read(workspace / "data/benchmarks")
    texts = benchmarks.texts()
    judged = judge_embeddings.Judged(Benchmarks(benchmarks.pairs, [], {}), texts, torch.ones(len(texts), 4), seed=0)
    assert retrieval_ranks(torch.ones(3, 4), torch.ones(3, 4)).tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match=r"teacher scores 0 on retrieval.ndcg_at_10"):
        judge_embeddings.retention(judged, judged, benchmarks, seed=0)
