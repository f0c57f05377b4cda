"""The stages judge a language model by the questions and the text of data.folder, and learn from none of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ffn2moe.dense.load import load_dense
from ffn2moe.judges import answers
from ffn2moe.judges.asked import ask
from ffn2moe.judges.items import TASKS
from ffn2moe.preflight import room
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.duration import estimated
from tasks import check, corpus, evaluate, language_sets, prepare
from tasks.measures import TASKS_KEPT, at
from tasks.params import load_params
from tasks.report import benchmark_rows
from tests.test_judges import made_up, make_llama, one_by_one, short, write
from tests.texts import PARAMS, make_stage, make_texts, write_corpus

SETTINGS = (
    "teacher.source=teacher",
    "teacher.max_length=32",
    "data.corpus=texts.jsonl",
    "data.folder=sets",
    "data.calibration_texts=20",
    "data.evaluation_pairs=20",
    "evaluate.continuation=4",
)
ARTICLE = "\n = {0} = \n\n {0} is a word , and it is @-@ short here . \n\n = = More = = \n\n The {0} of it ends . \n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What prepare wrote for a LLaMA whose answers are right more often than chance."""
    root = tmp_path_factory.mktemp("sets")
    model, tokenizer = make_llama(root / "teacher")
    items = [item for item in made_up(240) if len(item.choices) == 4]
    nats = one_by_one(model, ask(items, tokenizer, 64).asked).view(-1, 4)
    divisor = torch.tensor([[len(choice) for choice in item.choices] for item in items])
    known = (nats / divisor).argmax(1).tolist()
    rows = [
        {"context": one.context, "endings": list(one.choices), "label": best if number % 2 else one.label}
        for number, (one, best) in enumerate(zip(items, known, strict=True))
    ]
    sentences = short(60, 5)
    pairs = [
        {"good": text, "bad": " ".join(sorted(text.split())), "phenomenon": "order", "paradigm": "a"}
        for text in sentences
    ]
    for name in ("hellaswag", "blimp", "wikitext2"):
        (root / "sets" / name).mkdir(parents=True)
    write(root / "sets/hellaswag", "validation.jsonl", rows)
    write(root / "sets/blimp", "pairs.jsonl", pairs)
    (root / "sets/wikitext2/valid.txt").write_text("".join(ARTICLE.format(word) for word in short(60, 6)))
    write_corpus(root / "texts.jsonl", [*make_texts(300), *sentences[:20]])
    prepare.run(make_stage("prepare", root, *SETTINGS))
    return root


def test_what_judges_is_not_learnt_from(prepared):
    learnt = {corpus.normalise(row["text"]) for name in ("train", "calibration", "evaluation")
              for row in corpus.read_jsonl(prepared / f"data/corpus/{name}.jsonl")}  # fmt: skip
    sets = language_sets.read(prepared / "data/benchmarks/language")
    assert {name: len(items) for name, items in sets.questions.items()} == {"blimp": 60, "hellaswag": 240}
    assert sets.questions == language_sets.of_folder(prepared / "sets").questions
    assert learnt.isdisjoint(map(corpus.normalise, sets.judged()))
    assert corpus.normalise(corpus.wikitext_paragraphs(sets.text.split("\n"))[0]) not in learnt


def test_the_beginning_of_the_test_file_is_read_or_else_that_of_the_other(prepared, tmp_path):
    text = language_sets.of_folder(prepared / "sets").text
    assert text == (prepared / "sets/wikitext2/valid.txt").read_text()
    shutil.copytree(prepared / "sets/wikitext2", tmp_path / "wikitext2")
    (tmp_path / "wikitext2/test.txt").write_text("one line\n" * 20_000)
    text = language_sets.of_folder(tmp_path).text
    assert text.startswith("one line\n") and text.endswith("one line\n")
    assert language_sets.MOST_CHARACTERS - 10 < len(text) <= language_sets.MOST_CHARACTERS


def judged(root: Path, student, *settings: str) -> dict:
    teacher, tokenizer = load_dense(str(root / "data/teacher"))
    stage = make_stage("evaluate", root, *SETTINGS, *settings)
    spec = SimpleNamespace(head="causal", problem=None, max_length=32)
    models = {"teacher": teacher, "training_free": student, "student": teacher}
    return evaluate.rounded(evaluate.JUDGES["causal"](stage, models, tokenizer, spec, "cpu"))


