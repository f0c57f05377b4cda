"""Plans are chosen by what was measured: never one that is slower than the best dense plan, and no more than needed."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ffn2moe
from ffn2moe import cli
from ffn2moe.dense.load import load_dense
from ffn2moe.onnx import graph as onnx_graph
from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.onnx.verify import Known, plan_parity
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.planning import measure, plan_file, timing
from ffn2moe.planning.choose import Cell, choose
from ffn2moe.planning.measure import run_race
from ffn2moe.planning.timing import Race, Timing, cpu_name, median_interval
from ffn2moe.runtime import switch
from ffn2moe.runtime.plans import is_dense
from ffn2moe.runtime.workload import HANDFUL, parse_workload, read_requests, workload_of
from tests.conftest import make_tiny_bert, make_tiny_llama
from tests.mixtures import carve
from tests.test_onnx import batch_of, run_of
from tests.texts import make_texts

DENSE, MIXTURES = ("dense", "dense8", "ov-dense"), ("sorted", "sorted8", "ov-sorted")
KEPT = dict.fromkeys((*DENSE, *MIXTURES), True)

# --- choosing -------------------------------------------------------------------------------------------------------


def cell(
    shape: tuple[int, int], noise: float = 0.02, weight: float = 1.0, phase="whole", **milliseconds: float
) -> Cell:
    """What was measured at a shape: milliseconds, and ratios that are known to so much to either side."""
    dense = {plan: time for plan, time in milliseconds.items() if plan.replace("_", "-") in DENSE}
    best = min(dense, key=lambda plan: dense[plan])
    rows = {}
    for plan, time in milliseconds.items():
        ratio = milliseconds[best] / time
        low, high = (1.0, 1.0) if plan == best else (ratio * (1 - noise), ratio * (1 + noise))
        name = plan.replace("_", "-")
        rows[name] = Timing(
            name, *shape, 1, time, milliseconds["dense"] / time, ratio, phase, best.replace("_", "-"), low, high, 20
        )
    return Cell(*shape, phase, weight, rows)


def test_the_fastest_mixture_that_keeps_its_quality_is_chosen():
    found = cell((32, 128), dense=100, dense8=50, sorted=60, sorted8=40)
    choice = choose([found], KEPT)
    assert (choice.plans, choice.best_dense) == (("sorted8",), "dense8")
    assert choice.speedup == pytest.approx(1.25) and choice.low < 1.25 < choice.high
    assert choice.reason.startswith("sorted8 is 1.25x as fast as dense8 (1.2")


def test_the_best_dense_plan_is_that_of_all_engines():
    found = cell((32, 128), dense=100, dense8=50, ov_dense=30, sorted8=40)
    choice = choose([found], KEPT)
    assert choice.plans == ("ov-dense",) and choice.speedup == 1
    assert "no plan of the student beats ov-dense here beyond the noise (sorted8 comes nearest" in choice.reason


def test_a_mixture_that_is_faster_only_within_the_noise_is_not_chosen():
    close = cell((32, 128), noise=0.05, dense=100, dense8=50, sorted8=49)
    assert choose([close], KEPT).plans == ("dense8",)
    assert choose([replace(close, rows=cell((32, 128), 0.01, dense=100, dense8=50, sorted8=49).rows)], KEPT).plans == (
        "sorted8",
    )


def test_too_few_rounds_to_tell_anything_mean_dense():
    rows = cell((1, 16), dense=100, dense8=50, sorted8=20).rows
    unknown = {plan: row if row.low == 1 else replace(row, low=0.0, high=math.inf) for plan, row in rows.items()}
    choice = choose([Cell(1, 16, "whole", 1, unknown)], KEPT)
    assert choice.plans == ("dense8",) and "too few to tell" in choice.reason


def test_where_no_mixture_keeps_the_quality_the_dense_plan_is_chosen_and_said():
    found = cell((1, 16), dense=100, dense8=50, sorted8=20)
    choice = choose([found], {"dense": True, "dense8": True})
    assert (
        choice.plans == ("dense8",)
        and choice.reason == "no plan of the student keeps the quality: dense8 is the default"
    )


def test_each_shape_takes_its_own_plan_where_that_is_worth_its_memory():
    small, large = cell((1, 16), dense=9, dense8=3, sorted8=4), cell((32, 128), dense=300, dense8=130, sorted8=100)
    often = [replace(small, weight=100), large]
    choice = choose(often, KEPT)
    assert choice.plan_of == ("dense8", "sorted8")
    assert choice.speedup == pytest.approx((300 + 130) / (300 + 100))
    assert "dense8 for 1 x 16; sorted8 for 32 x 128" in choice.reason


def test_a_plan_that_would_save_nothing_worth_its_memory_is_not_opened():
    first = cell((1, 128), dense=90, dense8=30, sorted8=20, ov_sorted=21)
    second = cell((32, 128), dense=900, dense8=300, sorted8=210, ov_sorted=200)
    assert choose([first, second], KEPT).plan_of == ("ov-sorted", "ov-sorted")


def test_of_mixtures_as_fast_the_one_that_keeps_more_quality_is_chosen():
    found = cell((32, 128), dense=100, dense8=50, sorted8=40, ov_sorted=40.5)
    assert choose([found], KEPT).plans == ("sorted8",)
    kept = {"sorted8": 0.981, "ov-sorted": 0.991, "dense8": 0.999}
    assert choose([found], KEPT, retention=kept).plans == ("ov-sorted",)
    assert choose([found], KEPT, retention=kept | {"sorted8": 0.9905}).plans == ("sorted8",)  # noise: the time decides
    slower = cell((32, 128), dense=100, dense8=50, sorted8=40, ov_sorted=43)
    assert choose([slower], KEPT, retention=kept).plans == ("sorted8",)
    near = cell((32, 128), 0.001, dense=100, dense8=40.5, sorted8=40)  # a dense plan keeps more, and is no mixture
    assert choose([near], KEPT, retention=kept).plans == ("sorted8",)


def test_one_plan_for_every_batch_is_the_best_for_all_the_work_and_dense_unless_that_is_sure():
    small, large = cell((1, 16), dense=9, dense8=3, sorted8=4), cell((32, 128), dense=300, dense8=130, sorted8=100)
    assert choose([small, large], KEPT, max_plans=1).plan_of == ("dense8", "dense8")  # allowed everywhere
    other = cell((32, 128), dense=300, ov_dense=120, dense8=150, sorted8=100)  # nothing is, and the work decides
    small = cell((1, 16), dense=9, dense8=3, ov_dense=6, sorted8=4)
    assert choose([small, other], KEPT, max_plans=1).plan_of == ("sorted8", "sorted8")
    unsure = cell((32, 128), 0.3, dense=300, ov_dense=120, dense8=150, sorted8=100)
    assert choose([small, unsure], KEPT, max_plans=1).plan_of == ("ov-dense", "ov-dense")


@st.composite
def measured(draw):
    """One to four shapes, some or all plans, times over two orders of magnitude, noise from none to a lot."""
    plans = ["dense", *draw(st.lists(st.sampled_from((*DENSE[1:], *MIXTURES)), unique=True))]
    time = st.floats(1, 100)
    cells = []
    for index in range(draw(st.integers(1, 4))):
        times = {plan.replace("-", "_"): draw(time) for plan in plans}
        cells.append(
            cell((index + 1, 16), draw(st.floats(0, 0.5, allow_subnormal=False)), draw(st.floats(0.01, 100)), **times)
        )
    kept = {plan: plan == "dense" or draw(st.booleans()) for plan in plans}
    for one in cells:  # the best dense plan is one that keeps its quality
        best = min((plan for plan in plans if plan in DENSE and kept[plan]), key=lambda plan: one.rows[plan].median_ms)
        scale = 1 / one.rows[best].speedup_vs_best_dense
        for plan, row in one.rows.items():
            ratio, wide = row.speedup_vs_best_dense * scale, row.high / row.speedup_vs_best_dense - 1
            bounds = (
                {"low": 1.0, "high": 1.0} if plan == best else {"low": ratio * (1 - wide), "high": ratio * (1 + wide)}
            )
            one.rows[plan] = replace(
                row, speedup_vs_best_dense=1.0 if plan == best else ratio, best_dense=best, **bounds
            )
    return cells, kept


@given(measured())
@settings(deadline=None, max_examples=150)
def test_what_is_chosen_is_never_measurably_slower_than_the_best_dense_plan_and_a_mixture_always_faster(found):
    cells, kept = found
    choice = choose(cells, kept)
    for one, plan in zip(choice.cells, choice.plan_of, strict=True):
        row = one.rows[plan]
        assert kept[plan]
        assert row.high >= 1 if plan in DENSE else row.low > 1
    assert len(choice.plans) <= len(cells)
    best = sum(one.weight * min(one.ms(plan) for plan in kept if kept[plan] and one.allows(plan)) for one in cells)
    assert sum(one.weight * one.best_dense.median_ms for one in cells) / choice.speedup >= best * (1 - 1e-9)


@given(measured(), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=60)
def test_the_scale_of_the_weights_does_not_matter(found, scale):
    cells, kept = found
    choice = choose(cells, kept)
    again = choose([replace(one, weight=one.weight * scale) for one in cells], kept)
    assert again.speedup == pytest.approx(choice.speedup)
    assert choose([replace(one, weight=one.weight * 2) for one in cells], kept).plan_of == choice.plan_of


@given(measured(), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_never_more_plans_are_kept_than_allowed(found, most):
    cells, kept = found
    choice = choose(cells, kept, most)
    assert len(choice.plans) <= most and all(kept[plan] for plan in choice.plans)


# --- measuring ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only what is timed moves."""

    class Clock:
        now = 0.0

    found = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.now)
    return found


