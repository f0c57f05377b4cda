"""Every kind of classifier goes through all stages, and is served and scored as transformers' pipeline answers.

All experts are active and training moves the weights by nothing that shows, so that the student is its teacher.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from mlflow.exceptions import MlflowException

import ffn2moe
from flows import promote, score
from flows.serve import served
from flows.workspace import FlowError
from tasks.registry import Registry
from tests.conftest import make_tiny_t5
from tests.test_classifiers import NER, make, of_problem
from tests.test_language_models import SMALL, STAGES
from tests.texts import make_stage, make_texts

SETTINGS = (
    *SMALL,
    "decompose.num_experts=4",
    "decompose.num_active=4",
    "train_router.steps=1",
    "train_router.refit=0",
    "distill.steps=2",
    "distill.learning_rate=1e-12",
    "export.engines=[onnxruntime]",
    "gate.min_retention=1",  # plans in float32 alone
    "benchmark.rounds=1",
)
PAIRS = [["the red house", "a cat in the garden"], ["sort the values", "returns the sorted list"]]
TEXTS = ["the red house", "returns the sorted list of all values", "a cat in the dark garden"]


@dataclass(frozen=True)
class Case:
    """A kind of classifier, what it is asked, and how transformers is asked the same."""

    name: str
    inputs: list[Any]
    model: dict[str, Any]
    settings: tuple[str, ...] = ()
    head: str = "SequenceClassification"

    def pipeline(self, teacher: Path) -> list[Any]:
        if self.head == "TokenClassification":
            return tf.pipeline("ner", str(teacher), aggregation_strategy="simple")(self.inputs)
        pipe = tf.pipeline("text-classification", str(teacher), top_k=None)
        asked = [{"text": one[0], "text_pair": one[1]} if isinstance(one, list) else one for one in self.inputs]
        return pipe(asked)


CASES = {
    case.name: case
    for case in (
        Case("single_label", TEXTS, of_problem("single_label")),
        Case("multi_label", TEXTS, of_problem("multi_label")),
        Case("regression", TEXTS, of_problem("regression")),
        Case("reranker", PAIRS, of_problem("one_label"), ("data.text_column=query,document",)),
        Case("entities", TEXTS, {"id2label": dict(enumerate(NER))}, head="TokenClassification"),
    )
}


def write_rows(path: Path) -> None:
    """A corpus with texts, and with a query for each."""
    texts = make_texts(120)
    rows = [{"text": text, "query": text[:20], "document": texts[index - 1]} for index, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", params=list(CASES))
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def root(case, tmp_path_factory) -> Path:
    """A workspace after all stages."""
    root = tmp_path_factory.mktemp(case.name) / "root"
    make(root / "teacher", "bert", case.head, **case.model)
    return through(root, *case.settings)


def through(root: Path, *settings: str) -> Path:
    """Run all stages on the teacher of a workspace."""
    write_rows(root / "texts.jsonl")
    for name in ("ffn2moe", "tasks"):
        shutil.copytree(Path(ffn2moe.__file__).parent.parent / name, root / name)
    for name, module in STAGES.items():
        module.run(make_stage(name, root, *SETTINGS, "data.corpus=texts.jsonl", *settings))
    return root


def require_same(found: list[Any], expected: list[Any]) -> None:
    """The answers of a served model and of transformers' pipeline: the same words, and numbers to 1e-5."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert [{**one, "score": 0} for one in mine] == [{**one, "score": 0} for one in theirs]
        np.testing.assert_allclose([one["score"] for one in mine], [one["score"] for one in theirs], rtol=0, atol=1e-5)


def test_the_registered_model_answers_as_transformers_pipeline(case, root):
    found = Registry(root, "tiny").predict(1, case.inputs)
    expected = case.pipeline(root / "teacher")
    assert any(expected), "there is something to compare"
    require_same(found, expected)


