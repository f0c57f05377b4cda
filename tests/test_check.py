"""What cannot be done is refused before the work: one message, cause and remedy, exit code 2, nothing written."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ffn2moe import cli
from ffn2moe.conversion.settings import Settings
from ffn2moe.conversion.task import request_of
from ffn2moe.decompose import memory
from ffn2moe.decompose.source import Source
from ffn2moe.preflight import machine, room
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.checks import findings
from flows import workspace
from flows.workspace import check_inputs, check_recipes
from tasks import check
from tasks.check import STARTING
from tasks.params import load_params, read
from tests.conftest import make_tiny_bert, make_tiny_llama, make_tiny_t5
from tests.texts import PARAMS, make_texts, write_corpus

QUICK = ("--experts", "4", "--active", "2", "--max-length", "16", "--no-onnx", "--distill-steps", "1")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def copy(bert, tmp_path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "model"))


def edit(folder: Path, file: str = "config.json", **values: object) -> None:
    """Change values of a JSON file; None removes one."""
    content = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(capsys, arguments: list[str]) -> str:
    """Run the command and `check` with the same arguments; return the one message, which both give."""
    messages = []
    for command in ("check", "convert"):
        assert cli.main([command, *arguments]) == 2
        error = capsys.readouterr().err
        errors = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and error.endswith(errors[0] + "\n"), error
        assert len(errors[0]) <= 4 * 110, "more than four lines"
        messages.append(errors[0])
    assert messages[0] == messages[1]
    return messages[0]


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )


def without_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("tokenizer*"), folder / "vocab.txt"]:
        file.unlink()


def of_fewer_tokens(folder: Path) -> None:
    make_tiny_bert(folder, vocab_size=150)


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json: name"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json of .* cannot be used"),
    "unknown type": (lambda folder: edit(folder, model_type="abacus"), "'abacus' model, which transformers"),
    "a mixture": (
        lambda folder: edit(folder, model_type="mixtral", num_local_experts=8),
        "is a mixture of 8 experts already",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is not in"),
    "weights cut short": (cut, "cut short or damaged; fetch the folder again"),
    "a shard is missing": (without_a_shard, "files are missing"),
    "weights as .bin": (as_bin, "Convert them once: python -c"),
    "weights of another model": (
        lambda folder: edit(folder, num_hidden_layers=3),
        "lacks weights .*config.json belongs to another model",
    ),
    "widths of another model": (lambda folder: edit(folder, intermediate_size=48), "they belong to different models"),
    "no tokenizer": (without_tokenizer, "has no tokenizer .*: put its tokenizer.json"),
    "tokenizer of another model": (of_fewer_tokens, "the tokenizer of .* belong to different models"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_read_is_refused(case, copy, tmp_path, capsys):
    spoil, message = MODELS[case]
    spoil(copy)
    before = sorted(tmp_path.rglob("*"))
    error = refused(capsys, [str(copy), str(tmp_path / "out"), *QUICK])
    assert re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before


def pad_beyond(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)


def as_classifier(folder: Path) -> None:
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(folder, pad_token_id=None)
    LlamaForSequenceClassification(config).save_pretrained(folder)


def without_a_start(folder: Path) -> None:
    make_tiny_t5(folder)
    edit(folder, decoder_start_token_id=None)
    (folder / "generation_config.json").unlink()


LANGUAGE_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "pad token beyond the vocabulary": (pad_beyond, (), "pad_token of .* has the id .*: give another pad_token"),
    "classifier without a pad token": (as_classifier, ("--corpus", "docstrings"), "has no pad_token_id .*: set both"),
    "no start of an answer": (without_a_start, ("--corpus", "docstrings"), "has no decoder_start_token_id"),
    "head of another model": (lambda folder: None, ("--head", "seq2seq"), "--head seq2seq, but .* makes causal or"),
    "context too long": (lambda folder: None, ("--max-length", "65"), "--max-length 65 is more than the 64 positions"),
    "too many experts": (lambda folder: None, ("--experts", "49"), "49 is more than the 48 neurons"),
    "too many active": (lambda folder: None, ("--active", "5"), "num_active must be between 1 and num_experts = 4"),
    "another container": (lambda folder: None, ("--container", "qwen3_moe"), "cannot hold this model, because .* can"),
    "another gate": (
        lambda folder: None,
        ("--container", "mixtral", "--gate", "sigmoid"),
        "mixtral weighs experts by softmax_topk, not by sigmoid: set --gate auto, or --container none",
    ),
    "no such device": (lambda folder: None, ("--device", "abacus"), "abacus, but torch sees"),
}


@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_settings_that_do_not_fit_the_model_are_refused(case, llama, tmp_path, capsys):
    spoil, options, message = LANGUAGE_MODELS[case]
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    spoil(model)
    error = refused(capsys, [str(model), str(tmp_path / "out"), *QUICK, *options])
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


TEXTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"\n\n", "holds no text"),
    "one text": ("a.txt", b"a word\na word\n", "holds 1 distinct text, and at least 2 are needed"),
    "another column": ("a.jsonl", b'{"body": "a word"}\n', "no column 'text'; its columns are 'body': .*--text-column"),
    "UTF-16 without a mark": ("a.txt", "a word\nother".encode("utf-16-le"), "is UTF-16 without .*: iconv -f utf-16le"),
    "Latin 1": ("a.txt", "café\nthe".encode("latin-1"), "is not UTF-8 text .* iconv -f latin1"),
    "a cut UTF-16": ("a.txt", "a word\nother".encode("utf-16")[:-1], "is not UTF-16.* text"),
    "no table": ("a.csv", b'text\n"a" word"\n"', "is not a row of a table|holds 1 distinct text"),
    "another format": ("a.pdf", b"%PDF", "is no file of texts: use general, docstrings"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_cannot_be_read_are_refused(case, bert, tmp_path, capsys):
    name, content, message = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    error = refused(capsys, [str(bert), str(tmp_path / "out"), *QUICK, "--corpus", str(tmp_path / name)])
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("corpus", ["nowhere.txt", ".", "generated"])
def test_a_corpus_that_is_not_there_or_no_file_is_refused(corpus, bert, tmp_path, capsys):
    error = refused(capsys, [str(bert), str(tmp_path / "out"), *QUICK, "--corpus", corpus])
    assert re.search("there is no file nowhere.txt|is a folder, and this model reads|which writes no texts", error)


def test_the_folder_to_make_must_be_free_and_can_be_made(bert, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    assert "there exists: remove it" in refused(capsys, [str(bert), str(tmp_path / "there"), *QUICK])
    assert "cannot be made in" in refused(capsys, [str(bert), str(tmp_path / "file/out"), *QUICK])


def test_a_machine_that_is_too_small_is_refused_with_numbers(bert, tmp_path, capsys, monkeypatch):
    arguments = [str(bert), str(tmp_path / "out"), *QUICK]
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(machine.shutil, "disk_usage", lambda folder: usage._replace(free=10))
        assert re.search(r"GiB of disk, and .* has 0.0 GiB left: make room", refused(capsys, arguments))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "all_memory", lambda: 10)
        assert re.search(r"GiB of memory .* this machine has 0.0 GiB", refused(capsys, arguments))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "available_memory", lambda: 10)
        assert cli.main(["check", *arguments]) == 0
        assert re.search(r"warning +memory +0.0 GiB are available now", capsys.readouterr().out)


def test_engines_that_are_not_installed_are_refused_with_the_command_that_installs_them(bert, tmp_path, monkeypatch):
    request = request_of(str(bert), None, Settings(num_experts=4, corpus="docstrings"))
    monkeypatch.setattr("ffn2moe.preflight.mixture.installed_engines", lambda: ())
    refusals = [found.text for found in findings(Case(request)) if found.kind == "refused"]
    assert refusals == [text for text in refusals if "pip install onnxruntime" in text] and refusals


def test_every_refusal_is_named_once_by_check(bert, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    arguments = [str(bert), str(tmp_path / "out"), *QUICK, "--corpus", "nowhere.txt", "--experts", "65"]
    assert cli.main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 3
    for words in ("exists: remove it", "there is no file nowhere.txt", "65 is more than the 64 neurons"):
        assert error.count(words) == 1, error


@pytest.mark.parametrize("make", [make_tiny_bert, make_tiny_llama, make_tiny_t5])
def test_what_can_be_done_is_told_before_and_no_weight_is_read(make, tmp_path, capsys, monkeypatch):
    make(tmp_path / "model")
    corpus = write_corpus(tmp_path / "texts.jsonl", make_texts(50))
    monkeypatch.setattr(Source, "read", None)
    monkeypatch.setattr(torch, "load", None)
    arguments = [str(tmp_path / "model"), "--experts", "4", "--corpus", str(corpus), "--max-length", "16"]
    assert cli.main(["check", *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("2 layers, width 32", "4 experts of", "50 texts", "GiB that are free", "estimated", "ready: ffn2moe"):
        assert words in shown, shown


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("teacher.source=/nowhere", "the teacher /nowhere does not exist"),
        ("teacher.max_length=65", "teacher.max_length=65 is more than the 64 positions"),
        ("teacher.head=causal", "teacher.head=causal, but .* makes embedding or"),
        ("decompose.container=mixtral", "mixtral cannot hold this model, because .*'bert'"),
        ("export.gguf=[q8_0]", r"export.gguf=\['q8_0'\], but .* is no language model.*set export.gguf=\[\]"),
        ("decompose.num_experts=65", "65 is more than the 64 neurons"),
        ("data.corpus=/nowhere.txt", "there is no file /nowhere.txt"),
        ("data.corpus=FEW", "holds 20 distinct texts, and at least 34 are needed"),
        ("data.evaluation=/nowhere.txt", "data.evaluation = /nowhere.txt is not a file"),
        ("export.more_plans=[dense4]", "^ok$"),
    ],
)
def test_a_run_of_the_pipeline_is_refused_before_it_starts(setting, message, bert, tmp_path):
    few = write_corpus(tmp_path / "few.jsonl", make_texts(20))
    enough = write_corpus(tmp_path / "enough.jsonl", make_texts(200))
    settings = [
        f"teacher.source={bert}",
        "teacher.max_length=32",
        f"data.corpus={enough}",
        "export.engines=[onnxruntime]",
    ]
    params = load_params(PARAMS, [*settings, "export.engines=[onnxruntime]", setting.replace("FEW", str(few))])
    try:
        check.check(params, tmp_path, lambda line: None)
        found = "ok"
    except (ValueError, FileNotFoundError) as error:
        found = str(error)
    assert re.search(message, found), found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["enough.jsonl", "few.jsonl"]


def test_memory_is_that_of_the_container_where_it_has_less(tmp_path, monkeypatch):
    whole = memory.available_memory()
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_memory() == pytest.approx(whole, rel=0.5)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory.available_memory() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 600
    assert room.all_memory() > 600


def test_a_start_of_the_pipeline_checks_once_what_did_not_change(bert, tmp_path, capfd):
    raw = read(PARAMS)
    raw["teacher"] |= {"source": str(bert), "max_length": 65}
    raw["data"]["corpus"] = str(write_corpus(tmp_path / "texts.jsonl", make_texts(50)))
    (tmp_path / "source").mkdir()
    shutil.copytree(PARAMS.parent / "tasks", tmp_path / "source/tasks")
    assert not check_inputs(tmp_path / "source", raw)
    assert "teacher.max_length=65 is more than the 64 positions" in capfd.readouterr().err
    raw["teacher"]["max_length"] = 32
    assert check_inputs(tmp_path / "source", raw)
    assert "estimated" in capfd.readouterr().out
    seconds = json.loads((tmp_path / "source/.cache/durations.json").read_text())
    assert list(seconds) == ["prepare", "decompose", "train_router", "distill", "evaluate", "export", "benchmark"]
    assert all(value >= STARTING for value in seconds.values()) and seconds["distill"] > STARTING
    assert check_inputs(tmp_path / "source", raw) and capfd.readouterr().out == ""


def test_every_recipe_of_a_front_is_checked_before_any_runs(bert, tmp_path, capfd, monkeypatch):
    """A recipe that asks for what the model does not have is named; the tiny one has 2 layers of 64 neurons.

    All but one of the checks run in this process, as a process spends its time on starting.
    """
    raw = read(PARAMS)
    raw["teacher"] |= {"source": str(bert), "max_length": 32}
    raw["data"] |= {"corpus": str(write_corpus(tmp_path / "texts.jsonl", make_texts(50)))}
    (tmp_path / "source").mkdir()
    shutil.copytree(PARAMS.parent / "tasks", tmp_path / "source/tasks")

    def with_settings(**decompose: object) -> dict:
        return {**raw, "decompose": {**raw["decompose"], "num_experts": 1, **decompose}}

    good = with_settings(keep_layers=1)
    bad = {
        "no-such-layer": (with_settings(keep_layers=[0, 2]), "the model has the layers 0 to 1"),
        "too-many": (with_settings(keep_layers=3), "between 1 and 2"),
        "too-wide": (with_settings(ffn_width=65), "FFNs of the model have 64"),
    }
    own = check_recipes(tmp_path / "source", {"good": good, "mixture": with_settings(num_experts=4)})
    assert own and "checked: good, mixture" in capfd.readouterr().out

    def run(command: list[str], *, cwd: Path, input: str, **more: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", command[2:])
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        return subprocess.CompletedProcess(command, check.main())

    monkeypatch.setattr(workspace.subprocess, "run", run)
    for name, (recipe, message) in bad.items():
        assert not check_recipes(tmp_path / "source", {"good": good, name: recipe})
        error = capfd.readouterr().err
        assert error.splitlines()[-1].startswith(f"error: {name}: ") and message in error