class Fake:
    """An open plan that takes so many seconds for a batch, now and then more by chance."""

    def __init__(self, clock, seconds: float, noise: float = 0.0, seed: int = 0) -> None:
        self.clock, self.seconds, self.noise, self.calls = clock, seconds, noise, 0
        self.random = random.Random(seed)

    def run(self, ids: np.ndarray, mask: np.ndarray) -> None:
        self.calls += 1
        self.clock.now += self.seconds * math.exp(self.noise * self.random.gauss(0, 1))


BATCH = (np.ones((4, 8), dtype=np.int64),) * 2


def race_of(clock, noise: float = 0.0, seed: int = 0, **seconds: float) -> Race:
    plans = {
        plan.replace("_", "-"): Fake(clock, each, noise, seed * 100 + index)
        for index, (plan, each) in enumerate(seconds.items())
    }
    return Race(plans, [BATCH], threads=1, seed=seed)


def test_an_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(0)
    for count in (8, 15, 30):
        held = 0
        for _ in range(1000):
            low, high = median_interval([draw.gauss(1, 0.3) for _ in range(count)])
            held += low <= 1 <= high
        assert held >= 980, count
    assert median_interval([1.0] * 7) == (0.0, math.inf)


def test_what_is_hopeless_is_left_behind_and_the_best_dense_plan_never(clock):
    race = race_of(clock, dense=0.9, dense8=0.1, fused=0.8, sorted=0.5, sorted8=0.08)
    run_race(race, KEPT | {"fused": True})
    assert set(race.running) == {"dense8", "sorted8"}
    rounds = {row.plan: row.rounds for row in race.timings()}
    assert rounds["dense"] == rounds["fused"] == 3 and rounds["sorted"] <= 6 < rounds["sorted8"]
    assert {row.best_dense for row in race.timings()} == {"dense8"}