def test_the_stage_gives_every_figure_with_its_interval(prepared):
    other, _ = make_llama(prepared / "other", seed=3)
    found = judged(prepared, other)
    assert found["evaluated"]["questions"] == {"hellaswag": 240, "blimp": 60}
    items = TASKS["hellaswag"].read(prepared / "sets/hellaswag/validation.jsonl")
    _, tokenizer = load_dense(str(prepared / "data/teacher"))
    nats = one_by_one(other, ask(items, tokenizer, 64).asked)
    for figure in ("accuracy", "accuracy_normalised"):
        wanted = answers.right(items, nats, figure).mean().item()
        assert found["training_free"]["tasks"]["hellaswag"][figure] == pytest.approx(wanted, abs=1e-6)
    assert found["teacher"]["tasks"]["hellaswag"]["accuracy_normalised"] > 0.5
    assert found["retention"]["tasks"]["kept"] == found["retention"]["text"]["perplexity"] == 1
    assert found["student"]["text"] == {
        "agreement": 1.0, "divergence": 0.0, "perplexity": found["teacher"]["text"]["perplexity"]
    }  # fmt: skip
    free, limits = found["retention_training_free"], found["retention_interval_training_free"]
    for path in (TASKS_KEPT, ("tasks", "hellaswag", "accuracy_normalised"), ("text", "perplexity")):
        assert at(limits, (*path, "low")) < at(free, path) < at(limits, (*path, "high")), path
    shown = {row["label"] for row in benchmark_rows(found)}
    assert {"BLiMP, accuracy", "perplexity on WikiText-2"} <= shown and any("tasks kept" in one for one in shown)
    fewer = judged(prepared, other, "evaluate.most_questions=50")
    assert fewer["evaluated"]["questions"] == {"hellaswag": 50, "blimp": 50}


def test_a_constant_student_keeps_no_task_of_equal_answers(prepared, tmp_path):
    """Answers of one length, so that a model that knows nothing finds them alike."""
    root = Path(shutil.copytree(prepared, tmp_path / "root"))
    rows = corpus.read_jsonl(root / "data/benchmarks/language/hellaswag.jsonl")
    _, tokenizer = load_dense(str(root / "data/teacher"))
    for row in rows:
        row["choices"] = [tokenizer.decode([60 + place]) * 3 for place in range(4)]
    corpus.write_jsonl(root / "data/benchmarks/language/hellaswag.jsonl", rows)
    (root / "data/benchmarks/language/blimp.jsonl").unlink()
    constant, _ = load_dense(str(root / "data/teacher"))
    constant.lm_head.register_forward_hook(lambda head, given, output: torch.zeros_like(output))
    teacher, _ = load_dense(str(root / "data/teacher"))
    nats = one_by_one(teacher, ask(language_sets.read(root / "data/benchmarks/language").questions["hellaswag"],
                                   tokenizer, 64).asked).view(-1, 4)  # fmt: skip
    for row, best in zip(rows, nats.argmax(1).tolist(), strict=True):
        row["label"] = best
    corpus.write_jsonl(root / "data/benchmarks/language/hellaswag.jsonl", rows)
    found = judged(root, constant)
    assert found["training_free"]["tasks"]["hellaswag"]["accuracy"] == 0.25
    assert at(found["retention_training_free"], TASKS_KEPT) == 0
    assert at(found["retention_interval_training_free"], TASKS_KEPT) == {"low": 0, "high": 0}
    assert at(found["retention"], TASKS_KEPT) == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("hellaswag/validation.jsonl", '{"ctx": "a"}\n', "validation.jsonl:1 has no 'context' and no 'endings'"),
        ("hellaswag/train.jsonl", "", "must hold one .jsonl file of questions .* train.jsonl, validation.jsonl"),
        ("blimp/pairs.jsonl", "", "pairs.jsonl holds no question"),
    ],
)
def test_bad_questions_are_refused_before_a_run_starts(prepared, tmp_path, file, content, message):
    for name in ("teacher", "sets"):
        shutil.copytree(prepared / name, tmp_path / name)
    shutil.copy(prepared / "texts.jsonl", tmp_path)
    (tmp_path / "sets" / file).write_text(content)
    params = load_params(PARAMS, [*SETTINGS, "decompose.num_experts=4", "decompose.num_active=1"])
    with pytest.raises(ValueError, match=message):
        check.check(params, tmp_path, lambda line: None)


def test_a_folder_with_questions_alone_is_enough_for_a_language_model(prepared, tmp_path):
    shutil.copytree(prepared / "teacher", tmp_path / "teacher")
    shutil.copytree(prepared / "sets/blimp", tmp_path / "sets/blimp")
    shutil.copy(prepared / "texts.jsonl", tmp_path)
    prepare.run(make_stage("prepare", tmp_path, *SETTINGS))
    assert json.loads((tmp_path / "data/benchmarks/about.json").read_text())["head"] == "causal"
    assert set(language_sets.read(tmp_path / "data/benchmarks/language").questions) == {"blimp"}


def test_the_check_knows_the_time_and_the_memory_of_judging(prepared, monkeypatch):
    params = load_params(PARAMS, [*SETTINGS, "decompose.num_experts=4", "decompose.num_active=1"])
    asked = check.request_of(params, prepared)
    none = replace(asked, question_tokens=0)
    assert asked.question_tokens > 10_000
    few = load_params(PARAMS, [*SETTINGS, "evaluate.most_questions=4"])
    assert check.request_of(few, prepared).question_tokens < asked.question_tokens
    assert estimated(Case(asked))["judging"] > estimated(Case(none))["judging"]
    assert room.room_of(Case(asked)).judging > room.room_of(Case(none)).judging == 0
    monkeypatch.setattr(room, "logits_bytes", lambda vocabulary, length, models: 2**60)
    with pytest.raises(ValueError, match=r"of memory to judge, .*: take wikitext2, hellaswag and blimp out of data"):
        check.check(params, prepared, lambda line: None)
