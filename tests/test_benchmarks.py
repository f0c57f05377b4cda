"""The benchmark commands measure, tell and refuse: on a tiny export, for a moment, so that no figure means anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.ablation.methods  # noqa: F401 - registers routers that read whole texts
from benchmarks import decode, inference, openvino_weights, profile
from benchmarks.ffn import Layers, one_expert, random_mixture, random_spec
from benchmarks.race import Spread, race, stopwatch
from ffn2moe.decompose.layer import dense_ffn
from ffn2moe.runtime.files import read_manifest
from tests.mixtures import carve
from tests.texts import make_texts

QUICK = ["--rounds", "5", "--seconds", "0.1"]


@pytest.fixture
def export(exported) -> Path:
    return exported / "models/exported"


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text.replace("\n", " ") for text in make_texts(20)))
    return path


def is_plot(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


# --- racing ---------------------------------------------------------------------------------------------------------


def test_everything_takes_part_in_every_round_in_an_order_of_its_own():
    ran: list[tuple[int, str]] = []

    def thing(name: str, seconds: float):
        def sample(index: int) -> dict[str, float]:
            ran.append((index, name))
            return {"whole": seconds}

        return sample

    found = race({"slow": thing("slow", 4.0), "fast": thing("fast", 1.0)}, rounds=9, limit=60)["whole"]
    assert [index for index, _ in ran] == [index for index in range(9) for _ in range(2)]
    assert len({tuple(name for index, name in ran if index == number) for number in range(9)}) == 2
    assert found.rounds == 9 and found.fastest(["slow", "fast", "absent"]) == "fast"
    assert found.speed("fast", "slow") == Spread(4.0, 4.0, 4.0)


def test_a_race_ends_at_its_limit_but_not_before_it_has_quartiles():
    assert race({"a": lambda _: {"whole": 1.0}}, rounds=1000, limit=0)["whole"].rounds == 5
    with pytest.raises(ValueError, match="3 rounds have no quartiles"):
        race({"a": lambda _: {"whole": 1.0}}, rounds=3, limit=1)


def test_what_is_fast_is_run_many_times_for_one_sample():
    calls: list[int] = []
    sample = stopwatch(calls.append)
    calls.clear()
    assert 0 < sample(3)["whole"] < 0.01
    assert len(calls) > 100 and set(calls) == {3}


# --- one FFN alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_active", [1, 2])
def test_an_ffn_alone_is_the_layer_of_the_model(tiny_teacher, tiny_teacher_gated, tmp_path, gated, num_active):
    head = "causal" if gated else "embedding"
    model, spec = carve(tiny_teacher_gated if gated else tiny_teacher, head=head, num_active=num_active)
    from ffn2moe.moe.layer import moe_layers

    layers = moe_layers(model)
    alone = Layers(layers)
    x_TD = np.random.default_rng(0).standard_normal((13, spec.width), dtype=np.float32)
    with torch.no_grad():
        mixture_TD = layers[0].reference(torch.from_numpy(x_TD)).numpy()
        dense_TD = dense_ffn(layers[0])(torch.from_numpy(x_TD)).numpy()
    for plan, expected in (("dense", dense_TD), ("sorted", mixture_TD), ("fused", mixture_TD)):
        found = alone.open(plan, 1, tmp_path)[0].run(["y"], {"x": x_TD})[0]
        np.testing.assert_allclose(found, expected, atol=2e-3 if plan == "fused" else 1e-5)


def test_routers_that_read_whole_texts_have_no_ffn_alone(tiny_teacher):
    from ffn2moe.moe.layer import moe_layers

    model, _ = carve(tiny_teacher, routing="sequence")
    with pytest.raises(ValueError, match="whole texts"):
        Layers(moe_layers(model))


# --- inference ------------------------------------------------------------------------------------------------------


def test_inference_writes_a_page_its_figures_and_a_plot(export, texts, tmp_path):
    out = tmp_path / "results/inference.md"
    arguments = [str(export), "--shapes", "1x4", "2x8", "--threads", "1", "--texts", str(texts), "--out", str(out)]
    plans = ["--plans", "dense8", "sorted", "sorted8"]
    assert inference.main([*arguments, *QUICK, *plans, "--min-retention", "0"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    rows = [inference.Row(**row) for row in result["rows"]]
    assert {(row.part, row.batch, row.sequence) for row in rows} == {
        (part, *shape) for part in ("model", "ffn") for shape in ((1, 4), (2, 8))
    }
    assert {row.plan for row in rows} == {"dense", "dense8", "sorted", "sorted8"}
    for row in rows:
        assert row.milliseconds > 0 and row.low <= row.speed <= row.high and row.rounds >= 5
        assert row.best_dense in ("dense", "dense8")
        if row.plan == row.best_dense:
            assert (row.low, row.speed, row.high) == (1, 1, 1)
    page = out.read_text()
    assert "| sorted8 | onnxruntime |" in page and "bound by Amdahl's law" in page and "best dense" in page
    assert f"python -m benchmarks.inference {export}" in page and "(inference.png)" in page
    assert result["machine"]["cores"] >= 1 and "onnxruntime" in result["machine"]
    assert is_plot(out.with_suffix(".png"))


def test_a_plan_that_loses_its_quality_is_no_best_dense_plan(export, texts, tmp_path):
    out = tmp_path / "inference.md"
    arguments = [str(export), "--shapes", "1x4", "--threads", "1", "--texts", str(texts), "--out", str(out)]
    assert inference.main([*arguments, *QUICK, "--plans", "dense8", "sorted", "--min-retention", "1000"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert {row["best_dense"] for row in result["rows"]} == {"dense"}
    assert list(inference.summary(result)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--plans", "warp"], "no plan 'warp'"),
        (["--rounds", "2", "--shapes", "1x4", "--plans", "dense"], "2 rounds have no quartiles"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_inference_refuses_bad_input_in_one_line(export, texts, capsys, arguments, message):
    assert inference.main([str(export), "--texts", str(texts), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_inference_refuses_an_export_that_ships_no_dense_plan(export, texts, tmp_path, capsys):
    manifest = read_manifest(export)
    dense = {"dense": manifest["plans"].pop("dense")}
    shipped = manifest | {"left_out": dense, "bring_back": "`make plans NAME=tiny`"}
    (tmp_path / "manifest.json").write_text(json.dumps(shipped))
    assert inference.main([str(tmp_path), "--texts", str(texts)]) == 2
    assert "without the plan 'dense'; `make plans NAME=tiny` brings it back" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["32", "0x8", "axb"])
def test_a_shape_that_is_none_is_refused(export, shape, capsys):
    with pytest.raises(SystemExit):
        inference.main([str(export), "--shapes", shape])
    assert shape in capsys.readouterr().err


def test_no_export_and_no_texts_are_one_clear_error(export, texts, tmp_path, capsys):
    assert inference.main([str(tmp_path), "--texts", str(texts)]) == 2
    texts.write_text("\n \n")
    assert inference.main([str(export), "--texts", str(texts)]) == 2
    assert "has no text to time the plans on" in capsys.readouterr().err


# --- decode ---------------------------------------------------------------------------------------------------------

TINY = ["--width", "64", "--ffn-width", "256", "--experts", "4", "--active", "2", *QUICK]


def test_decode_writes_a_page_its_figures_and_a_plot(tmp_path):
    out = tmp_path / "decode.md"
    assert decode.main([*TINY, "--tokens", "1", "5", "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert {"dense", "dense8", "dense4", "fused", "qmoe8", "qmoe4", "sorted", "sorted8"} <= set(result["errors"])
    errors = result["errors"]
    assert max(errors[plan] for plan in ("dense", "fused", "sorted")) < 1e-5
    assert max(errors[plan] for plan in ("dense8", "qmoe8", "sorted8")) < 0.08
    assert max(errors[plan] for plan in ("dense4", "qmoe4")) < 0.3
    assert result["experts_used"]["1"] == 2 and 2 <= result["experts_used"]["5"] <= 4
    assert result["bound"] == pytest.approx(256 / (128 + 4 / 3), abs=1e-3)
    rows = [decode.Row(**row) for row in result["rows"]]
    assert {row.tokens for row in rows} == {1, 5} and all(row.best_dense in result["dense"] for row in rows)
    for row in rows:  # the dense plan of like error is the fastest of those that are about as exact
        if row.plan not in result["dense"]:
            assert errors[row.like_dense] <= decode.LIKE * max(errors[row.plan], decode.EXACT)
    page = out.read_text()
    assert "| plan | error | n = 1 | n = 5 |" in page and "bound by weights read" in page
    assert "## Speed over the best dense plan of similar error" in page
    assert "python -m benchmarks.decode --width 64" in page
    assert is_plot(out.with_suffix(".png"))


def test_ffns_behind_each_other_are_timed_as_one_of_them(tmp_path):
    out = tmp_path / "decode.md"
    assert decode.main([*TINY, "--layers", "3", "--tokens", "1", "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    errors = result["errors"]
    assert max(errors[plan] for plan in ("dense", "fused", "sorted")) < 1e-5  # so the stack is what it should be
    if "ov-weights8" in errors:
        assert errors["ov-weights8"] < 0.08
    if "ov-native8" in errors:
        assert errors["ov-native8"] < 0.08
    page = out.read_text()
    assert "of 3" in page.splitlines()[0] and "3 such FFNs run in sequence" in page and "--layers 3" in page


@pytest.mark.parametrize("gated", [False, True])
def test_weights_of_few_bits_in_openvino_give_the_dense_ffn(gated):
    pytest.importorskip("openvino")
    ffn = dense_ffn(random_mixture(random_spec(128, 256, 4, 2, gated=gated)))
    x_TD = np.random.default_rng(0).standard_normal((9, 128), dtype=np.float32)
    with torch.no_grad():
        exact_TD = ffn(torch.from_numpy(x_TD)).numpy()
    for name, (bits, *more) in openvino_weights.COMPRESSED.items():
        run, given = openvino_weights.compressed([ffn], bits, *more, 1)
        error = np.linalg.norm(run(x_TD) - exact_TD) / np.linalg.norm(exact_TD)
        assert given == bits and error < (0.05 if bits == 8 else 0.3), name


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_of_the_whole_width_is_the_dense_ffn(gated):
    ffn = dense_ffn(random_mixture(random_spec(16, 64, 4, 2, gated=gated)))
    x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one_expert(ffn).reference(x_TD), ffn(x_TD))


def test_the_operator_as_a_dense_ffn_is_no_baseline(tmp_path):
    out = tmp_path / "decode.md"
    assert decode.main([*TINY, "--plain", "--tokens", "1", "--operator-dense", "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    timed = set(result["errors"]) | set(result["missing"])
    assert {f"ov-native{bits}{decode.OPERATOR_DENSE}" for bits in ("", "8", "4")} <= timed
    assert not set(result["operator_dense"]) & {*result["dense"], *decode._mixtures(result)}
    assert all(result["errors"][plan] < 0.3 for plan in result["operator_dense"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ffn-width", "255"], "do not divide 255 neurons"),
        (["--active", "5"], "5 active"),
        (["--active", "0"], "start at 1"),
        (["--tokens", "0"], "--tokens, --threads and --layers start at 1"),
        (["--rounds", "1", "--tokens", "1"], "1 rounds have no quartiles"),
    ],
)
def test_decode_refuses_bad_input_in_one_line(capsys, arguments, message):
    assert decode.main([*TINY, *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


# --- profile --------------------------------------------------------------------------------------------------------


def test_the_profile_tells_where_the_time_goes(export, texts, tmp_path):
    out = tmp_path / "profile.md"
    plans = ["dense8", "sorted8", *(["ov-sorted"] if "ov-sorted" in plans_of(export) else [])]
    arguments = [str(export), "--plans", *plans, "--shapes", "1x8", "--texts", str(texts), "--out", str(out)]
    assert profile.main(arguments) == 0
    page = out.read_text()
    for part in ("FFN products", "attention", "routing", "gathering", profile.BETWEEN, "Top nodes: sorted8, 1 x 8"):
        assert part in page
    assert f"python -m benchmarks.profile {export} --plans dense8 sorted8" in page


def plans_of(export: Path) -> list[str]:
    return list(read_manifest(export)["plans"])


def test_kinds_of_work_are_told_by_weight_and_op():
    def kind(name: str, op: str) -> str:
        return profile.kind_of(profile.Node(name, op, 1.0))

    assert kind("encoder.layer.0.experts.3.in.int8", "MatMulIntegerToFloat") == "FFN products"
    assert kind("encoder.layer.0.attention.self.query.int8", "MatMulIntegerToFloat") == "attention's products"
    assert kind("encoder.layer.0.router", "Gemm") == "routing"
    assert kind("Gather_7", "Gather") == "gathering"
    assert kind("t9", "SomethingNew") == "other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--plans", "warp"], "no plan 'warp'"), (["--texts", "nowhere.txt"], "nowhere.txt does not exist")],
)
def test_the_profile_refuses_bad_input_in_one_line(export, texts, capsys, arguments, message):
    assert profile.main([str(export), "--texts", str(texts), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