def test_what_cannot_win_is_dropped_and_a_dense_plan_only_if_the_best_dense_one_beats_it(clock):
    race = race_of(clock, noise=0.04, dense=0.202, dense8=0.2, ov_dense=0.23, sorted=0.15, sorted8=0.1, ov_sorted=0.101)
    run_race(race, KEPT, rounds=30)
    rounds = {row.plan: row.rounds for row in race.timings()}
    assert rounds["sorted"] < 15 and rounds["ov-dense"] < 30
    assert rounds["dense"] == rounds["dense8"] == rounds["sorted8"] == rounds["ov-sorted"] == race.rounds


def test_stopping_early_chooses_the_same_plan_and_leaves_its_interval_honest(clock):
    seconds = {"dense": 0.9, "dense8": 0.3, "ov_dense": 0.17, "sorted": 0.47, "sorted8": 0.115, "ov_sorted": 0.125}
    held = []
    for seed in range(60):
        race = race_of(clock, noise=0.02, seed=seed, **seconds)
        run_race(race, KEPT, rounds=30)
        rows = {row.plan: row for row in race.timings()}
        true = {plan.replace("_", "-"): seconds["ov_dense"] / each for plan, each in seconds.items()}
        held += [row.low <= true[plan] <= row.high for plan, row in rows.items() if row.rounds >= measure.ENOUGH_ROUNDS]
        assert choose([Cell(4, 8, "whole", 1, rows)], KEPT).plans == ("sorted8",)
    assert sum(held) >= 0.98 * len(held)
    assert clock.now < 60 * 30 * sum(seconds.values()) / 3, "a third of all rounds of all plans"


