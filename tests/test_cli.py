"""The command line: quick help, one clear line per failure, and exit codes a script can use."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import benchmarks.ablation.methods  # noqa: F401 - registers selections whose number of experts varies
import ffn2moe
from ffn2moe import cli
from ffn2moe.conversion.settings import OPTIONS, Settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def export(exported) -> Path:
    return exported / "models/exported"


@pytest.fixture
def copy(export, tmp_path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def test_help_imports_nothing_heavy_and_answers_at_once():
    script = (
        "import sys\nfrom ffn2moe.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'transformers', 'onnx_ir', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True)  # warms the cache
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)
    assert time.perf_counter() - start < 1  # 0.1 s on an idle machine
    assert "encode" in done.stdout and "verify" in done.stdout


def test_info_shows_experts_plans_and_quality(export, capsys):
    assert cli.main(["info", str(export)]) == 0
    shown = capsys.readouterr().out
    for word in ("4 of 16 neurons", "50 % of the FFN", "not measured yet", "sorted8", "nDCG@10"):
        assert word in shown, word


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selection": "threshold", "max_active": 3}, ["2 on average and at most 3 chosen by each token"]),
        ({"selection": "prefix"}, ["the first 2 on average chosen by each token"]),
        ({"routing": "sequence"}, ["2 chosen by each text, ahead of all layers"]),
        ({"active_per_layer": [1, 3]}, ["1, 3 in the layers in turn chosen by each token: 50 %"]),
        ({"elastic": [1, 4]}, ["budgets", "1 (25 %), 2 (50 %), 4 (100 %) of the experts active"]),
    ],
)
def test_info_says_how_many_experts_are_used_by_what(copy, capsys, changes, words):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["spec"] |= changes
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["info", str(copy)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words), shown


def test_info_shows_the_speed_once_it_was_measured(copy, capsys):
    row = {"batch": 1, "sequence": 4, "threads": 1, "median_ms": 2.0, "speedup_vs_dense": 1.5}
    plans = ("dense", "dense8", "fused", "sorted", "sorted8")
    plan = {"default_plan": "fused", "reason": "fused wins", "machine": {"cpu": "Abacus"}}
    (copy / "plan.json").write_text(json.dumps(plan | {"timings": {name: [row] for name in plans}}))
    assert cli.main(["info", str(copy)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 ms 1.50x" in shown and "fused wins (on Abacus)" in shown


def test_encode_writes_a_json_line_for_each_text(export, capsys):
    assert cli.main(["encode", str(export), "a word", "another text", "--plan", "sorted", "--threads", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["a word", "another text"]
    expected = ffn2moe.open_export(export, "sorted").encode(["a word", "another text"])
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)


def test_encode_reads_lines_where_no_text_is_named(export, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo words\n"))
    assert cli.main(["encode", str(export)]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["one", "two words"]


def test_encode_reads_standard_input_as_utf8_with_any_line_ends(export, capsys, monkeypatch):
    given = "\ufeffone\r\ntwo\u2028words\rthree".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii", newline="\n"))
    assert cli.main(["encode", str(export)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [row["text"] for row in rows] == ["one", "two\u2028words", "three"]


def test_encode_reads_standard_input_in_utf16_and_from_a_pipe(export, capsys, monkeypatch):
    end, start = os.pipe()
    with open(start, "wb") as pipe:
        pipe.write("one\r\nzwölf\n".encode("utf-16"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.FileIO(end)))
    assert cli.main(["encode", str(export)]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["one", "zwölf"]


@pytest.mark.parametrize(("line", "message"), [(b"\xff", "not valid Unicode"), (b" ", "is empty")])
def test_encode_writes_nothing_where_a_line_of_standard_input_is_refused(export, capsys, monkeypatch, line, message):
    given = io.BytesIO(b"a word\n" * 1500 + line + b"\nanother\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    assert cli.main(["encode", str(export)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "line 1501 of standard input" in captured.err and message in captured.err


def test_verify_passes_on_a_sound_export(export, capsys):
    assert cli.main(["verify", str(export), "--texts", "6", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ok") == 12 and "failed" not in shown, shown


def test_verify_fails_with_a_line_for_each_damaged_part(copy, capsys):
    graph = copy / "onnx/sorted.onnx"
    graph.write_bytes(graph.read_bytes()[:-9])
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["spec"]["num_active"] = 3
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(copy), "--texts", "4"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert len(failed) == 2
    assert "sorted: file" in failed[0] and "sorted.onnx is damaged" in failed[0]
    assert "checkpoint" in failed[1]


def test_verify_notices_a_graph_of_other_weights(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["plans"]["sorted"] |= {key: manifest["plans"]["dense"][key] for key in ("file", "sha256")}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(copy), "--texts", "4", "--plan", "sorted"]) == 1
    assert "does not compute what PyTorch does" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "nowhere is not an export"),
        (["encode", "nowhere", "text"], "nowhere is not an export"),
        (["verify", "nowhere"], "nowhere is not an export"),
        (["encode", "EXPORT", " "], "text 0 is empty"),
        (["encode", "EXPORT", "text", "--plan", "quick"], "no plan 'quick'"),
        (["verify", "EXPORT", "--plan", "quick"], "no plan 'quick'"),
        (["encode", "EXPORT", "text", "--provider", "Abacus"], "'Abacus' is not in this onnxruntime"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(export, capsys, arguments, message):
    arguments = [str(export) if argument == "EXPORT" else argument for argument in arguments]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and message in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["confert", "a", "b"], "unknown command 'confert'; did you mean 'convert'? known: check, classify, convert"),
        (["convert", "a", "b", "--gate", "sofmax"], "unknown value 'sofmax'; did you mean 'softmax'? known: auto"),
        (["convert", "a", "b", "--experts", "0"], "'0' is not a count: give a whole number from 1"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_every_setting_of_a_conversion_is_an_option_with_the_same_default():
    options = cli._parse(["convert", "model", "out"])
    assert Settings(**{name: getattr(options, name) for name in OPTIONS}) == Settings()
    arguments = ["--experts", "4", "--train", "all", "--max-length", "8", "--calibration-tokens", "9", "--no-onnx"]
    assert cli._parse(["convert", "model", "out", "--shared", "auto"]).shared_width == "auto"
    options = cli._parse(
        ["convert", "model", "out", *arguments, "--shared", "0", "--learning-rate", "1e-3", "--distill-minutes", "2"]
    )
    changed = Settings(**{name: getattr(options, name) for name in OPTIONS})
    assert changed == Settings(
        num_experts=4,
        shared_width=0,
        scope="all",
        max_length=8,
        calibration_tokens=9,
        onnx=False,
        learning_rate=1e-3,
        distill_minutes=2.0,
    )
    kinds = {"int": int, "float": float, "bool": str}
    own = {"num_experts", "shared_width", "keep_layers", "ffn_width", "expert_width"}  # a word, a number, or several
    for one in (field for field in fields(Settings) if field.name not in own):
        kind = kinds.get(one.type.split(" ")[0], str)
        assert OPTIONS[one.name].kind is kind, one.name


def test_a_stopped_conversion_says_how_to_resume(monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ffn2moe.convert.convert", stop)
    assert cli.main(["convert", "model", "out[x]"]) == 130
    assert "stopped: run the same command again to resume from out[x].partial" in capsys.readouterr().out


def test_brackets_and_colons_in_paths_are_printed_as_they_are(export, tmp_path, capsys):
    odd = tmp_path / "[red]a[" / "b]:smile:"
    assert cli.main(["info", str(odd)]) == 2
    assert str(odd) in capsys.readouterr().err
    shutil.copytree(export, odd)
    assert cli.main(["info", str(odd)]) == 0
    assert str(odd) in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sing"], ["encode"], ["verify", "x", "--texts", "0"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: ffn2moe" in capsys.readouterr().err
