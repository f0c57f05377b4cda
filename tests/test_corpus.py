"""Texts come from where they should, are split by content, and nothing that judges a model is learnt from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import corpus
from tests.texts import make_texts, write_corpus


def split(texts: list[str], **options: object) -> corpus.Splits:
    settings = {"pairs": {}, "calibration_texts": 20, "max_texts": 10**6} | options
    return corpus.split(texts, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with docstrings of every kind."""
    root = tmp_path_factory.mktemp("library") / "docstringed"
    (root / "tests").mkdir(parents=True)
    long = "Says in a good many words what this is for.\n\n    And a rest, indented as usual.\n    "
    (root / "__init__.py").write_text(f'"""Module: {long}"""\n')
    (root / "code.py").write_text(
        f'class A:\n    """Class: {long}"""\n    def f(self):\n        """Method: {long}"""\n'
        f'    async def g(self):\n        """Coroutine: {long}"""\n    def h(self):\n        """Short."""\n'
        f'def twin(self):\n    """Method: {long}"""\n'
        f'try:\n    pass\nexcept OSError:\n    def handler():\n        """Handler: {long}"""\n'
        f'finally:\n    while 0:\n        pass\n    else:\n        def last():\n            """Else: {long}"""\n'
        f'match 1:\n    case 1:\n        f = lambda: 1 if 2 else 3\n        class C:\n            """Case: {long}"""\n'
    )
    (root / "broken.py").write_text('def f(:\n    """Not Python, in spite of its name, but a template."""\n')
    (root / "latin.py").write_bytes(
        '# coding: latin-1\n"""Ein schöner Text über acht Wörter, in alter Kodierung."""'.encode("latin-1")
    )
    (root / "tests" / "test_a.py").write_text(f'"""Test: {long}"""\n')
    return root.parent


def test_docstrings_are_those_of_modules_classes_and_functions_once_each(library, monkeypatch):
    monkeypatch.syspath_prepend(library)
    found = corpus.docstrings(["docstringed"], standard_library=False, workers=1)
    names = ["Case:", "Class:", "Coroutine:", "Ein", "Else:", "Handler:", "Method:", "Module:"]
    assert [text.split()[0] for text in found] == names
    assert "\n\nAnd a rest" in found[1], "the indentation of the source is no part of the text"


def test_docstrings_do_not_depend_on_the_number_of_workers(library, monkeypatch):
    monkeypatch.syspath_prepend(library)
    one, two = (corpus.docstrings(["docstringed"], standard_library=False, workers=n) for n in (1, 2))
    assert one == two == sorted(set(one))


def test_the_packages_of_the_default_corpus_are_pinned():
    pinned = {
        line.split("==")[0].lower()
        for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
    }
    assert {name.lower() for name in corpus.PACKAGES.values()} <= pinned


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"nowhere_at_all.*not installed.*make setup"):
        corpus.docstrings(["nowhere_at_all"], standard_library=False)


def test_a_text_file_gives_a_text_a_line_without_empty_ones(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two  \n\t\n", encoding="utf-8")
    assert corpus.read_corpus(str(tmp_path / "a.txt")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"body": "one, two", "n": 1}\n\n{"body": ""}\n{"body": "three"}\n'),
        ("a.csv", 'n,body\n1,"one, two"\n2,\n3,three\n'),
        ("a.tsv", "n\tbody\n1\tone, two\n2\t\n3\tthree\n"),
    ],
)
def test_a_named_column_is_read_from_each_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert corpus.read_corpus(str(tmp_path / name), "body") == ["one, two", "three"]
    with pytest.raises(ValueError, match=r"no column 'text'.*'body'.*data.text_column"):
        corpus.read_corpus(str(tmp_path / name), "text")


