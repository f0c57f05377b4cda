"""Pairs of texts: from two columns, or made of texts so that some belong together and some do not."""

from __future__ import annotations

import json

import pytest

from ffn2moe.data.pairs import pairs_of, read_pairs

TEXTS = [f"Question {index}?\nThe answer {index} is long. It goes on." for index in range(60)]


def test_a_third_of_the_pairs_belongs_together_and_the_same_seed_gives_the_same_pairs():
    pairs = pairs_of(TEXTS, 0)
    assert pairs == pairs_of(TEXTS, 0) != pairs_of(TEXTS, 1)
    assert [first for first, _ in pairs] == [f"Question {index}?" for index in range(60)]
    together = [second == f"The answer {index} is long. It goes on." for index, (_, second) in enumerate(pairs)]
    neighbours = [second == TEXTS[(index + 1) % 60] for index, (_, second) in enumerate(pairs)]
    assert 10 <= sum(together) <= 30 and 10 <= sum(neighbours) <= 30
    others = {second for _, second in pairs} - {TEXTS[(index + 1) % 60] for index in range(60)}
    assert len(others) >= 10


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("one line\nanother", ("one line", "another")),
        ("A sentence. Two more. Here.", ("A sentence.", "Two more. Here.")),
        ("no end in four", ("no end", "in four")),
        ("word", ("word", "word")),
    ],
)
def test_a_text_is_split_at_its_first_line_or_sentence_or_in_half(text, pair):
    found = {first: second for seed in range(9) for first, second in pairs_of([text, "x y"], seed)}
    assert pair[0] in found
    assert any(pair == one for seed in range(20) for one in pairs_of([text, "x y"], seed))


def test_two_columns_are_read_as_pairs_without_rows_that_lack_a_text(tmp_path):
    rows = [{"q": "a b", "d": "c"}, {"q": "", "d": "lost"}, {"q": "e", "d": None}, {"q": "\u2028 f", "d": "g\nh"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_pairs(str(path), "q, d") == [("a b", "c"), ("f", "g\nh")]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "q,d\na,b\n", "q,d,e", "names 3 columns, and a pair has two"),
        ("a.csv", "q,d\na,b\n", "q,x", "has no column 'x'; its columns are 'q', 'd'"),
        ("a.csv", "q,d\n,b\n", "q,d", "holds no pair"),
        ("a.txt", "a\nb\n", "q,d", "has no columns"),
    ],
)
def test_what_holds_no_pairs_is_refused(name, content, columns, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(str(tmp_path / name), columns)


def test_one_text_makes_no_pair():
    with pytest.raises(ValueError, match="at least two"):
        pairs_of(["alone"], 0)