def test_the_best_dense_plan_stays_when_every_mixture_is_faster(clock):
    race = race_of(clock, dense=0.5, dense8=0.4, sorted=0.3, sorted8=0.1)
    run_race(race, KEPT)
    assert {"dense8", "sorted8"} <= set(race.running)
    (row,) = (row for row in race.timings() if row.plan == "sorted8")
    assert [row.speedup_vs_best_dense, row.low, row.high] == pytest.approx([4, 4, 4])


def test_rounds_end_once_the_ratios_are_known_or_the_time_is_spent(clock):
    quiet = race_of(clock, dense=0.2, sorted=0.1)
    run_race(quiet, KEPT, rounds=50)
    assert quiet.rounds == measure.ENOUGH_ROUNDS
    noisy = race_of(clock, noise=0.3, dense=0.2, sorted=0.15)
    run_race(noisy, KEPT, rounds=20)
    assert noisy.rounds == 20
    hurried = race_of(clock, noise=0.3, dense=0.2, sorted=0.15)
    run_race(hurried, KEPT, seconds=0)
    assert hurried.rounds == measure.ENOUGH_ROUNDS


def test_a_mixture_that_is_as_fast_as_dense_is_taken_for_faster_in_hardly_any_race(clock):
    taken = 0
    for seed in range(100):
        race = race_of(clock, noise=0.1, seed=seed, dense=0.1, sorted=0.1, sorted8=0.1)
        run_race(race, KEPT, rounds=20)
        rows = {row.plan: row for row in race.timings()}
        taken += choose([Cell(4, 8, "whole", 1, rows)], KEPT).plans != ("dense",)
    assert taken <= 4


def test_a_plan_that_loses_quality_is_not_what_others_are_compared_with(clock):
    plans = {"dense": Fake(clock, 0.2), "dense8": Fake(clock, 0.05), "sorted": Fake(clock, 0.1)}
    race = Race(plans, [BATCH], threads=1, comparable=["dense"])
    run_race(race, {"dense": True, "sorted": True})
    rows = {row.plan: row for row in race.timings()}
    assert rows["sorted"].speedup_vs_best_dense == pytest.approx(2) and rows["sorted"].best_dense == "dense"
    assert choose([Cell(4, 8, "whole", 1, rows)], {"dense": True, "sorted": True}).plans == ("sorted",)


# --- workloads ------------------------------------------------------------------------------------------------------


def test_a_workload_is_shapes_with_shares_that_sum_to_one():
    found = parse_workload("1x16:3, 32X128")
    assert [(one.batch, one.sequence, one.weight) for one in found.shapes] == [(1, 16, 0.75), (32, 128, 0.25)]
    assert found.longest == 128 and str(found.largest) == "32 x 128"
    assert len(parse_workload("1x16,1x16:2").shapes) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it has no shapes"),
        ("1x16:0,2x8:0", "all of its weights are 0"),
        ("0x16", "a batch holds a text"),
        ("1x16:-1", "a number from 0 up"),
        ("1x16:nan", "a number from 0 up"),
        ("16", "cannot read '16'"),
        ("1x16:often", "for example 1x16:0.5,32x128:0.5"),
    ],
)
def test_a_workload_of_nothing_is_refused_with_an_example(text, told):
    with pytest.raises(ValueError, match=told):
        parse_workload(text)


