"""Students of one teacher are judged alike, and one is ahead of another only beyond the noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import rounding, students, wiki_corpus
from ffn2moe import cli
from ffn2moe.convert import Settings, convert
from ffn2moe.judge import Subject
from ffn2moe.progress import silent
from tests.test_judges import made_up, make_llama, write
from tests.texts import make_texts


def judged(nats_N: torch.Tensor) -> students.Judged:
    return students.Judged(10 * nats_N.double(), torch.full((len(nats_N),), 10.0, dtype=torch.float64), {})


def test_a_ratio_is_ahead_or_behind_beyond_two_standard_errors_only():
    nats_N, apart_N = torch.tensor([3.0, 2.0, 4.0, 3.0]), torch.tensor([0.1, 0.2, 0.1, 0.2])
    behind = students.Ratio.of(judged(nats_N + apart_N), judged(nats_N))
    assert behind.value == pytest.approx(torch.tensor(0.15).exp().item()) and behind.verdict == "behind"
    assert behind.error == pytest.approx((apart_N.std() / 2).item(), rel=1e-5)
    assert students.Ratio.of(judged(nats_N), judged(nats_N + apart_N)).verdict == "ahead"
    noise_N = torch.tensor([0.5, -0.5, 0.4, -0.3])
    for other_N in (nats_N, nats_N + noise_N):
        assert students.Ratio.of(judged(other_N), judged(nats_N)).verdict == "equal within two errors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A teacher, a mixture and a narrower student of it, questions and a text."""
    root = tmp_path_factory.mktemp("students")
    make_llama(root / "dense", seed=0)
    texts = write(root, "texts.jsonl", [{"text": text} for text in make_texts(60)])
    same = {"distill_steps": 0, "onnx": False, "corpus": str(texts), "max_length": 16, "container": "none"}
    convert(str(root / "dense"), root / "half", Settings(num_experts=2, num_active=1, **same))
    convert(str(root / "dense"), root / "narrow", Settings(num_experts=1, num_active=1, ffn_width=0.5, **same))
    write(
        root,
        "hellaswag.jsonl",
        [{"context": one.context, "endings": list(one.choices), "label": one.label} for one in made_up(30)],
    )
    (root / "text.txt").write_text("\n".join(make_texts(20)))
    return root


def test_the_page_has_the_figures_of_the_command_and_pairs(made, tmp_path, capsys, monkeypatch):
    options = ["--text", made / "text.txt", "--hellaswag", made / "hellaswag.jsonl", "--block", "16"]
    given = [made / "dense", made / "half", made / "narrow", *options, "--work", tmp_path / "work"]
    out = tmp_path / "page.md"
    assert students.main([*map(str, given), "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert [row[0] for row in result["rows"]] == ["half", "narrow"]
    assert [pair[:2] for pair in result["pairs"]] == [["half", "narrow"]]
    capsys.readouterr()
    teacher = ["--teacher", made / "dense", "--json"]
    assert cli.main([*map(str, ["judge", made / "half", *teacher, *options])]) == 0
    told = json.loads(capsys.readouterr().out)
    half = result["rows"][0]
    accuracy = told["tasks"]["hellaswag"]["model"]["accuracy_normalised"]["value"]
    assert half[5] == f"{100 * accuracy:.1f}"
    assert float(half[3]) == pytest.approx(told["text"]["model"]["perplexity"], abs=0.006)

    monkeypatch.setattr(students.Judge, "_judge", lambda *_: pytest.fail("a known student was judged again"))
    assert students.main([*map(str, given)]) == 0


def test_a_folder_without_a_student_is_refused_before_any_work(made, capsys):
    assert students.main([str(made / "dense"), str(made), "--text", str(made / "text.txt")]) == 2
    assert "holds no student" in capsys.readouterr().err


# What few bits cost, matrix by matrix


def test_each_row_rounds_its_own_matrices_and_every_matrix_of_a_layer_has_a_row(made):
    for source in (made / "dense", made / "half" / "checkpoint", made / "narrow" / "checkpoint"):
        model, _ = Subject.of(str(source), silent).open()
        whole = {name: one.detach().clone() for name, one in model.named_parameters()}
        rounding.rounded(model, whole, tuple(rounding.PARTS), "Q4_0")
        changed = {name for name, one in model.named_parameters() if not torch.equal(one, whole[name])}
        outer = {name for name, one in whole.items() if one.ndim < 2 or "embed" in name or "lm_head" in name}
        assert changed == {name for name in whole if name not in outer and "router" not in name}, source
        rounding.rounded(model, whole, ("values",), "Q4_0")
        changed = {name for name, one in model.named_parameters() if not torch.equal(one, whole[name])}
        assert changed and all(name.endswith("v_proj.weight") for name in changed)


def test_numbers_that_a_type_holds_cost_nothing(made, tmp_path, capsys):
    given = [made / "half", made / "narrow", "--text", made / "text.txt", "--tokens", "64", "--block", "16"]
    page = tmp_path / "page.md"
    assert rounding.main([*map(str, given), "--type", "F32", "--out", str(page)]) == 0
    found = json.loads(page.with_suffix(".json").read_text())["perplexity"]
    assert all(one["values alone"] == one["the FFNs"] == one["none"] for one in found.values())
    assert rounding.main([*map(str, given), "--type", "Q9"]) == 2
    assert "there is no type Q9 in GGUF" in capsys.readouterr().err


def test_no_line_of_the_judge_is_learned(tmp_path, capsys):
    articles = [f" = Title {index} = \n\n {' '.join(make_texts(30, seed=index))} \n" for index in range(30)]
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/valid.txt").write_text("\n".join(articles))
    assert wiki_corpus.main([*map(str, (tmp_path, tmp_path / "corpus.jsonl", tmp_path / "judge.txt"))]) == 2
    assert "general.jsonl" in capsys.readouterr().err
    (tmp_path / "general_text").mkdir()
    others = make_texts(2000, seed=99)
    write(tmp_path / "general_text", "general.jsonl", [{"text": text} for text in others])
    assert wiki_corpus.main([*map(str, (tmp_path, tmp_path / "corpus.jsonl", tmp_path / "judge.txt"))]) == 0
    learned = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    judged = [line for line in (tmp_path / "judge.txt").read_text().splitlines() if len(line) > 20]
    assert judged and not any(line.strip() in text for line in judged for text in learned)
    wiki = sum(len(text) for text in learned if text not in others)
    assert 0.45 < wiki / sum(map(len, learned)) < 0.55
