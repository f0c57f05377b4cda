"""The first stage writes what the others read, and refuses what it cannot use before it writes anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks import corpus, prepare
from tests.conftest import make_tiny_bert
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
    import torch

    from ffn2moe.dense import load_dense

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


def test_a_causal_teacher_is_refused_with_those_that_are_supported(workspace, tiny_teacher_gated):
    with pytest.raises(ValueError, match=r"llama model, which makes no embeddings.*bert"):
        run(workspace, tiny_teacher_gated)
    assert not (workspace / "data").exists()


def test_an_unsupported_architecture_is_refused_with_those_that_are(workspace, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ValueError, match=r"'other' model, which is not supported; supported are: .*bert"):
        run(workspace, tmp_path / "other")


def test_a_damaged_teacher_is_refused(workspace, tmp_path):
    import torch
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
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        run(workspace, teacher)


def test_a_tokenizer_of_another_model_is_refused(workspace, tmp_path):
    teacher = make_tiny_bert(tmp_path / "teacher", vocab_size=150)
    with pytest.raises(ValueError, match="belong to different models"):
        run(workspace, teacher)