def test_requests_are_batches_by_their_size_their_time_or_one_by_one(tmp_path):
    plain, lines, table = (tmp_path / f"requests.{kind}" for kind in ("txt", "jsonl", "csv"))
    plain.write_text("one text\n\nanother\n")
    assert read_requests(plain) == [["one text"], ["another"]]
    rows = [{"text": "a", "timestamp": 1}, {"text": "b", "timestamp": 2}, {"text": "c", "timestamp": 1}]
    lines.write_text("\n".join(json.dumps(row) for row in [*rows, {"text": ["d", "e"]}, {"text": "f"}]))
    assert read_requests(lines) == [["a", "c"], ["b"], ["d", "e"], ["f"]]
    table.write_text("query,batch_size\nhello,3\nbye,1\n")
    assert read_requests(table, "query") == [["hello"] * 3, ["bye"]]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "\n \n", "holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', "line 2: it has no text in 'text'"),
        ("a.jsonl", "{", "line 1"),
        ("a.csv", "other\nb\n", "line 2: it has no text in 'text'"),
        ("a.parquet", "", r"one of .txt, .jsonl, .csv"),
    ],
)
def test_a_file_of_no_requests_is_refused_with_the_line(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        read_requests(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none.txt does not exist"):
        read_requests(tmp_path / "none.txt")


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512)), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_any_requests_become_a_handful_of_shapes_within_their_range(sizes):
    batches = [["x" * length] * batch for batch, length in sizes]
    found = workload_of(batches, lambda texts: [len(text) for text in texts])
    assert 1 <= len(found.shapes) <= HANDFUL and math.fsum(one.weight for one in found.shapes) == pytest.approx(1)
    assert all(min(b for b, _ in sizes) <= one.batch <= max(b for b, _ in sizes) for one in found.shapes)
    assert all(min(n for _, n in sizes) <= one.sequence <= max(n for _, n in sizes) for one in found.shapes)


# --- switching ------------------------------------------------------------------------------------------------------


class Graph:
    """A graph that says which plan it is; its engine keeps values in a box of its own."""

    precision = "float32"

    def __init__(self, plan: str) -> None:
        self.plan = plan
        self.inputs = self.outputs = {"input_ids": ("B", "L")}

    def run(self, outputs, inputs):
        assert all(isinstance(value, np.ndarray | Box) for value in inputs.values())
        return [np.array(self.plan)]

    def run_values(self, outputs, inputs):
        return [Box(found) for found in self.run(outputs, inputs)]

    def array(self, value):
        return value.held


class OtherGraph(Graph):
    def run(self, outputs, inputs):
        assert all(isinstance(value, np.ndarray) for value in inputs.values()), "a box of another engine"
        return super().run(outputs, inputs)


class Box:
    def __init__(self, held) -> None:
        self.held = held


def ids(batch: int, sequence: int) -> np.ndarray:
    return np.ones((batch, sequence), dtype=np.int64)


def test_a_batch_runs_on_the_plan_of_the_shape_nearest_in_tokens_opened_when_it_is_needed():
    places = [switch.Place(1, 16, "whole", "dense8"), switch.Place(32, 128, "whole", "sorted8")]
    found = switch.Switch(places, Graph, "dense8")
    assert found.plans == ("dense8", "sorted8") and set(found.opened) == {"dense8"}
    assert found.run(["y"], {"input_ids": ids(2, 16)})[0] == "dense8" and set(found.opened) == {"dense8"}
    assert found.run(["y"], {"input_ids": ids(64, 64)})[0] == "sorted8" and set(found.opened) == {"dense8", "sorted8"}


def test_decoding_has_plans_of_its_own_and_takes_over_what_another_engine_keeps():
    places = [
        switch.Place(1, 128, "prefill", "a"),
        switch.Place(1, 128, "decode", "b"),
        switch.Place(16, 128, "decode", "c"),
    ]
    found = switch.Switch(places, lambda plan: (OtherGraph if plan == "b" else Graph)(plan), "a")
    assert [found.plan_for(*shape) for shape in ((1, 128), (1, 1), (32, 1), (32, 5))] == ["a", "b", "c", "a"]
    (cache,) = found.run_values(["y"], {"input_ids": ids(1, 128)})
    assert found.array(cache) == "a"
    assert found.run(["y"], {"input_ids": ids(1, 1), "past": cache})[0] == "b"
    assert found.run(["y"], {"input_ids": ids(32, 1), "past": cache})[0] == "c"  # the same engine: as it is


