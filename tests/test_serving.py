"""A served version answers, refuses, tells its version and goes on; a file is scored whole or not at all."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy
import pytest

from ffn2moe.runtime.export import open_export
from ffn2moe.sentence import SentenceModules
from flows import promote, score, serve
from flows.serve import ask, served
from flows.workspace import FlowError
from tasks import register
from tasks.params import load_params
from tasks.record import PARENT_RUN
from tasks.registry import Registry, RegistryError
from tasks.stage import StageRun
from tasks.store import TRACKING_URI
from tests.test_register import make_workspace
from tests.texts import PARAMS

TEXTS = ["a red house.", "sort the rows of a table", "the sum of the values"]
SETTINGS = ["register.max_texts=8", "register.max_characters=100"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_teacher) -> Path:
    """A workspace in which a tiny mixture is registered."""
    root = make_workspace(tmp_path_factory.mktemp("serving"), tiny_teacher)
    with pytest.MonkeyPatch.context() as patch:
        for name in (PARENT_RUN, TRACKING_URI):
            patch.delenv(name, raising=False)
        register.run(StageRun("register", load_params(PARAMS, SETTINGS), root))
    return root


@pytest.fixture
def registry(workspace, monkeypatch) -> Registry:
    monkeypatch.delenv(TRACKING_URI, raising=False)
    return Registry(workspace, "minilm")


@pytest.fixture
def model(registry):
    return registry.load(1)


def test_a_served_version_passes_the_smoke_test_and_refuses_what_is_none(workspace, registry, tmp_path):
    with served(registry, 1, log=tmp_path / "log") as server:
        checks = promote.smoke(server, 1, registry.export(1))
        assert all(check.passed for check in checks), checks
        status, answer = server.ask(TEXTS)
        assert status == 200
        expected = open_export(workspace / "exports/minilm").encode(TEXTS)
        numpy.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)
        for bad, why in (
            ([], "there is no text"),
            (["a", " "], "text 1 is empty"),
            (["a"] * 9, "9 texts are too many for one request; send at most 8"),
            (["x" * 101], "text 0 has 101 characters; at most 100 are accepted"),
            (["\ud800"], "text 0 is not Unicode"),
            ([1, None], "text 0 is int, not a string; send text"),
            ("text", "Expected list, but got str"),
            (None, "Expected list"),
            ([["a", "b"]], "text 0 is list; this model reads single texts: send strings"),
        ):
            status, answer = server.ask(bad)
            assert status == 400, bad
            assert why in answer["message"], answer
        for body in (b"", b"{", b"[]", b'{"texts": ["a"]}', b'{"inputs": ["\xff"]}', b'{"dataframe_split": {}}'):
            assert ask(server.url, body)[0] == 400, body
        told = server.ask(TEXTS, info=True)[1]["predictions"][0]
        assert (told["model"], told["version"], told["plan"]) == ("minilm", 1, "sorted")
        assert told["list_plan"] == "sorted"
        assert told["limits"] == {"max_texts": 8, "max_characters": 100}
        assert told["answered"]["texts"] == 2 * len(register.EXAMPLE) + len(TEXTS)
        for page in ("ping", "health", "version"):
            with urllib.request.urlopen(f"{server.url}/{page}", timeout=30) as response:
                assert response.status == 200
        processes = server.processes()
    assert not any(process.is_running() for process in processes)


def test_a_version_that_cannot_be_served_says_why(registry, tmp_path):
    with (
        pytest.raises(FlowError, match="stopped before it answered; its last lines:"),
        served(registry, 99, log=tmp_path / "log"),
    ):
        pass


def test_an_address_where_nothing_is_served_is_told():
    with pytest.raises(FlowError, match=r"no served model answers at .*make serve"):
        ask(f"http://127.0.0.1:{serve.free_port()}", {"inputs": ["a"]})


def test_the_registry_gives_the_folder_of_a_version_and_says_when_its_files_are_gone(registry, monkeypatch):
    assert open_export(registry.export(1)).encode(["a house"]).shape == (1, 32)
    lost = "file:///nowhere/at/all"
    monkeypatch.setattr(registry._client, "get_model_version_download_uri", lambda model, version: lost)
    with pytest.raises(RegistryError, match="files of minilm version 1 cannot be read from file:///nowhere"):
        registry.export(1)


def run(model, source: Path, target: Path, *, column: str = "text", skip_bad: bool = False) -> tuple[int, int]:
    return score.score(model, source, target, column, skip_bad, lambda items, total: items)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".tsv"])
def test_every_kind_of_file_is_scored_as_the_export_does(workspace, model, tmp_path, kind, encoding):
    source = tmp_path / f"texts{kind}"
    texts = TEXTS * 5  # more than a request may hold
    source.write_text(
        {
            ".txt": "\n".join(texts) + "\n",
            ".jsonl": "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts),
            ".csv": "id,text\n" + "".join(f'1,"{text}"\n' for text in texts),
            ".tsv": "id\ttext\n" + "".join(f"1\t{text}\n" for text in texts),
        }[kind],
        encoding,
    )
    expected = open_export(workspace / "exports/minilm").encode(texts)
    assert run(model, source, tmp_path / "out.npy") == (15, 0)
    numpy.testing.assert_allclose(numpy.load(tmp_path / "out.npy"), expected, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", source.name]


def test_parquet_and_jsonl_tell_the_line_of_each_text(model, tmp_path):
    import pyarrow.parquet

    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a house"}\n{"text": 3}\n"just a text"\n{"title": "a"}\nno JSON\n{"text": " "}\n')
    assert run(model, source, tmp_path / "out.parquet", skip_bad=True) == (2, 4)
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    run(model, source, tmp_path / "out.jsonl", skip_bad=True)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert table["line"] == [row["line"] for row in rows] == [1, 3]
    numpy.testing.assert_allclose(table["embedding"], [row["embedding"] for row in rows], atol=1e-6)


def test_bad_lines_are_told_one_by_one_and_nothing_is_written(model, tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a"}\n{"title": "a"}\nno JSON\n{"text": 3}\n{"text": ""}\n' + f'"{"x" * 101}"\n')
    with pytest.raises(FlowError) as told:
        run(model, source, tmp_path / "out.parquet")
    for line in (
        "5 of 6 texts cannot be scored; correct them, or leave them out with --skip-bad",
        "line 2 has no 'text'; it has title (--column)",
        "line 3 is not JSON",
        "line 4 is int, not text",
        "line 5 is empty",
        "line 6 has 101 characters, over 100",
    ):
        assert line in str(told.value)
    with pytest.raises(FlowError, match=r"rows of \.npy have no line numbers"):
        run(model, source, tmp_path / "out.npy", skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_what_is_stopped_midway_leaves_the_old_output(model, tmp_path):
    source, target = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("a house\n" * 20)
    target.write_text("before")

    def stopped(items, total):
        yield next(items)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score.score(model, source, target, "text", False, stopped)
    assert target.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.csv", b"title\na\n", "no column 'text'; it has title"),
        ("texts.docx", b"", "docx cannot be read"),
        ("texts.txt", b"caf\xe9", "not UTF-8"),
        ("texts.txt", b"\xff\xfea", "not UTF-16"),
        ("texts.txt", b"\xff\xfe", "has no text to score"),
        ("texts.txt", b"", "has no text to score"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(model, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlowError, match=message):
        run(model, tmp_path / name, tmp_path / "out.jsonl")


def test_the_command_line_says_what_it_cannot_write_before_it_loads_anything(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    for target, message in (("out.xml", "xml cannot be written"), ("no/out.npy", "does not exist; make it first")):
        assert score.main([str(tmp_path / "a.txt"), str(tmp_path / target)]) == 2
        assert message in capsys.readouterr().err


def test_a_prompt_is_named_in_a_request_and_for_a_file(model, tmp_path, monkeypatch):
    served_model = model.unwrap_python_model()
    prompts = SentenceModules(prompts=(("query", "the red "),))
    monkeypatch.setattr(type(served_model.export), "sentence", prompts)
    expected = served_model.export.encode([f"the red {text}" for text in TEXTS])
    numpy.testing.assert_allclose(model.predict(TEXTS, params={"prompt_name": "query"}), expected, atol=1e-5)
    numpy.testing.assert_allclose(model.predict(TEXTS), served_model.export.encode(TEXTS), atol=1e-5)
    with pytest.raises(Exception, match="no prompt 'passage'; this model has: query"):
        model.predict(TEXTS, params={"prompt_name": "passage"})
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    files = tmp_path / "in.txt", tmp_path / "out.npy"
    score.score(model, *files, "text", False, lambda items, total: items, "query")
    numpy.testing.assert_allclose(numpy.load(tmp_path / "out.npy"), expected, atol=1e-5)
    with pytest.raises(FlowError, match="--prompt-name passage: there is no prompt"):
        score.score(model, *files, "text", False, lambda items, total: items, "passage")
