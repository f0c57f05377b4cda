"""The general corpus covers a tokenizer's words, repeats itself, and holds nothing that judges a model."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from ffn2moe.data import corpus as core
from ffn2moe.data import general
from tasks import corpus, prepare
from tests.texts import make_stage, make_texts

DOCSTRINGS = [
    f"Return the {name} of the table after each row of it was read.\n\n"
    f"The {name} is kept until the file is closed. Call it again to read the {name} of another table.\n\n"
    f">>> table.{name}()\n3"
    for name in ("length", "width", "colour", "title", "weight", "owner", "age", "origin")
]
WORDS = ["the", "of", *(a + b + c + d for a in "bdfgk" for b in "aeiou" for c in "lmnr" for d in ("ka", "po"))]  # 202


class Tokenizer:
    """What `words_of` reads of a tokenizer."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in reversed(list(enumerate(self._tokens)))}


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["[PAD]", "[unused1]", "a", "the", "##ing", "été", "cat", "12", "c3"], ["the", "été", "cat"]),
        (["<s>", "Ġthe", "ing", "ĠCat", "ĠÃ©tÃ©", "Ġ12"], ["the", "Cat"]),
        (["<unk>", "▁the", "ing", "▁été", "▁a"], ["the", "été"]),
    ],
)
def test_the_words_of_a_vocabulary_are_its_whole_words_in_its_order(tokens, words):
    assert general.words_of(Tokenizer(tokens)) == words


def test_sentences_are_those_of_prose_on_one_line_each():
    text = "Returns the sum\nof all rows. It is `None` for none of them.\n\n>>> a table of two rows is read here"
    assert general.sentences_of([text, text]) == ["Returns the sum of all rows."]


def test_composed_texts_hold_every_word_and_are_the_same_each_time():
    sentences = general.sentences_of(DOCSTRINGS)
    texts = list(islice(general.composed(sentences, WORDS), 300))
    assert texts == list(islice(general.composed(sentences, WORDS), 300))
    assert {word.lower() for text in texts for word in re.findall(r"[^\W\d_]+", text)}.issuperset(WORDS)
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) == 1 and max(lengths) > general.LONGEST_SENTENCE


def test_common_words_of_a_sentence_stay():
    texts = [text.split() for text in islice(general.composed(["the value of the table"], WORDS), 50)]
    sentences = [text for text in texts if "the" in text]
    assert len(sentences) > 25 and all(text[0] == "the" and text[2:4] == ["of", "the"] for text in sentences)
    assert not any("of" in text for text in texts if text not in sentences), "common words come from sentences alone"


def test_a_vocabulary_without_words_gives_docstrings_and_one_word_is_enough():
    assert list(general.mixed(DOCSTRINGS, general.words_of(Tokenizer(list("abc"))), 40)) == DOCSTRINGS
    assert "composed" in general.mixed(DOCSTRINGS, ["word"], 40).values()


def test_a_mixture_has_every_kind_and_without_words_docstrings_alone():
    found = general.mixed(DOCSTRINGS, WORDS, 40)
    kinds = list(found.values())
    assert kinds.count("docstrings") == 5 and kinds.count("sentences") == 10
    assert found == general.mixed(DOCSTRINGS, WORDS, 40) and 15 <= kinds.count("composed") <= 20
    assert list(general.mixed(DOCSTRINGS, (), 40)) == DOCSTRINGS


@pytest.fixture
def library(monkeypatch) -> list[str]:
    """Docstrings in place of those of the installed packages, some with sentences in them."""
    texts = [*make_texts(300), *DOCSTRINGS]
    monkeypatch.setattr(core, "docstrings", lambda **options: texts)
    return texts


def test_the_general_corpus_of_an_encoder_holds_no_text_and_no_sentence_of_a_retrieval_pair(
    tmp_path, tiny_teacher, library
):
    settings = ("data.corpus=general", "data.calibration_texts=20", "data.evaluation_pairs=100", "data.max_texts=2000")
    prepare.run(make_stage("prepare", tmp_path, f"teacher.source={tiny_teacher}", "teacher.max_length=32", *settings))
    rows = [
        row for name in ("train", "calibration") for row in corpus.read_jsonl(tmp_path / f"data/corpus/{name}.jsonl")
    ]
    assert {row["source"] for row in rows} == {"docstrings", "sentences", "composed"}
    learnt = {corpus.normalise(row["text"]) for row in rows}
    pairs = corpus.read_jsonl(tmp_path / "data/benchmarks/retrieval.jsonl")
    held_out = [text for pair in pairs for text in (pair["query"], pair["document"])]
    assert len(pairs) == 100
    assert learnt.isdisjoint(map(corpus.normalise, [*held_out, *general.sentences_of(held_out)]))


def test_a_language_model_learns_from_no_composed_text(tmp_path, tiny_teacher_gated, library):
    settings = ("data.corpus=general", "data.calibration_texts=20", "data.evaluation_pairs=30")
    prepare.run(
        make_stage("prepare", tmp_path, f"teacher.source={tiny_teacher_gated}", "teacher.max_length=32", *settings)
    )
    assert set(corpus.read_texts(tmp_path / "data/corpus/train.jsonl")) < set(map(core.clean, library))


def test_no_model_learns_from_a_general_sentence(tmp_path, tiny_teacher):
    sentences = corpus.general_sentences()
    assert len(set(map(corpus.normalise, sentences))) == len(sentences) == 200
    corpus.write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in [*make_texts(300), *sentences]])
    settings = ("data.corpus=texts.jsonl", "data.calibration_texts=20", "data.evaluation_pairs=30")
    prepare.run(make_stage("prepare", tmp_path, f"teacher.source={tiny_teacher}", "teacher.max_length=32", *settings))
    learnt = {text for name in prepare.SPLITS for text in corpus.read_texts(tmp_path / f"data/corpus/{name}.jsonl")}
    assert len(learnt) > 300 and learnt.isdisjoint(sentences)