def test_another_number_of_threads_takes_what_was_chosen_for_the_nearest():
    rows = [
        {"batch": 1, "sequence": 16, "phase": "whole", "threads": count, "plan": plan}
        for count, plan in ((1, "dense8"), (4, "sorted8"))
    ]
    assert [switch.places({"choices": rows}, count)[0].plan for count in (1, 2, 3, 16)] == [
        "dense8",
        "dense8",
        "sorted8",
        "sorted8",
    ]
    assert switch.places({"default_plan": "dense"}, 1) == []


# --- on an export ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported / "models/exported", tmp_path / "copy"))


def plan(*arguments: object) -> int:
    return cli.main(["plan", *map(str, arguments), "--minutes", "0.01"])


def test_an_export_is_planned_again_in_one_command(copy, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(make_texts(20)))
    left = ("--plans", "dense,dense8,sorted8", "--texts", texts, "--min-retention", 0)
    assert plan(copy, "--workload", "1x4:0.9,8x16:0.1", "--threads", "1,2", *left) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "1 x 4 (90 % of the batches)",
        "1 thread:",
        "2 threads:",
        "chosen",
        "memory of a process",
        "wrote",
        "list of ",
        "1 thread: lists of texts run on",
    ):
        assert words in shown, shown
    content = json.loads((copy / "plan.json").read_text())
    assert {*content["timings"]} == {"dense", "dense8", "sorted8"} and content["default_plan"] in content["plans"]
    assert [(row["threads"], row["batch"]) for row in content["choices"]] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    assert all(is_dense(row["plan"]) or row["low"] > 1 for row in content["choices"])
    assert [row["threads"] for row in content["lists"]] == [1, 2]
    assert {row["plan"] for row in content["lists"]} <= {*content["plans"]}
    assert all(size > 1 for size in content["memory_mib"].values()) and {*content["memory_mib"]} == {*content["plans"]}
    assert not list(copy.glob(".plan*"))

    opened = ffn2moe.open_export(copy, threads=1)
    assert opened.encode(["a word", "many words " * 20]).shape == (2, 32)
    assert plan(copy, "--plans", "dense", "--texts", texts, "--threads", 1) == 0  # for the same workload
    again = json.loads((copy / "plan.json").read_text())
    assert again["workload"] == content["workload"] and again["default_plan"] == "dense"
    assert again["reason"] == "no plan of the student was timed: dense is the default"


def test_an_export_with_several_plans_gives_each_batch_that_of_its_shape(copy):
    row = {"phase": "whole", "threads": 1}
    chosen = [row | {"batch": 1, "sequence": 4, "plan": "dense"}, row | {"batch": 8, "sequence": 16, "plan": "sorted"}]
    plan_file.write(copy, {"default_plan": "sorted", "timings": {}, "choices": chosen})
    opened = ffn2moe.open_export(copy, threads=1)
    assert opened.plan == "sorted"
    small, large = ["a word"], ["many words " * 9] * 12
    for texts, name in ((small, "dense"), (large, "sorted")):
        expected = ffn2moe.open_export(copy, name, threads=1).encode(texts)
        np.testing.assert_array_equal(opened.encode(texts), expected)


