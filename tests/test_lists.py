"""Lists of texts run on the plan that is measured to be the fastest on lists, not on that of the nearest shape."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import ffn2moe
from ffn2moe import cli
from ffn2moe.planning import lists, measure, plan_file
from ffn2moe.planning.choose import Cell, choose, choose_for_lists, with_lists
from ffn2moe.planning.measure import Measured, Setting, run_race
from ffn2moe.planning.shipping import Shipment
from ffn2moe.planning.timing import Race, Timing
from ffn2moe.runtime import switch
from ffn2moe.runtime.classifiers import Classifier
from ffn2moe.runtime.engines import ENGINES, EngineMissing
from ffn2moe.runtime.files import load_tokenizer, read_manifest
from ffn2moe.runtime.workload import parse_workload
from flows import summary
from tasks import register
from tests.conftest import make_tokenizer
from tests.texts import make_stage, make_texts

FACTS = {"retention": 0.99, "speedup_vs_best_dense": 1.2, "bytes": 4}
KEPT = dict.fromkeys(("dense", "dense8", "sorted", "sorted8", "ov-dense8s", "ov-native4s", "ov-native4"), True)

# --- choosing -------------------------------------------------------------------------------------------------------


def rows_of(
    noise: float = 0.01, batch: int = 96, sequence: int = 0, phase: Any = "list", best: str = "dense8", **ms: float
) -> dict[str, Timing]:
    """What was measured: milliseconds of plans, with ratios to the best dense one that are known to so much."""
    found = {}
    for name, time in ms.items():
        plan, ratio = name.replace("_", "-"), ms[best.replace("-", "_")] / time
        low, high = (1.0, 1.0) if plan == best else (ratio * (1 - noise), ratio * (1 + noise))
        found[plan] = Timing(plan, batch, sequence, 1, time, ratio, ratio, phase, best, low, high, 12)
    return found


def chosen(
    rows: dict[str, Timing], in_use: list[str], shipped: tuple[str, ...] = (), may_join: Any = lambda plan: True
) -> str | None:
    return choose_for_lists(Cell(96, 0, "list", 1.0, rows), KEPT, in_use, shipped, may_join)


def test_one_plan_for_shapes_and_lists_is_chosen_where_no_other_may_join():
    shapes = [Cell(32, 128, "whole", 1.0, rows_of(0.01, 32, 128, "whole", dense8=100, ov_native4s=60, ov_native4=62))]
    choice = choose(shapes, KEPT)
    assert choice.plan_of == ("ov-native4s",)

    def on(may_join: Any = lambda plan: plan == "sorted8", noise: float = 0.01, **ms: float) -> tuple[str, ...]:
        return with_lists(choice, Cell(96, 0, "list", 1.0, rows_of(noise, **ms)), KEPT, may_join).plan_of

    slow = {"dense8": 100.0, "ov_native4s": 80.0, "sorted8": 75.0}
    assert on(**slow, ov_native4=60) == ("ov-native4",)
    assert on(lambda plan: True, **slow, ov_native4=60) == ("ov-native4s",)  # it joins for lists
    assert on(**slow, ov_native4=70) == ("ov-native4s",)  # 7 % on lists for 3 % at the shape
    assert on(noise=0.3, **slow, ov_native4=60) == ("ov-native4s",)  # by chance
    assert on(**slow) == ("ov-native4s",)
    rows = rows_of(0.01, 32, 128, "whole", dense8=100, ov_native4s=60, ov_native4=62, ov_native8a8=62.5)
    choice = choose([Cell(32, 128, "whole", 1.0, rows)], {**KEPT, "ov-native8a8": True})
    cell = Cell(96, 0, "list", 1.0, rows_of(**slow, ov_native4=60, ov_native8a8=60))
    kept = {"ov-native4": 0.981, "ov-native8a8": 0.991}
    found = with_lists(choice, cell, {**KEPT, "ov-native8a8": True}, lambda plan: plan == "sorted8", retention=kept)
    assert found.plan_of == ("ov-native8a8",)
    small = Cell(1, 16, "whole", 1.0, rows_of(0.1, 1, 16, "whole", dense8=1.0, ov_native4s=0.99, ov_native4=0.99))
    both = choose([small, *shapes], KEPT)
    assert both.plan_of == ("dense8", "ov-native4s")
    lists = Cell(96, 0, "list", 1.0, rows_of(**slow, ov_native4=60))
    assert with_lists(both, lists, KEPT, lambda plan: False).plan_of == ("dense8", "ov-native4")
    assert with_lists(both, lists, KEPT, lambda plan: False, lambda plans: False).plan_of == both.plan_of


def test_a_plan_that_saves_enough_on_lists_is_taken_and_one_that_saves_little_is_not():
    assert chosen(rows_of(dense8=100, ov_native4s=74, sorted8=64), ["ov-native4s"]) == "sorted8"
    assert chosen(rows_of(0.001, dense8=100, ov_native4s=65, sorted8=64), ["ov-native4s"]) == "ov-native4s"  # 1.5 %
    assert chosen(rows_of(0.2, dense8=100, ov_native4s=74, sorted8=64), ["ov-native4s"]) == "ov-native4s"  # by chance


def test_a_mixture_joins_only_if_it_beats_the_best_dense_plan_beyond_the_noise():
    assert chosen(rows_of(0.06, dense8=100, sorted8=95), ["dense8"]) == "dense8"
    assert chosen(rows_of(0.01, dense8=100, sorted8=95), ["dense8"]) == "sorted8"
    unknown = rows_of(dense8=100, sorted8=50)
    unknown["sorted8"] = replace(unknown["sorted8"], low=0.0, high=math.inf)
    assert chosen(unknown, ["dense8"]) == "dense8"
    assert chosen(rows_of(dense8=100, ov_native4s=120), ["ov-native4s"]) == "dense8"  # it loses on lists
    assert chosen(rows_of(dense8=100, ov_native4s=101), ["ov-native4s"]) == "ov-native4s"  # 1 % is worth no open plan
    assert chosen(rows_of(0.05, dense8=100, ov_native4s=103), ["ov-native4s"]) == "ov-native4s"  # 3 %, by chance
    dropped = rows_of(dense8=100, ov_native4s=200)  # after 3 rounds: hopeless
    dropped["ov-native4s"] = replace(dropped["ov-native4s"], low=0.0, high=math.inf, rounds=3)
    assert chosen(dropped, ["ov-native4s"]) == "dense8"


def test_what_ships_in_any_case_is_preferred_and_what_does_not_fit_is_not_taken():
    rows = rows_of(dense8=100, ov_native4s=80, sorted8=65, ov_native4=64)
    assert chosen(rows, ["ov-native4s"], ("sorted8",)) == "sorted8"
    assert chosen(rows, ["ov-native4s"]) == "ov-native4"
    assert chosen(rows, ["ov-native4s"], may_join=lambda plan: False) == "ov-native4s"
    assert chosen(rows, ["sorted"]) is None, "no plan in use was timed, so batches go by shape"


# --- measuring ------------------------------------------------------------------------------------------------------


class Fake:
    """An open plan that keeps the lists which it got, and takes so many seconds for a text."""

    def __init__(self, clock: Any, seconds: float) -> None:
        self.clock, self.seconds, self.got = clock, seconds, []

    def encode(self, texts: list[str]) -> None:
        self.got.append(tuple(texts))
        self.clock.now += self.seconds * len(texts)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    found = Clock()
    monkeypatch.setattr("ffn2moe.planning.timing.time.perf_counter", lambda: found.now)
    return found


def test_each_round_has_another_list_that_runs_once_on_every_plan(clock):
    exports = {"dense8": Fake(clock, 2e-5), "sorted8": Fake(clock, 1e-5)}  # so fast that a batch would run many times
    race = Race(exports, lists.lists_of(make_texts(200), exports, lists.SECONDS), threads=1)
    before = {plan: len(one.got) for plan, one in exports.items()}
    run_race(race, KEPT, rounds=lists.ROUNDS)
    timed = {plan: one.got[before[plan] :] for plan, one in exports.items()}
    assert timed["dense8"] == timed["sorted8"] and len(timed["dense8"]) == race.rounds >= measure.ENOUGH_ROUNDS
    assert len({*timed["dense8"]}) == race.rounds and {*map(len, timed["dense8"])} == {lists.TEXTS}
    (row,) = (row for row in race.timings() if row.plan == "sorted8")
    assert (row.phase, row.batch) == ("list", lists.TEXTS) and row.speedup_vs_best_dense == pytest.approx(2)


def test_lists_of_slow_plans_are_shorter_and_a_list_of_few_texts_repeats_them(clock):
    def size(seconds: float, texts: list[str]) -> int:
        (count,) = {*map(len, lists.lists_of(texts, {"dense8": Fake(clock, seconds)}, 10.0))}
        return count

    assert size(1e-3, make_texts(200)) == size(1e-3, ["a", "b", "c"]) == lists.TEXTS
    assert lists.FEWEST < size(0.02, make_texts(200)) < lists.TEXTS
    assert size(10.0, make_texts(200)) == lists.FEWEST


def test_only_plans_that_can_win_on_lists_are_timed():
    near = rows_of(0.01, 32, 32, "whole", dense=300, dense8=80, ov_dense8s=67, sorted=170, sorted8=75, ov_native4s=42)
    far = rows_of(0.01, 1, 16, "whole", dense=9, dense8=1.2, ov_dense8s=2, sorted=6, sorted8=2, ov_native4s=1.3)
    setting = Setting(Path(), parse_workload("1x16,32x32"), [1], KEPT)
    dense = ["dense", "dense8", "ov-dense8s"]
    found = lists.contenders([*near.values(), *far.values()], setting, dense)
    assert found == ["dense8", "ov-dense8s", "sorted8", "ov-native4s"]  # `sorted8` is behind, but ships in any case
    losing = replace(setting, keeps_quality=KEPT | {"ov-native4s": False})
    assert "ov-native4s" not in lists.contenders([*near.values(), *far.values()], losing, dense)


def test_models_that_write_or_give_states_read_no_lists():
    heads = {head for head in ffn2moe.runtime.export.OPENED.names() if lists.reads_lists(head)}
    assert heads == {"embedding", "classification", "token_classification"}


# --- on an export ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported / "models/exported", tmp_path / "copy"))


def measured_of(path: Path, times: dict[str, float], on_lists: dict[str, float]) -> Measured:
    """The timings of one shape, 8 x 16, and of lists."""
    setting = Setting(path, parse_workload("8x16"), [1], KEPT)
    shape = rows_of(0.01, 8, 16, "whole", **times)
    return Measured(setting, [*shape.values()], {}, [*rows_of(**on_lists).values()])


def test_lists_are_timed_on_graphs_that_are_compiled_for_any_shape(copy, monkeypatch):
    pytest.importorskip("openvino")
    manifest = read_manifest(copy)
    manifest["plans"] |= {
        f"ov-{plan}": {**manifest["plans"][plan], "engine": "openvino"} for plan in ("dense", "sorted")
    }
    (copy / "manifest.json").write_text(json.dumps(manifest))
    opened: dict[str, Any] = {}
    open_plans = lists.open_plans

    def noted(*given: Any) -> dict[str, Any]:
        found = open_plans(*given)
        opened.update(found)
        return found

    monkeypatch.setattr(lists, "open_plans", noted)
    rows = rows_of(0.01, 8, 16, "whole", best="ov-dense", ov_dense=3, ov_sorted=2, sorted=2.1)
    kept = dict.fromkeys(rows, True)
    measured = Measured(Setting(copy, parse_workload("8x16"), [1], kept), [*rows.values()], {})
    reported: list[list[Timing]] = []
    found = lists.with_lists(measured, make_texts(40), seconds=0.1, report=reported.append)
    assert {*opened} == {row.plan for row in found.lists} == {*rows} and reported == [found.lists]
    assert all(row.phase == "list" and row.rounds >= 3 for row in found.lists)
    assert all({*opened[plan]._graph._compiled} == {None} for plan in ("ov-dense", "ov-sorted"))
    assert lists.with_lists(measured, make_texts(40), rounds=7).lists == [], "7 rounds give no interval"
    alone = replace(measured, timings=[rows["ov-dense"]])
    assert lists.with_lists(alone, make_texts(40)).lists == [], "one plan alone needs no race"


def test_the_plan_for_lists_is_in_plan_json_and_ships(copy, monkeypatch):
    monkeypatch.setattr(plan_file, "memory_of", lambda *given: {})
    times = {"dense8": 10, "dense": 12, "sorted": 9}
    measured = measured_of(copy, times, {"dense8": 100, "sorted8": 60, "sorted": 90})
    content = plan_file.planned(measured, min_retention=0.5, texts=make_texts(4))
    (row,) = content["lists"]
    assert (row["threads"], row["texts"], row["plan"], row["best_dense_plan"]) == (1, 96, "sorted8", "dense8")
    assert (row["speedup_vs_best_dense"], row["low"], row["high"]) == pytest.approx((1.6667, 1.65, 1.6833))
    assert row["reason"] == "lists of texts run on sorted8, 1.67x as fast as dense8 (1.65 to 1.68)"
    assert {*row["timings"]} == {"dense8", "sorted8", "sorted"}
    assert content["default_plan"] == "sorted" and content["plans"] == ["sorted", "sorted8"]
    assert 0 < content["agreement"] <= 1, "two plans give a text two embeddings"

    one = plan_file.planned(measured, min_retention=0.5, max_plans=1)
    assert one["plans"] == ["sorted"] == [row["plan"] for row in one["lists"]]
    monkeypatch.setattr("ffn2moe.planning.shipping.LARGEST", 0.0)  # nothing fits beside another
    small = plan_file.planned(measured, min_retention=0.5, shipment=Shipment(copy, KEPT))
    assert small["plans"] == ["sorted"] == [row["plan"] for row in small["lists"]]
    assert plan_file.planned(replace(measured, lists=[]), min_retention=0.5)["lists"] == []


def write_plan(path: Path, by_shape: dict[tuple[int, int], str], for_lists: str | None) -> None:
    row = {"phase": "whole", "threads": 1}
    choices = [row | {"batch": b, "sequence": s, "plan": plan} for (b, s), plan in by_shape.items()]
    plans = [*dict.fromkeys([*by_shape.values(), *([for_lists] if for_lists else [])])]
    content: dict[str, Any] = {"default_plan": choices[-1]["plan"], "timings": {}, "choices": choices, "plans": plans}
    plan_file.write(path, content | ({"lists": [{"threads": 1, "plan": for_lists}]} if for_lists else {}))


SHORT, LONG = ["a word"], ["many words of the sorted table " * 9] * 30  # one batch; one batch, by itself
LIST = [*SHORT * 20, *LONG]


@pytest.mark.parametrize("by_shape", [{(8, 16): "dense"}, {(1, 4): "dense", (40, 32): "sorted"}])
def test_a_call_of_one_batch_goes_by_shape_and_a_list_runs_on_the_plan_for_lists(copy, by_shape):
    write_plan(copy, by_shape, "sorted8")
    opened = ffn2moe.open_export(copy, threads=1)
    assert opened.list_plan == "sorted8" and "sorted8" not in opened._graph.opened, "opened when it is first needed"
    by_name = {plan: ffn2moe.open_export(copy, plan, threads=1) for plan in ("dense", "sorted", "sorted8")}
    for texts, plan in ((SHORT, "dense"), (LONG, [*by_shape.values()][-1])):
        np.testing.assert_array_equal(opened.encode(texts), by_name[plan].encode(texts))
    assert "sorted8" not in opened._graph.opened
    np.testing.assert_array_equal(opened.encode(LIST), by_name["sorted8"].encode(LIST))


def test_every_part_of_a_long_list_runs_on_the_plan_for_lists(copy, monkeypatch):
    write_plan(copy, {(8, 16): "dense"}, "sorted8")
    monkeypatch.setattr("ffn2moe.runtime.batching.TEXTS_AT_ONCE", 50)
    texts = [*LIST, *SHORT]  # the second part is one batch
    expected = ffn2moe.open_export(copy, "sorted8", threads=1).encode(texts)
    np.testing.assert_array_equal(ffn2moe.open_export(copy, threads=1).encode(texts), expected)


def test_an_export_with_one_plan_for_all_or_without_one_for_lists_opens_as_before(copy):
    write_plan(copy, {(8, 16): "dense"}, None)  # by earlier code
    opened = ffn2moe.open_export(copy, threads=1)
    assert opened.list_plan == "dense" and not isinstance(opened._graph, switch.Switch)
    write_plan(copy, {(1, 4): "dense", (40, 32): "sorted"}, None)
    opened = ffn2moe.open_export(copy, threads=1)
    assert opened._graph.for_lists() is opened._graph and opened.encode(LIST).shape == (50, 32)
    write_plan(copy, {(8, 16): "dense"}, "dense")
    assert not isinstance(ffn2moe.open_export(copy, threads=1)._graph, switch.Switch)


def test_a_plan_by_name_runs_lists_too(copy):
    write_plan(copy, {(8, 16): "dense"}, "sorted8")
    opened = ffn2moe.open_export(copy, "sorted", threads=1)
    assert (opened.plan, opened.list_plan) == ("sorted", "sorted")


def test_lists_take_what_was_chosen_for_the_nearest_number_of_threads():
    rows = [{"threads": 1, "plan": "dense8"}, {"threads": 4, "plan": "sorted8"}]
    found = [switch.plan_for_lists({"lists": rows}, count) for count in (1, 2, 3, 16)]
    assert found == ["dense8", "dense8", "sorted8", "sorted8"]
    assert switch.plan_for_lists({}, 1) is None


class Labels:
    """A graph of a classifier that says which plan it is."""

    precision = "float32"

    def __init__(self, plan: str) -> None:
        self.plan = plan
        self.inputs = dict.fromkeys(("input_ids", "attention_mask"), ("B", "L"))
        self.outputs = {"logits": ("B", 1)}

    def run(self, outputs: Any, inputs: Any) -> list[np.ndarray]:
        return [np.full((len(inputs["input_ids"]), 1), ["dense", "sorted8"].index(self.plan), np.float32)]


def test_a_classifier_runs_lists_on_the_plan_for_lists(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    graph = switch.Switch([switch.Place(1, 4, "whole", "dense")], Labels, "dense", "sorted8")
    tokenizer = load_tokenizer(tmp_path / "tokenizer", 32)
    opened = Classifier(tmp_path, "dense", {"spec": {}}, [graph], tokenizer)
    assert opened.classify(SHORT).tolist() == [[0]] and {*graph.opened} == {"dense"}
    assert {*opened.classify(LIST).ravel()} == {1} and graph.plans == ("dense", "sorted8")


def test_where_the_plan_for_lists_cannot_run_the_portable_plan_is_opened(copy, monkeypatch, caplog):
    write_plan(copy, {(8, 16): "dense"}, "ov-sorted")
    manifest = read_manifest(copy)
    (copy / "manifest.json").write_text(json.dumps(manifest | {"portable": "sorted8"}))

    def missing(*_: Any, **__: Any) -> Any:
        raise EngineMissing("this plan runs in OpenVINO, which is not installed")

    monkeypatch.setitem(ENGINES._rows, "openvino", replace(ENGINES["openvino"], require=missing, open=missing))
    with caplog.at_level(logging.WARNING):
        opened = ffn2moe.open_export(copy, threads=1)
    assert (opened.plan, opened.list_plan) == ("sorted8", "sorted8") and opened.encode(LIST).shape == (50, 32)
    assert "ov-sorted cannot run here" in caplog.text and "using sorted8" in caplog.text


# --- what shows it --------------------------------------------------------------------------------------------------


def test_the_plan_for_lists_is_shown_and_served(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_file, "memory_of", lambda *given: {})
    times = {"dense8": 10, "dense": 12, "sorted": 9, "sorted8": 9.5}
    measured = measured_of(copy, times, {"dense8": 100, "sorted8": 60, "sorted": 90})
    content = plan_file.planned(measured, min_retention=0.5)
    plan_file.write(copy, content)
    assert cli.main(["info", str(copy)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "lists of texts sorted8" in shown and "lists of texts run on sorted8, 1.67x as fast as dense8" in shown
    assert "by shape" not in shown, "every shape has one plan"

    console = Console(record=True, width=120)
    console.print(summary.gained(content))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["lists", "of", "texts,", "1", "sorted8", "60.00", "ms", "1.67x", "(1.65", "to", "1.68)"] in lines

    tags = register.tags(copy, make_stage("register", copy).params, {"retention": {}, "student": {}}, FACTS, content)
    assert (tags["default_plan"], tags["list_plan"]) == ("sorted", "sorted8")
    served = register.slim_copy(copy, tmp_path / "served", content)
    assert {*read_manifest(served)["plans"]} == {"sorted", "sorted8"}
    assert ffn2moe.open_export(served, threads=1).list_plan == "sorted8"
