"""The first stage writes what the others read, and refuses what it cannot use before it writes anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ffn2moe.dense.load import load_dense
from tasks import corpus, decompose, prepare
from tasks.tokens import read_tokens
from tests.conftest import make_tiny_bert, make_tiny_classifier, make_tiny_t5
from tests.sentence_folders import save
from tests.texts import make_stage, make_texts, write_corpus

SMALL = ("data.calibration_texts=20", "data.evaluation_pairs=30", "teacher.max_length=32")


@pytest.fixture
def workspace(tmp_path) -> Path:
    write_corpus(tmp_path / "texts.jsonl", make_texts(300))
    return tmp_path


def run(root: Path, teacher: Path, *overrides: str) -> dict:
    stage = make_stage("prepare", root, f"teacher.source={teacher}", "data.corpus=texts.jsonl", *SMALL, *overrides)
    prepare.run(stage)
    return json.loads((root / "metrics/prepare.json").read_text())


def benchmarks(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(root).items() if name.startswith("data/benchmarks")}


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("data", "metrics")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def test_everything_later_stages_read_is_written(workspace, tiny_teacher):
    counts = run(workspace, tiny_teacher)
    assert counts["retrieval"] == {"pairs": 30, "from": "the corpus"}
    assert counts["texts"]["calibration"] == 20
    expected = {"family": "bert", "layers": 2, "width": 32, "ffn_width": 64, "activation": "gelu"}
    assert expected.items() <= counts["teacher"].items()
    splits = {name: corpus.read_texts(workspace / f"data/corpus/{name}.jsonl") for name in counts["texts"]}
    assert {name: len(texts) for name, texts in splits.items()} == counts["texts"]
    pairs = corpus.read_jsonl(workspace / "data/benchmarks/retrieval.jsonl")
    assert len(pairs) == 30 and set(pairs[0]) == {"query", "document"}
    learnt = {corpus.normalise(text) for name in ("train", "calibration") for text in splits[name]}
    assert learnt.isdisjoint(corpus.normalise(side) for pair in pairs for side in pair.values())


def test_the_written_teacher_is_the_teacher(workspace, tiny_teacher):
    run(workspace, tiny_teacher)
    model, tokenizer = load_dense(str(workspace / "data/teacher"))
    original, _ = load_dense(str(tiny_teacher))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )
    assert tokenizer("the cat")["input_ids"]


def test_twice_the_same_gives_the_same_bytes(workspace, tiny_teacher):
    run(workspace, tiny_teacher)
    first = files(workspace)
    run(workspace, tiny_teacher)
    assert files(workspace) == first


def test_a_data_folder_joins_training_and_evaluation(workspace, tiny_teacher):
    folder = workspace / "sets"
    (folder / "sst2").mkdir(parents=True)
    (folder / "stsb").mkdir()
    (folder / "sst2/train.tsv").write_text("a good film\t1\na bad film\t0\n")
    (folder / "sst2/dev.tsv").write_text("no bad film\t1\n")
    (folder / "stsb/dev.csv").write_text("a\tb\tc\td\t2.5\tthe dog is dark\tthe dog is light\n")
    counts = run(workspace, tiny_teacher, "data.folder=sets")
    assert counts["stsb_pairs"] == 1 and counts["classification"] == {"sst2": {"train": 2, "dev": 1}}
    row = corpus.read_jsonl(workspace / "data/benchmarks/sts/stsb.jsonl")
    assert row == [{"score": 2.5, "first": "the dog is dark", "second": "the dog is light"}]
    learnt = corpus.read_texts(workspace / "data/corpus/train.jsonl")
    learnt += corpus.read_texts(workspace / "data/corpus/calibration.jsonl")
    assert "a good film" in learnt and "no bad film" not in learnt and "the dog is dark" not in learnt

    judged = benchmarks(workspace)
    counts = run(workspace, tiny_teacher, "data.folder=sets", "data.learn_from_folder=false")
    assert len(judged) == 5 and benchmarks(workspace) == judged and counts["joined_from_folder"] == 0
    assert "a good film" not in corpus.read_texts(workspace / "data/corpus/train.jsonl")

    run(workspace, tiny_teacher)
    assert not (workspace / "data/benchmarks/sts").exists(), "what an earlier run wrote is gone"


def test_a_corpus_that_cannot_be_its_own_benchmark_takes_docstrings(workspace, tiny_teacher, monkeypatch):
    asked = []

    def library(**options: object) -> list[str]:
        asked.append(options)
        return make_texts(100, seed=9)

    monkeypatch.setattr(corpus, "docstrings", library)
    (workspace / "lines.txt").write_text("".join(f"line {n} of a short kind\n" for n in range(200)))
    counts = run(workspace, tiny_teacher, "data.corpus=lines.txt")
    assert asked and counts["retrieval"] == {"pairs": 30, "from": "docstrings"}
    assert counts["texts"]["evaluation"] == 20


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["teacher.source=nowhere/at/all"], FileNotFoundError, "teacher"),
        (["teacher.source=package:no-such-model-package"], FileNotFoundError, "not installed"),
        (["teacher.max_length=65"], ValueError, "more than the 64 positions"),
        (["data.corpus=gone.txt"], FileNotFoundError, "no file"),
        (["data.text_column=body"], ValueError, "no column 'body'"),
        (["data.calibration_texts=900"], ValueError, "too small to split"),
        (["data.folder=gone"], FileNotFoundError, "data.folder"),
    ],
)
def test_bad_input_is_refused_and_nothing_that_was_good_is_lost(workspace, tiny_teacher, overrides, error, message):
    run(workspace, tiny_teacher)
    before = files(workspace)
    with pytest.raises(error, match=message):
        run(workspace, tiny_teacher, *overrides)
    assert files(workspace) == before


def test_texts_of_a_language_model_are_written_with_their_ids(workspace, tiny_teacher_gated):
    counts = run(workspace, tiny_teacher_gated)
    assert counts["teacher"]["head"] == "causal" and counts["texts"] == {
        "train": 250,
        "calibration": 20,
        "evaluation": 30,
    }
    _, tokenizer = load_dense(str(workspace / "data/teacher"))
    rows = corpus.read_jsonl(workspace / "data/corpus/train.jsonl")
    assert counts["tokens"]["train"] == sum(len(row["ids"]) for row in rows)
    for row in rows[:5]:
        assert row["ids"] == tokenizer(row["text"])["input_ids"]
    parts = [set(corpus.read_texts(workspace / f"data/corpus/{name}.jsonl")) for name in counts["texts"]]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 300


def test_a_language_model_can_write_its_own_corpus(workspace, tiny_teacher_gated):
    settings = ("data.corpus=generated", "data.max_texts=150", "data.calibration_texts=20", "teacher.max_length=12")
    first = run(workspace, tiny_teacher_gated, *settings)
    assert sum(first["texts"].values()) > 100
    rows = corpus.read_jsonl(workspace / "data/corpus/train.jsonl")
    assert all(row["text"].strip() and row["ids"][0] == 2 and len(row["ids"]) <= 12 for row in rows)
    written = files(workspace)
    run(workspace, tiny_teacher_gated, *settings)
    assert files(workspace) == written
    run(workspace, tiny_teacher_gated, *settings, "seed=1")
    assert files(workspace) != written


def test_only_a_language_model_writes_texts(workspace, tiny_teacher):
    with pytest.raises(ValueError, match="with the head embedding, which writes no texts"):
        run(workspace, tiny_teacher, "data.corpus=generated")


def test_texts_to_judge_by_can_be_given_and_are_not_learnt_from(workspace, tiny_teacher_gated):
    judged = make_texts(300)[:4]
    write_corpus(workspace / "judge.jsonl", judged)
    counts = run(workspace, tiny_teacher_gated, "data.evaluation=judge.jsonl")
    assert corpus.read_texts(workspace / "data/corpus/evaluation.jsonl") == judged
    assert counts["texts"]["train"] == 300 - 4 - 20


def test_a_classifier_is_judged_by_the_sets_that_have_its_classes(workspace, tmp_path):
    teacher = make_tiny_classifier(tmp_path / "teacher")
    folder = workspace / "sets"
    (folder / "sst2").mkdir(parents=True)
    (folder / "ag_news").mkdir()
    (folder / "sst2/train.tsv").write_text("a good film\tpositive\na bad film\tNegative\n")
    (folder / "sst2/dev.tsv").write_text("no bad film\tpositive\n")
    (folder / "ag_news/sample.csv").write_text("".join(f'"{n % 4}","t{n}","b"\n' for n in range(20)))
    counts = run(workspace, teacher, "data.folder=sets")
    assert counts["teacher"]["head"] == "classification" and set(counts["classification"]) == {"sst2"}
    (row,) = corpus.read_jsonl(workspace / "data/benchmarks/classification/sst2/dev.jsonl")
    assert row["label"] == 1 and row["text"] == "no bad film" and row["ids"]


def test_a_seq2seq_teacher_answers_its_texts_once_and_for_all(workspace, tmp_path):
    teacher = make_tiny_t5(tmp_path / "teacher")
    run(workspace, teacher, "teacher.max_length=12")
    model, _ = load_dense(str(workspace / "data/teacher"))
    for row in corpus.read_jsonl(workspace / "data/corpus/evaluation.jsonl")[:3]:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([row["ids"]]), decoder_input_ids=torch.tensor([row["decoder_ids"]])
            ).logits
        assert row["decoder_ids"][0] == 0 and 1 <= len(row["decoder_ids"]) <= 12
        assert logits[0, :-1].argmax(-1).tolist() == row["decoder_ids"][1:], "greedy: what it is given is what it says"


def test_a_model_that_sees_is_sent_to_convert(workspace, tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"is a vit model, which reads images .* with `ffn2moe convert`"):
        run(workspace, tmp_path / "vit")
    assert not (workspace / "data").exists()


def test_an_unsupported_architecture_is_refused_with_the_page_of_those_that_are(workspace, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ValueError, match=r"'other' model, which transformers .* does not know; docs/families.md"):
        run(workspace, tmp_path / "other")


def test_a_damaged_teacher_is_refused(workspace, tmp_path):
    from safetensors.torch import load_file, save_file

    teacher = make_tiny_bert(tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    save_file(
        {name: torch.full_like(value, torch.nan) for name, value in weights.items()},
        teacher / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="NaN"):
        run(workspace, teacher)
    (teacher / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises((ValueError, FileNotFoundError), match="cannot be read"):
        run(workspace, teacher)
    (teacher / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is not in .*: fetch"):
        run(workspace, teacher)


def test_a_tokenizer_of_another_model_is_refused(workspace, tmp_path):
    teacher = make_tiny_bert(tmp_path / "teacher", vocab_size=150)
    with pytest.raises(ValueError, match="belong to different models"):
        run(workspace, teacher)


def test_inputs_name_what_lies_outside_and_a_generated_corpus_needs_nothing(workspace, tiny_teacher_gated):
    from tasks import inputs

    write_corpus(workspace / "judge.jsonl", make_texts(3))

    def found(*overrides: str) -> dict:
        settings = (f"teacher.source={tiny_teacher_gated}", "data.corpus=generated", *overrides)
        inputs.run(make_stage("inputs", workspace, *settings))
        return json.loads((workspace / "data/inputs.json").read_text())

    assert found()["corpus"] == {"kind": "generated"} and found()["evaluation"] is None
    first = found("data.evaluation=judge.jsonl")["evaluation"]
    write_corpus(workspace / "judge.jsonl", make_texts(4))
    assert found("data.evaluation=judge.jsonl")["evaluation"] != first
    with pytest.raises(FileNotFoundError, match=r"data.evaluation = gone.jsonl is not a file"):
        found("data.evaluation=gone.jsonl")


def test_the_written_teacher_of_a_sentence_encoder_is_one_and_says_how_long_texts_are(workspace, tmp_path):
    folder = save("prompts and a default prompt", tmp_path)
    said = []
    stage = make_stage(
        "prepare", workspace, f"teacher.source={folder}", "data.corpus=texts.jsonl", *SMALL, "teacher.max_length=auto"
    )
    stage.say = said.append
    prepare.run(stage)
    assert "teacher.max_length = auto: texts are cut to 48 tokens" in said
    (model, tokenizer), (original, _) = load_dense(str(workspace / "data/teacher")), load_dense(str(folder))
    assert model.sentence.described == original.sentence.described
    spec = decompose.describe(make_stage("decompose", workspace, "teacher.max_length=auto"), model, tokenizer, None)
    assert (spec.max_length, spec.prompt) == (48, "document: ")
    tokens = read_tokens(workspace / "data/corpus/train.jsonl", spec.head, tokenizer, 48, prompt=spec.prompt)
    assert all(tokenizer.decode(ids).startswith("[CLS] document :") for ids in tokens.ids)