def test_plans_that_do_not_run_here_are_left_out_with_the_reason(copy, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(make_texts(20)))
    (copy / "onnx/sorted.onnx").write_bytes(b"other bytes")
    given = (copy, "--workload", "1x4", "--texts", texts, "--threads", 1, "--plans")
    assert plan(*given, "dense,sorted,sorted8") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "left out: sorted:" in shown and "sorted.onnx is damaged" in shown
    content = json.loads((copy / "plan.json").read_text())
    assert "is damaged" in content["left_out"]["sorted"] and {*content["timings"]} == {"dense", "sorted8"}
    before = (copy / "plan.json").read_bytes()
    (copy / "onnx/dense.onnx").unlink()
    assert plan(*given, "dense,sorted8") == 2
    assert "no dense plan of" in (told := capsys.readouterr().err) and "dense.onnx is missing" in told
    assert (copy / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--workload", "1x4:0"], "all of its weights are 0"),
        (["--workload", "1x33"], "cuts them to 32"),
        (["--workload", "none.jsonl"], "does not exist"),
        (["--workload", "1x4", "--plans", "quick"], "no plan 'quick'"),
        (["--workload", "1x4", "--plans", "sorted"], "name one to compare with, of dense, dense8"),
        ([], "has no plan yet"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(exported, capsys, options, told):
    assert plan(exported / "models/exported", *options) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (exported / "models/exported/plan.json").exists()


def test_in_an_export_without_a_dense_plan_others_are_compared_with_the_portable_one(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    entries = manifest["plans"]
    manifest["plans"] = {"sorted": entries["sorted"], "sorted8": entries["sorted8"]}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert plan(copy, "--workload", "1x4", "--minutes", 0.01) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "speed over sorted there" in shown and "best dense" not in shown
    content = json.loads((copy / "plan.json").read_text())
    assert content["best_dense_plan"] == "sorted" and {*content["timings"]} == {"sorted", "sorted8"}
    manifest["plans"] = {"sorted8": entries["sorted8"]}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert plan(copy, "--workload", "1x4") == 2
    assert "make it from its teacher again, with dense plans" in " ".join(capsys.readouterr().err.split())


def test_a_language_model_reads_and_writes_on_plans_of_its_own(tmp_path):
    teacher = make_tiny_llama(tmp_path / "llama")
    model, spec = carve(teacher, head="causal")
    dense, tokenizer = load_dense(str(teacher), head="causal")
    folder = tmp_path / "export"
    write_manifest(folder, export_model(model, dense, tokenizer, spec, folder, plans=("dense", "sorted")))
    kept = {"dense": True, "sorted": True}
    setting = measure.Setting(folder, parse_workload("2x4"), [1], kept, decode_tokens=2)
    measured = measure.measure(setting, make_texts(5), rounds=8)
    assert [row.phase for row in measured.timings if row.plan == "dense"] == ["prefill", "decode", "request"]
    content = plan_file.planned(measured, min_retention=0.9)
    assert [(row["phase"], row["weight"]) for row in content["choices"]] == [("prefill", 1), ("decode", 2)]
    for row, plan in zip(content["choices"], ("sorted", "dense"), strict=True):
        row["plan"] = plan
    plan_file.write(folder, content)
    written = "".join(ffn2moe.open_export(folder, threads=1).generate("a word", max_new_tokens=4, stop_at_end=False))
    assert isinstance(written, str)
    with pytest.raises(ValueError, match="more than the 64 that the model can hold"):
        measure.measure(replace(setting, workload=parse_workload("1x63")), make_texts(5))


# --- layers that stay dense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["sorted", "sorted8"])
def test_a_layer_of_which_every_expert_runs_is_a_dense_ffn_in_the_graph(tmp_path, plan):
    model, spec = carve(make_tiny_bert(tmp_path / "bert"), active_per_layer=(2, 4), num_active=3)
    lowered = onnx_plans.lower(onnx_graph.canonical_graph(model), plan)
    names = [node.name or "" for node in lowered.graph]
    assert sum("gelu" in node.op_type.lower() for node in lowered.graph) == 4 + 1
    assert not any("layer.1" in name and name.endswith(".router") for name in names)
    random_ = np.random.default_rng(0)
    known = Known.of(spec, model, [batch_of(random_, 4, 20), batch_of(random_, 3, 9)])
    _, found = plan_parity(plan, run_of(lowered), known)  # raises where a float32 plan is too far
    assert found.rows == 7


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (("cpu family\t: 25", "model name\t: AMD EPYC", "flags\t\t: fpu avx2"), "AMD EPYC (family 25, AVX2)"),
        (
            ("cpu family\t: 26", "model name\t: AMD EPYC", "flags\t\t: avx2 avx512_vnni avx512_bf16"),
            "AMD EPYC (family 26, AVX2, AVX512-VNNI, AVX512-BF16)",
        ),
        (("model name\t: a board",), "a board"),
    ],
)
def test_generations_of_processors_with_one_name_are_told_apart(lines, name, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("\n".join(("processor\t: 0", *lines, "")), encoding="utf-8")
    assert cpu_name(info) == name