def test_a_file_is_scored_as_the_pipeline_does(case, root, tmp_path):
    import pyarrow.parquet

    pairs = isinstance(case.inputs[0], list)
    keys, column = (("query", "document"), "query,document") if pairs else (("text",), "text")
    rows = [dict(zip(keys, one if pairs else [one], strict=True)) for one in case.inputs]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = case.pipeline(root / "teacher")
    model = Registry(root, "tiny").load(1)
    key = "entities" if case.name == "entities" else "labels"
    for name in ("out.jsonl", "out.parquet"):
        score.score(model, source, tmp_path / name, column, False, lambda items, total: items)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    require_same([row[key] for row in found], expected)
    require_same(pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()[key], expected)
    if key == "labels":
        score.score(model, source, tmp_path / "out.npy", column, False, lambda items, total: items)
        names = model.unwrap_python_model().export.labels
        by_label = [{one["label"]: one["score"] for one in row} for row in expected]
        in_order = [[row[name] for name in names] for row in by_label]
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), in_order, atol=1e-5)


def test_the_figures_are_those_of_a_right_student(case, root):
    found = json.loads((root / "metrics/evaluate.json").read_text())
    assert found["student"]["to_teacher"]["concordance"] == pytest.approx(1, abs=1e-5)
    plans = json.loads((root / "models/exported/manifest.json").read_text())["plans"]
    assert plans["sorted"]["retention"] == pytest.approx(1, abs=1e-5)
    page = (root / "reports/report.html").read_text()
    assert "concordance with the teacher" in page
    assert ("pairs of texts, held out" in page) == (case.name == "reranker")


@pytest.mark.parametrize("case", ["reranker"], indirect=True)
def test_pairs_are_served_over_http_and_bad_ones_refused_with_their_place(case, root, tmp_path):
    registry = Registry(root, "tiny")
    with served(registry, 1, log=tmp_path / "log") as server:
        checks = promote.smoke(server, 1, registry.export(1))
        assert all(check.passed for check in checks), checks
        status, answer = server.ask(case.inputs)
        assert status == 200
        require_same(answer["predictions"], case.pipeline(root / "teacher"))
        named = [{"text": first, "text_pair": second} for first, second in case.inputs]
        assert server.ask(named)[1] == answer
        for bad, why in (
            ([["a", "b", "c"]], "pair 0 has 3 texts; send two"),
            ([["a", "b"], ["a", " "]], "text 2 of pair 1 is empty"),
            ([["a", 1]], "text 2 of pair 0 is int, not a string"),
            ([{"query": "a"}], "text 0 has the keys query; send text and text_pair"),
        ):
            status, answer = server.ask(bad)
            assert (status, why in answer["message"]) == (400, True), answer
        told = server.ask([], info=True)[1]["predictions"][0]
        assert told["pairs"] and told["labels"] == ["LABEL_0"]


@pytest.fixture(scope="module")
def answering(tmp_path_factory) -> Path:
    """A workspace in which a tiny T5 went through all stages."""
    root = tmp_path_factory.mktemp("t5") / "root"
    make_tiny_t5(root / "teacher")
    return through(root)


def test_an_encoder_decoder_is_judged_registered_and_scored_as_transformers_answers(answering, tmp_path):
    found = json.loads((answering / "metrics/evaluate.json").read_text())
    assert found["student"]["to_teacher"]["kappa"] == found["retention"]["to_teacher"]["kappa"] == 1
    plans = json.loads((answering / "models/exported/manifest.json").read_text())["plans"]
    assert plans["dense"]["kappa"] == plans["sorted"]["retention"] == 1
    tokenizer = tf.AutoTokenizer.from_pretrained(answering / "teacher")
    model = tf.T5ForConditionalGeneration.from_pretrained(answering / "teacher")
    expected = []
    for text in TEXTS:
        ids = model.generate(tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=128, do_sample=False)[0]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))
    loaded = Registry(answering, "tiny").load(1)
    assert [text.strip() for text in loaded.predict(TEXTS)] == [text.strip() for text in expected]
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    score.score(loaded, tmp_path / "in.txt", tmp_path / "out.jsonl", "text", False, lambda items, total: items)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == loaded.predict(TEXTS)
    with pytest.raises(FlowError, match="text is made of single texts; name one column"):
        score.score(loaded, tmp_path / "in.txt", tmp_path / "x.jsonl", "a,b", False, lambda items, total: items)
    with pytest.raises(MlflowException, match="text 0 is list; this model reads single texts"):
        loaded.predict([["a", "b"]])
