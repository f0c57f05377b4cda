"""The benchmark of texts per second runs real encoders, resumes, and says what it left out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from benchmarks import throughput, throughput_page
from ffn2moe.planning import plan_file
from tests.texts import make_texts


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with two sets of texts; the third comes without reading the standard library."""
    texts = [" ".join(text.split()[:6]) for text in make_texts(40)]  # short: libraries truncate long ones differently
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news/sample.csv").write_text("".join(f'"1","title {text}","{text}"\n' for text in texts))
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.tsv").write_text("".join(f"{text}\t1\n" for text in texts))
    monkeypatch.setattr(
        throughput.corpus, "docstrings", lambda packages, workers: [f"Return {text}." for text in texts]
    )
    return tmp_path


def test_a_run_times_every_encoder_on_every_set_and_resumes(exported, tiny_teacher, data, tmp_path):
    out, cache = tmp_path / "page.md", tmp_path / "cache"
    export = shutil.copytree(exported / "models/exported", tmp_path / "export")
    choices = [{"batch": 8, "sequence": 16, "phase": "whole", "threads": 1, "plan": "sorted"}]
    plan_file.write(export, {"default_plan": "sorted", "choices": choices, "timings": {}})
    asked = [str(export), str(data), "--texts", "8", "--at-once", "3", "--rounds", "5"]
    asked += ["--plans", "dense", "sorted", "--text-order", "sorted", "--cache", str(cache), "--out", str(out)]
    asked += ["--model", str(tiny_teacher)]
    assert throughput.main(asked) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert [(row["set"], row["round"]) for row in result["rows"]] == [
        (name, index) for index in range(5) for name in ("AG News", "docstrings", "SST-2")
    ]
    expected = {"dense", "sorted", "default", "sorted, text order", "torch float32", "torch bfloat16"}
    assert expected <= set(result["rows"][0]["seconds"])
    assert result["cosines"]["dense"] > 0.95  # the same model as sentence-transformers runs
    assert result["cosines"]["default"] == pytest.approx(result["cosines"]["sorted"], abs=1e-6)  # it was chosen
    assert result["cosines"]["sorted"] == pytest.approx(result["cosines"]["sorted, text order"], abs=1e-5)
    assert set(result["left_out"]) | set(result["rows"][0]["seconds"]) >= set(throughput.ENCODERS)
    assert out.with_suffix(".png").stat().st_size > 10_000

    (kept,) = cache.glob("*.jsonl")
    rows = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(rows[:-1]))
    assert throughput.main(asked) == 0
    again = kept.read_text().splitlines(keepends=True)
    assert again[:-1] == rows[:-1] and json.loads(again[-1])["round"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "2"], "5 rounds or more"),
        (["--threads", "0"], "at least one thread"),
        (["--plans", "nowhere"], "no plan 'nowhere'"),
        (["--plans", "dense", "--text-order", "sorted"], "no plan 'sorted'"),
    ],
)
def test_bad_options_are_refused_before_anything_opens(exported, data, capsys, options, message):
    assert throughput.main([str(exported / "models/exported"), str(data), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_data_folder_is_named(exported, tmp_path, capsys):
    assert throughput.main([str(exported / "models/exported"), str(tmp_path)]) == 2
    assert "sample.csv does not exist" in " ".join(capsys.readouterr().err.split())


def test_a_mixture_is_compared_with_the_best_of_all_others():
    rows = [
        {
            "set": "a",
            "seconds": {"dense": 4.0, "sorted8": 1.0, "sorted8, text order": 2.0, "onnx int8": 1.5, "default": 1.0},
        }
        for _ in range(5)
    ]
    samples = throughput_page.samples_of(rows)
    best = samples.fastest(throughput_page._others([*samples.seconds]))
    assert best == "onnx int8"
    assert samples.speed("sorted8", best).median == pytest.approx(1.5)
    assert throughput_page.is_mixture("sorted8, text order") and not throughput_page.is_mixture("dense8, text order")


def test_the_rate_drawn_is_that_of_the_rounds():
    samples = {"a": throughput_page.samples_of([{"seconds": {"dense": 2.0, "sorted": 1.0}} for _ in range(5)])}
    (axes,) = throughput_page.figure(samples, {"a": "dense"}, 10).axes
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [10, 5])
