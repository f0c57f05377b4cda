"""Every kind of classifier is converted as what it is, or refused before the work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder

import ffn2moe
from ffn2moe import cli, metrics
from ffn2moe import shrink as shrinking
from ffn2moe.conversion.quality import judge
from ffn2moe.conversion.settings import Settings
from ffn2moe.convert import convert
from ffn2moe.data.batches import in_order
from ffn2moe.dense.load import load_dense
from ffn2moe.moe.describe import spec_of
from ffn2moe.runtime.plans import PLANS, obstacle
from ffn2moe.shrinking.usage import see
from tests.test_classifiers import NER, make, of_problem
from tests.texts import make_texts, write_corpus

QUICK = Settings(num_experts=4, num_active=2, texts=60, calibration_tokens=200, distill_steps=3, onnx=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "texts.jsonl", make_texts(80)))


def kinds(folder: Path, kind: str) -> Path:
    if kind == "token_classification":
        return make(folder, "bert", "TokenClassification", id2label=dict(enumerate(NER)))
    return make(folder, "bert", **of_problem(kind))


@pytest.mark.parametrize(
    ("kind", "figure", "distance"),
    [
        ("multi_label", "difference", "difference"),
        ("regression", "correlation", "relative_error"),
        ("one_label", "rank_correlation", "relative_error"),
        ("token_classification", "kappa", "divergence"),
    ],
)
def test_every_kind_is_distilled_by_its_own_loss_and_judged_by_its_own_measure(kind, figure, distance, tmp_path):
    """400 texts, of which 20 judge: by three of them concordance fell on AVX2 while the trained distance did, too."""
    corpus = str(write_corpus(tmp_path / "texts.jsonl", make_texts(400)))
    dense = kinds(tmp_path / "dense", kind)
    said: list[str] = []
    settings = replace(QUICK, corpus=corpus, texts=400, distill_steps=40, batch_tokens=512)
    manifest = convert(str(dense), tmp_path / "out", settings, say=said.append)
    quality = manifest["convert"]["quality"]
    assert manifest["spec"]["problem"] == (kind if "token" not in kind else "single_label")
    assert manifest["spec"]["max_length"] == 64, "what its tokenizer gives, not less"
    assert {metrics.KEPT, figure, distance} <= set(quality["distilled"])
    assert quality["distilled"][metrics.KEPT] > quality["routed"][metrics.KEPT]
    assert quality["distilled"][distance] < 0.95 * quality["routed"][distance]
    assert any("concordance" in line for line in said)
    assert manifest["convert"]["data"].get("pairs", False) == (kind == "one_label")
    assert any("read in pairs: made of the texts" in line for line in said) == (kind == "one_label")


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression", "one_label", "token_classification"])
def test_the_judge_of_a_conversion_tells_a_right_student_from_a_constant_one(kind, corpus, tmp_path):
    dense = kinds(tmp_path / "dense", kind)
    teacher, tokenizer = load_dense(str(dense))
    constant, _ = load_dense(str(dense))
    with torch.no_grad():
        constant.classifier.weight.zero_()
    head = "token_classification" if "token" in kind else "classification"
    spec = spec_of(teacher, head=head, num_experts=4, num_active=2, partition="random", teacher="", max_length=64)
    batches = list(in_order(head, tokenizer(make_texts(30), truncation=True)["input_ids"], batch_texts=8))
    assert judge(teacher, teacher, batches, spec)[metrics.KEPT] == pytest.approx(1)
    assert judge(teacher, constant, batches, spec)[metrics.KEPT] == pytest.approx(0, abs=1e-6)


def test_pairs_of_two_columns_are_what_a_classifier_learns_from(tmp_path):
    dense = make(tmp_path / "dense", "bert", **of_problem("single_label"))
    rows = [{"premise": text.split("\n\n")[0], "claim": text[-30:]} for text in make_texts(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = replace(QUICK, corpus=str(path), text_column="premise,claim")
    said: list[str] = []
    manifest = convert(str(dense), tmp_path / "out", settings, say=said.append)
    assert manifest["convert"]["data"]["pairs"] is True
    assert any("read in pairs: the columns premise,claim" in line for line in said)


def test_a_cross_encoder_is_converted_and_ranks_by_the_command(corpus, tmp_path, capsys):
    make(tmp_path / "bert", "bert", num_labels=1)
    CrossEncoder(str(tmp_path / "bert"), activation_fn=torch.nn.Identity()).save_pretrained(str(tmp_path / "dense"))
    settings = replace(QUICK, corpus=corpus, num_active=4, distill_steps=0, onnx=True)
    manifest = convert(str(tmp_path / "dense"), tmp_path / "out", settings)
    assert manifest["spec"]["problem"] == "regression" and manifest["model"]["token_types"] is True
    documents = ["a red house", "the sorted list of values", "Music"]
    assert cli.main(["info", str(tmp_path / "out")]) == 0
    assert "values as they are" in capsys.readouterr().out
    assert cli.main(["classify", str(tmp_path / "out"), *documents, "--query", "the house", "--plan", "sorted"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = CrossEncoder(str(tmp_path / "dense"), device="cpu").predict([("the house", one) for one in documents])
    assert [row["text_pair"] for row in rows] == documents
    np.testing.assert_allclose([row["labels"][0]["score"] for row in rows], expected, atol=1e-5)
    tabs = [f"the house\t{one}" for one in documents]
    assert cli.main(["classify", str(tmp_path / "out"), *tabs, "--pairs", "--plan", "sorted"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert cli.main(["classify", str(tmp_path / "out"), "one", "a\tb", "--pairs"]) == 2
    printed = capsys.readouterr()
    assert "text 0 has 0 tabs" in printed.err and not printed.out
    export = ffn2moe.open_export(tmp_path / "out", "sorted", threads=1)
    for given, message in (
        ("one", "takes a list"),
        ([("a", "b", "c")], "pair 0 has 3 parts"),
        ([("a", " ")], "text 2 of pair 0 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            export.classify(given)
    assert export.classify([]).shape == (0, 1)


@pytest.mark.parametrize(("kind", "column"), [("one_label", "text"), ("single_label", "text,text")])
def test_a_classifier_of_pairs_is_shrunk_on_pairs(kind, column, corpus, tmp_path, monkeypatch):
    dense = kinds(tmp_path / "dense", kind)
    convert(str(dense), tmp_path / "out", replace(QUICK, corpus=corpus, distill_steps=0))
    seen = []
    monkeypatch.setattr(
        shrinking, "see", lambda model, batches, *rest: seen.extend(batches) or see(model, batches, *rest)
    )
    shrinking.shrink(tmp_path / "out", corpus, tmp_path / "small", keep=3, text_column=column, onnx=False)
    assert seen and all(batch.inputs["token_type_ids"].max() == 1 for batch in seen)


def rewrite(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not ...}))


@pytest.mark.parametrize(
    ("kind", "file", "changes", "message"),
    [
        ("llama", "config.json", {"pad_token_id": None}, "has no pad_token_id and its tokenizer pads with 0"),
        ("llama", "config.json", {"pad_token_id": 5}, "has pad_token_id 5 and its tokenizer pads with 0"),
        ("llama", "tokenizer_config.json", {"pad_token": None}, "its tokenizer has no pad_token"),
        ("bert", "config.json", {"problem_type": "ordinal"}, "ordinal"),
        ("bert", "config_sentence_transformers.json", {"activation_fn": "torch.nn.Tanh"}, "applies torch.nn.Tanh"),
        (
            "bert",
            "config_sentence_transformers.json",
            {"default_prompt_name": "q", "prompts": {"q": "query: "}},
            "puts the prompt 'query: ' before every first text",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_first_by_its_name(kind, file, changes, message, corpus, tmp_path):
    dense = make(tmp_path / "dense", kind, num_labels=1)
    if kind == "bert":
        (dense / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    rewrite(dense / file, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        convert(str(dense), tmp_path / "out", replace(QUICK, corpus=corpus))
    assert str(refused.value).count("\n") < 4
    assert not list(tmp_path.glob("out*"))


def test_only_classifiers_of_texts_take_pairs(corpus, tmp_path):
    dense = kinds(tmp_path / "dense", "token_classification")
    with pytest.raises(
        ValueError, match=r"--pairs yes asks for pairs of texts, .* only classifiers of texts read pairs"
    ):
        convert(str(dense), tmp_path / "out", replace(QUICK, corpus=corpus, pairs="yes"))


def test_a_classifier_that_no_graph_can_hold_is_told_of_before_the_work():
    config = transformers.BartConfig(architectures=["BartForSequenceClassification"])
    assert "which no graph can hold" in (obstacle(PLANS["sorted"], "classification", config) or "")
    for other, head in (
        ("T5ForTokenClassification", "token_classification"),
        ("BartForConditionalGeneration", "seq2seq"),
    ):
        config.architectures = [other]
        assert obstacle(PLANS["sorted"], head, config) is None
