"""Files of a language model are judged and timed side by side: a tiny export, for a moment."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import transformers

from benchmarks import generation, llama_cpp_files
from benchmarks.generation_page import Row
from ffn2moe.dense.load import load_dense
from ffn2moe.onnx.write import export_model, write_manifest
from tests import test_decoder as decoder
from tests.conftest import make_tokenizer
from tests.test_benchmarks import is_plot
from tests.texts import make_texts

PLANS = ("dense", "dense4", "dense8b", "qmoe4", "qmoe8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder of candidates: one export, and a file that is no GGUF file of llama.cpp."""
    folder = tmp_path_factory.mktemp("candidates")
    teacher = decoder.language_model("llama")
    student, spec = decoder.carve(copy.deepcopy(teacher), "causal")
    make_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    write_manifest(folder / "half", export_model(student, teacher, tokenizer, spec, folder / "half", plans=PLANS))
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(make_texts(60)))
    return path


def run(folder: Path, text: Path, *more: str) -> int:
    quick = ["--prompts", "4", "24", "--threads", "1", "--tokens", "3", "--rounds", "5", "--judged", "100"]
    return generation.main([str(folder), "--text", str(text), *quick, *more])


def test_every_quantised_plan_is_judged_and_timed(whole, text, tmp_path):
    out = tmp_path / "generation.md"
    assert run(whole, text, "--out", str(out)) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    files = {one["name"]: one for one in result["files"]}
    assert set(files) == {"dense4", "dense8b", "half qmoe4", "half qmoe8"}
    assert {one["role"] for one in files.values()} == {"dense", "mixture"} and files["half qmoe4"]["active"] == 0.5
    rows = [Row(**row) for row in result["rows"]]
    assert {(row.prompt, row.phase) for row in rows} == {(n, phase) for n in (4, 24) for phase in ("prefill", "decode")}
    for row in rows:
        assert row.same == ("dense4" if files[row.name]["bits"] == 4 else "dense8b") and row.fastest.startswith("dense")
        assert row.tokens_per_second > 0 and row.rounds == 5
    page = out.read_text()
    assert "| half qmoe4 | ONNX Runtime | 50 % | 4 |" in page and "speed over the fastest dense file" in page
    assert is_plot(out.with_suffix(".png"))


def test_the_perplexity_is_that_of_the_files_own_weights(whole, text):
    from ffn2moe.runtime.export import open_export

    skipped: dict[str, str] = {}
    for one in generation.candidates_of(whole, skipped):
        export = open_export(whole / "half", one.plan, 1)
        ids = export.token_ids(text.read_text())[:100]
        with one.opened(1, 100) as file:
            nats, tokens = export.score(ids)
            assert generation._perplexity(file, ids) == pytest.approx(2.718281828459045 ** (nats / tokens), rel=1e-5)


def test_what_is_measured_is_not_measured_again(whole, text, tmp_path, monkeypatch):
    assert run(whole, text, "--out", str(tmp_path / "first.md")) == 0
    monkeypatch.setattr(generation, "_sample", lambda *_: pytest.fail("timed again"))
    monkeypatch.setattr(generation, "_perplexity", lambda *_: pytest.fail("judged again"))
    assert run(whole, text, "--out", str(tmp_path / "second.md")) == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["rows"] == second["rows"] and first["files"] == second["files"]


def test_without_llama_cpp_its_files_are_left_out_and_the_page_says_so(whole, text, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp_files, "is_installed", lambda: False)
    (whole / "dense-q8_0.gguf").write_bytes(b"GGUF")
    try:
        assert run(whole, text, "--out", str(tmp_path / "page.md")) == 0
    finally:
        (whole / "dense-q8_0.gguf").unlink()
    assert (
        "`dense-q8_0.gguf` (llama.cpp is not installed: pip install llama-cpp-python)"
        in (tmp_path / "page.md").read_text()
    )


@pytest.mark.parametrize(
    ("folder", "arguments", "message"),
    [
        ("nowhere", [], "nowhere does not exist: name a folder"),
        ("", ["--text", "nothing.txt"], "nothing.txt does not exist: name a text"),
        ("", ["--judged", "1000000"], "tokens, and 1000000 are needed: give a longer text"),
        ("", ["--prompts", "150", "--tokens", "20"], "the model holds 160 tokens, and 170 are asked for"),
        ("", ["--threads", "0"], "--prompts, --threads and --tokens start at 1"),
        ("half", [], "half has no export: make one there"),
    ],
)
def test_bad_input_is_one_line(whole, text, capsys, folder, arguments, message):
    assert run(whole / folder, text, *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_llama_cpp_gives_the_logits_of_the_model(tmp_path):
    """A float16 GGUF file of a real model, by llama.cpp's own converter's layout, has PyTorch's logits."""
    pytest.importorskip("llama_cpp")
    data = os.environ.get("FFN2MOE_GGUF")
    if not data:
        pytest.skip("set FFN2MOE_GGUF to a GGUF file of a llama to compare llama.cpp with PyTorch")
    import torch

    model, tokenizer = load_dense(data)
    ids = tokenizer("The house is red, and the dog runs to the barn.")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    file = llama_cpp_files.LlamaFile(Path(data), threads=1, positions=64)
    found = file.logits(ids)
    assert abs(found - expected).max() < 0.1 * expected.std()
    steps = file.greedy(
        ids,
    )
    assert next(steps) == int(found[-1].argmax())
    file.close()