ODD = "one\u2028two\u0085three\x0cfour\x1cfive"  # str.splitlines would split this text four times


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("t.txt", [ODD, "second"]),
        ("t.jsonl", [json.dumps({"text": ODD}, ensure_ascii=False), '{"text": "second"}']),
        ("t.csv", ["id,text", f'1,"{ODD}"', "2,second"]),
        ("t.tsv", ["id\ttext", f"1\t{ODD}", "2\tsecond"]),
    ],
)
def test_only_line_ends_separate_texts_in_any_encoding(tmp_path, name, rows, end, encoding):
    path = tmp_path / name
    path.write_bytes("".join(row + end for row in rows).encode(encoding))
    assert corpus.read_corpus(str(path)) == [ODD, "second"]


def test_a_cell_of_a_table_keeps_its_line_ends(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'id,text\r\n1,"one\ntwo\r\nthree"\r\n2,second\r\n')
    assert corpus.read_corpus(str(path)) == ["one\ntwo\r\nthree", "second"]


def test_a_dataset_of_the_datasets_library_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_corpus(tmp_path / "set" / "train.jsonl", ["one", "two"])
    assert corpus.read_corpus(f"datasets:{tmp_path / 'set'}") == ["one", "two"]
    with pytest.raises(ValueError, match=r"no column 'body'.*'text'"):
        corpus.read_corpus(f"datasets:{tmp_path / 'set'}", "body")
    with pytest.raises(ValueError, match="cannot load the train split of"):
        corpus.read_corpus(f"datasets:{tmp_path / 'no-such-set'}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"x", "docstrings, datasets:NAME, or a file that ends in"),
        ("a.txt", b"\n  \n", "every line or row is empty"),
        ("a.txt", "Übermut".encode("latin-1"), r"not UTF-8.*iconv"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'["a"]\n', r"a.jsonl:1 is not an object"),
        ("a.jsonl", b'{"text": 3}\n', r"'text' is not text but 3"),
        ("a.csv", b"text\n", "every line or row is empty"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused_with_the_cause(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.read_corpus(str(tmp_path / name))


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.txt; check data.corpus"):
        corpus.read_corpus(str(tmp_path / "gone.txt"))
    with pytest.raises(ValueError, match="is a folder"):
        (tmp_path / "folder.txt").mkdir()
        corpus.read_corpus(str(tmp_path / "folder.txt"))


@given(st.text())
def test_cleaning_gives_text_that_utf8_holds_and_is_idempotent(text):
    cleaned = corpus.clean(text)
    cleaned.encode()
    assert corpus.clean(cleaned) == cleaned
    assert cleaned == cleaned.strip() and "\0" not in cleaned


def test_a_pair_is_the_first_line_and_the_rest_or_the_first_sentence_and_the_rest():
    rest = "and a rest that has ten words or more than that"
    assert corpus.pair_of(f"Return the mean.\n\n{rest}") == corpus.Pair("Return the mean.", rest)
    assert corpus.pair_of(f"Return the mean. {rest}") == corpus.Pair("Return the mean.", rest)
    assert corpus.pair_of(f"Too short.\n\n{rest}") is None
    assert corpus.pair_of("Return the mean.\n\nToo short a rest.") is None
    assert corpus.pair_of("one line without an end that goes on and on and on and on") is None


texts_like_ours = st.lists(
    st.text(st.sampled_from("abAB \n."), min_size=1).map(corpus.clean).filter(bool), min_size=40, max_size=120
)


@settings(deadline=None, max_examples=50)
@given(texts_like_ours, st.integers(0, 10))
def test_no_text_is_in_two_splits_or_twice_in_one(texts, calibration):
    pairs = corpus.benchmark_pairs(texts, 5)
    try:
        splits = split(texts, pairs=pairs, calibration_texts=calibration)
    except ValueError as error:
        assert "too small to split" in str(error)
        return
    forms = [corpus.normalise(text) for part in (splits.train, splits.calibration) for text in part]
    held_out = {corpus.normalise(text) for text in splits.evaluation}
    assert len(forms) == len(set(forms))
    assert held_out.isdisjoint(forms)


def test_splits_depend_on_content_and_not_on_order():
    texts = make_texts(300)
    first, second = (
        split(order, pairs=corpus.benchmark_pairs(order, 30)) for order in (texts, [*reversed(texts), texts[7]])
    )
    assert first == second
    assert len(first.pairs) == len(first.evaluation) == 30 and len(first.calibration) == 20


def test_more_texts_move_few_between_splits():
    texts, more = make_texts(300), make_texts(30, seed=1)
    first, second = (split(some, pairs=corpus.benchmark_pairs(some, 30)) for some in (texts, texts + more))
    assert len(set(first.evaluation) & set(second.evaluation)) >= 20


def test_nothing_of_the_benchmark_is_learnt_from_in_any_disguise():
    texts = make_texts(300)
    pairs = corpus.benchmark_pairs(texts, 30)
    pair = next(iter(pairs.values()))
    disguises = [
        pair.query.upper(),
        f"  {pair.document}\n",
        f"Another summary line.\n\n{pair.document}",
        f"A list of methods:\n    {pair.query}\nand more of them",
    ]
    splits = split(texts, pairs=pairs, joined=disguises)
    learnt = {corpus.normalise(text) for text in splits.train + splits.calibration}
    assert learnt.isdisjoint(corpus.normalise(text) for text in disguises)
    for held_out in pairs.values():
        assert not any(corpus.normalise(held_out.query) == corpus.normalise(text.split("\n")[0]) for text in learnt)
        assert learnt.isdisjoint({corpus.normalise(held_out.query), corpus.normalise(held_out.document)})


def test_every_query_of_the_benchmark_has_one_right_answer():
    texts = make_texts(50)
    repeated = texts[0].partition("\n")
    texts += [
        f"{repeated[0]}\n\nanother rest that has ten words or more than that",
        f"other summary line\n{repeated[2]}",
    ]
    pairs = corpus.benchmark_pairs(texts, 100)
    queries = [corpus.normalise(pair.query) for pair in pairs.values()]
    documents = [corpus.document_key(pair.document) for pair in pairs.values()]
    assert len(set(queries)) == len(queries) and len(set(documents)) == len(documents)
    assert texts[0] not in pairs and len(pairs) == 49


def test_queries_are_learnt_as_texts_of_their_own():
    texts = make_texts(100)
    splits = split(texts, calibration_texts=2)
    assert texts[3].split("\n")[0] in splits.train + splits.calibration


def test_the_corpus_is_cut_to_max_texts_and_joined_texts_get_up_to_half():
    texts, joined = make_texts(200), [f"joined sentence number {n}" for n in range(200)]
    splits = split(texts, joined=joined, max_texts=200)
    everything = splits.train + splits.calibration + splits.evaluation
    assert 199 <= len(everything) <= 200
    assert sum(text.startswith("joined") for text in everything) == 100


def test_a_corpus_too_small_to_split_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"too small to split: .* leave 20 to train on.*lower data.calibration_texts"):
        split(make_texts(20), calibration_texts=20)


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of labelled sets, in which dev sentences also occur where they should not."""
    for name in ("stsb", "ag_news", "sst2", "wikitext2"):
        (tmp_path / name).mkdir()
    row = "main-captions\tMSRvid\t2012test\t0000\t{}\t{}\t{}\n"
    (tmp_path / "stsb/train.csv").write_text(row.format("5.000", 'A "quoted man.', "A man is HERE."), encoding="utf-8")
    (tmp_path / "stsb/dev.csv").write_text(row.format("1.250", "A man is here.", "No one is here."), encoding="utf-8")
    (tmp_path / "ag_news/sample.csv").write_text(
        "".join(f'"{n % 4 + 1}","Title {n}","Body, with\\a break {n}"\n' for n in range(40)), encoding="utf-8"
    )
    (tmp_path / "sst2/train.tsv").write_text("a good film\t1\na bad film\t0\nso so\t0\n", encoding="utf-8")
    (tmp_path / "sst2/dev.tsv").write_text("A good film\t1\nnot bad\t1\n", encoding="utf-8")
    (tmp_path / "wikitext2/valid.txt").write_text(
        " \n = Heading = \n \n The <unk> lobster , a well @-@ known one .\n", encoding="utf-8"
    )
    (tmp_path / "notes.txt").write_text("a note of ours\n", encoding="utf-8")
    return tmp_path


def test_a_data_folder_is_read_whole_and_its_dev_sets_are_kept_apart(data):
    folder = corpus.read_folder(data)
    assert folder.stsb == [corpus.ScoredPair(1.25, "A man is here.", "No one is here.")]
    train, dev = folder.classification["ag_news"]
    assert len(train) + len(dev) == 40 and dev and train
    assert train[0].text.startswith("Title ") and "with a break" in train[0].text
    train, dev = folder.classification["sst2"]
    assert {row.text for row in train} == {"a bad film", "so so"}, "a dev sentence is not fitted on"
    assert {"The lobster, a well-known one.", "a note of ours", 'A "quoted man.'} <= set(folder.texts)

    splits = split(make_texts(100), joined=folder.texts, judged=folder.judged())
    learnt = {corpus.normalise(text) for text in splits.train + splits.calibration}
    assert learnt.isdisjoint(corpus.normalise(text) for text in folder.judged())
    assert corpus.normalise('A "quoted man.') in learnt


def test_a_language_model_learns_from_general_text_and_not_from_what_it_is_judged_by(data):
    lobster = "The lobster, a well-known one."
    folder = corpus.read_folder(data, language_model=True)
    assert {"a bad film", "a note of ours"} <= set(folder.texts)
    assert lobster not in folder.texts and lobster in folder.judged()
    (data / "general_text").mkdir()
    (data / "general_text/general.jsonl").write_text('{"text": "A paragraph."}\n')
    folder = corpus.read_folder(data, language_model=True)
    assert folder.sources == {"A paragraph.": "general", "a note of ours": "notes"}
    assert "A paragraph." not in corpus.read_folder(data).texts


@pytest.mark.parametrize("missing", ["stsb", "ag_news", "sst2", "wikitext2"])
def test_any_set_of_a_data_folder_may_be_missing(data, missing):
    for file in (data / missing).iterdir():
        file.unlink()
    assert corpus.read_folder(data).texts


def test_a_data_folder_that_cannot_be_read_is_refused_with_the_cause(tmp_path, data):
    with pytest.raises(FileNotFoundError, match=r"data.folder = .*gone is not a folder"):
        corpus.read_folder(tmp_path / "gone")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds none of"):
        corpus.read_folder(empty)
    (data / "stsb/dev.csv").write_text("a\tb\n")
    with pytest.raises(ValueError, match=r"dev.csv:1 is not a row of STS-B"):
        corpus.read_folder(data)


def test_json_lines_come_back_as_they_were_written(tmp_path):
    rows = [{"text": "zwei\nZeilen, ä", "label": "1"}]
    corpus.write_jsonl(tmp_path / "a" / "b.jsonl", rows)
    assert corpus.read_jsonl(tmp_path / "a" / "b.jsonl") == rows
    assert json.loads((tmp_path / "a" / "b.jsonl").read_bytes()) == rows[0]


def test_a_txt_file_may_hold_texts_of_several_lines(tmp_path):
    (tmp_path / "stories.txt").write_text("Once upon\na time.\n<|endoftext|>\nThe end.\n<|endoftext|>\n")
    assert corpus.read_corpus(str(tmp_path / "stories.txt")) == ["Once upon\na time.", "The end."]


def test_texts_for_a_language_model_are_not_split_into_first_lines():
    texts = make_texts(100)
    splits = corpus.split(texts, pairs={}, calibration_texts=10, max_texts=90, evaluation_texts=20, first_lines=False)
    assert [len(part) for part in (splits.evaluation, splits.calibration, splits.train)] == [20, 10, 60]
    assert {*splits.evaluation, *splits.calibration, *splits.train} <= set(texts)
