"""The grid of methods lists its cells, survives being killed, and makes a page of what is done."""

from __future__ import annotations

import json
import random
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ablation import __main__ as command
from benchmarks.ablation import build, page
from benchmarks.ablation.bench import Bench, Setup
from benchmarks.ablation.grid import Budget, Cell, Store, cells
from benchmarks.ablation.method import DEFAULT, GROUPS, METHODS, STAGES
from benchmarks.ablation.methods import CHOICES, methods_of
from benchmarks.ablation.mixture import mixture
from benchmarks.ablation.run import finish
from ffn2moe.moe.layer import moe_layers
from tasks import prepare
from tests.conftest import make_tiny_llama
from tests.texts import make_stage, make_texts, write_corpus

EMBEDDING_METHODS, CAUSAL_METHODS = (tuple(methods_of(head).values()) for head in ("embedding", "causal"))
E = 4
SMALL = ("teacher.max_length=32", "data.calibration_texts=40", "data.evaluation_pairs=30")
BUDGET = Budget(
    experts=E,
    steps=2,
    batch_tokens=256,
    learning_rate=1e-3,
    hidden_weight=1.0,
    embedding_weight=10.0,
    relational_weight=100.0,
    logits_weight=1.0,
    balance_step=1e-3,
    calibration_tokens=512,
    router_tokens=512,
    router_steps=2,
    router_batch_tokens=128,
    router_learning_rate=1e-2,
    ridge=1e-2,
    refit=1e-2,
    held_out_tokens=256,
    max_length=32,
)


def make_workspace(root: Path, teacher: Path) -> Path:
    """What `prepare` writes of a tiny teacher, made-up texts, and small sets of two kinds."""
    write_corpus(root / "texts.jsonl", make_texts(240))
    for name in ("stsb", "sst2"):
        (root / "sets" / name).mkdir(parents=True)
    sentences = [text.split("\n")[0] for text in make_texts(80, seed=5)]
    rows = (f"a\tb\tc\td\t{n % 6}\t{sentences[n]}\t{sentences[n + 1]}\n" for n in range(30))
    (root / "sets/stsb/dev.csv").write_text("".join(rows))
    (root / "sets/sst2/train.tsv").write_text("".join(f"{text}\t{n % 2}\n" for n, text in enumerate(sentences[:50])))
    (root / "sets/sst2/dev.tsv").write_text("".join(f"{text}\t{n % 2}\n" for n, text in enumerate(sentences[50:])))
    overrides = (f"teacher.source={teacher}", "data.corpus=texts.jsonl", "data.folder=sets", *SMALL)
    prepare.run(make_stage("prepare", root, *overrides))
    return root


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_teacher) -> Path:
    return make_workspace(tmp_path_factory.mktemp("ablation"), tiny_teacher)


@pytest.fixture(scope="module")
def bench(workspace, tmp_path_factory) -> Bench:
    return Bench(Setup(workspace, tmp_path_factory.mktemp("cache"), BUDGET, threads=1, device="cpu", name="tiny"))


def arguments(workspace: Path, root: Path, *more: str) -> list[str]:
    small = ("--experts", str(E), "--steps", "2", "--batch-tokens", "256", "--shares", "50", "25", "--seeds", "0", "1")
    keys = ("decompose.calibration_tokens=512", "train_router.tokens=512", "train_router.steps=2")
    keys += ("train_router.batch_tokens=256", "teacher.max_length=32", "distill.batch_tokens=256")
    places = ("--workspace", str(workspace), "--work", str(root / "work"), "--out", str(root / "docs/results.md"))
    return [*small, *places, *more, "--set", *keys]


def test_what_matters_most_comes_first():
    found = cells(EMBEDDING_METHODS, [0.5, 0.25, 0.125], STAGES, [0, 1], 8)
    assert len(found) == len(set(found))
    places = [(cell.seed, cell.num_active) for cell in found]
    assert list(dict.fromkeys(places)) == [(0, 2), (0, 4), (0, 1), (1, 2), (1, 4), (1, 1)]
    assert found[0].method == DEFAULT and found[0].stage == "free"
    assert sum(cell.method == DEFAULT for cell in found) == 2 * 3 * 3, "the default is shared by all groups"
    assert {cell.stage for cell in found if cell.method.compressor} == {"free", "distilled"}
    assert not any(cell.method.shared and cell.num_active == 1 for cell in found), "no expert is left to the router"


def test_every_method_has_a_name_of_its_own_and_a_source():
    for methods in (EMBEDDING_METHODS, CAUSAL_METHODS):
        assert len({method.name for method in methods}) == len(methods)
        assert len({json.dumps(method.settings(), sort_keys=True) for method in methods}) == len(methods)
        assert all(method.source and method.title and method.group in GROUPS for method in methods)


def test_a_share_that_is_no_whole_number_of_experts_is_refused():
    with pytest.raises(ValueError, match=r"12.5 % of 4 experts is not a whole number"):
        cells([DEFAULT], [0.125], STAGES, [0], 4)


@pytest.mark.parametrize("method", EMBEDDING_METHODS, ids=lambda method: method.name)
def test_every_method_runs_to_the_end(bench, method):
    active = 1 if method.fits(1, E) else 2
    found = build.measure(bench, Cell(method, active, method.stages[-1], seed=0))
    assert set(found["figures"]) == set(found["kept"]) == {"retrieval", "stsb", "sst2"}
    assert all(found["cost"][key] > 0 for key in ("active_share", "ffn_flops", "flops"))
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", ["elastic", "drop", "factorllm-released", "pruned"])
def test_what_is_measured_is_there_before_anything_is_distilled(bench, name):
    method = METHODS[name]
    found = build.measure(bench, Cell(method, 1 if method.fits(1, E) else 2, "free", seed=0))
    assert found["errors"]["error"] > 0 and 0 < found["cost"]["active_share"] < 1


def test_the_dense_model_keeps_everything(bench, monkeypatch):
    monkeypatch.setattr(bench, "bf16", False)
    found = build.measure(bench, Cell(DEFAULT, E, "free", seed=0))
    assert found["cost"]["active_share"] == pytest.approx(1)
    assert found["figures"] == pytest.approx(bench.judge(bench.teacher), rel=1e-3)


@pytest.mark.parametrize("name", ["pruned", "low_rank"])
def test_a_compressor_costs_no_more_than_the_default(bench, name):
    method = METHODS[name]
    default, other = (build.measure(bench, Cell(one, 1, "free", seed=0)) for one in (DEFAULT, method))
    assert 0.8 * default["cost"]["ffn_flops"] < other["cost"]["ffn_flops"] <= default["cost"]["ffn_flops"]


def test_factorllms_router_gets_no_gradient_as_released_and_some_as_published(bench):
    for name, moved in (("factorllm-released", False), ("factorllm-published", True)):
        method = METHODS[name]
        torch.manual_seed(0)
        before = [moe.router.weight.clone() for moe in moe_layers(mixture(bench, Cell(method, 1, "free", 0)).model)]
        made = build.make(bench, Cell(method, 1, "distilled", 0))
        after = [moe.router.weight for moe in moe_layers(made.model)]
        assert all(torch.equal(a, b) != moved for a, b in zip(before, after, strict=True))


def test_a_grid_lists_runs_goes_on_and_makes_its_page_again(workspace, tmp_path, capsys, monkeypatch):
    grid = arguments(workspace, tmp_path, "--methods", "default", "partition", "--stages", "free")
    assert command.main([*grid, "--list"]) == 0
    listed = capsys.readouterr().out
    assert "random 25 % free seed 1" in listed and "0 of them done" in listed

    measured = []
    monkeypatch.setattr("benchmarks.ablation.run.measure", lambda bench, cell: measured.append(cell) or made_up(cell))
    half = arguments(workspace, tmp_path, "--methods", "default", "random", "--stages", "free")
    assert command.main(half) == 0 and len(measured) == 8
    assert command.main(half) == 0 and len(measured) == 8, "what is done is not computed again"
    assert command.main(grid) == 0
    assert len(measured) == len(set(measured)) > 8
    text = (tmp_path / "docs/results.md").read_text()
    pictures = list((tmp_path / "docs/results").glob("*.png"))
    assert len(pictures) == 1 and pictures[0].stat().st_size > 10_000
    (tmp_path / "docs/results.md").unlink()
    assert command.main(["--out", str(tmp_path / "docs/results.md"), "--page-only"]) == 0
    assert (tmp_path / "docs/results.md").read_text() == text
    assert str(tmp_path) not in text and "±" in text


def test_failures_are_reported_at_the_end_and_the_other_cells_run(workspace, tmp_path, capsys, monkeypatch):
    def measure(bench: Bench, cell: Cell) -> dict:
        if cell.method.name == "random":
            raise ValueError("no luck")
        return made_up(cell)

    monkeypatch.setattr("benchmarks.ablation.run.measure", measure)
    grid = arguments(workspace, tmp_path, "--methods", "random", "weights", "--stages", "free")
    assert command.main(grid) == 1
    output = capsys.readouterr().out
    assert output.count("failed: random 25 % free seed 0: ValueError: no luck") == 1
    assert {path.name.split("-")[0] for path in (tmp_path / "work/cells").iterdir()} == {"weights"}


def test_a_grid_that_is_stopped_keeps_what_is_done_and_makes_the_page(workspace, tmp_path, capsys, monkeypatch):
    measured = []

    def measure(bench: Bench, cell: Cell) -> dict:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(cell)
        return made_up(cell)

    monkeypatch.setattr("benchmarks.ablation.run.measure", measure)
    grid = arguments(workspace, tmp_path, "--methods", "default", "random", "--stages", "free")
    assert command.main(grid) == 130
    assert "run the same command again to resume" in capsys.readouterr().out
    assert len(list((tmp_path / "work/cells").iterdir())) == 3 and (tmp_path / "docs/results.md").is_file()


def test_a_cell_that_is_killed_while_it_is_written_leaves_no_file(tmp_path, monkeypatch):
    def killed(old: Path, new: Path) -> None:
        raise KeyboardInterrupt

    store, cell = Store(tmp_path, BUDGET, "data"), Cell(DEFAULT, 1, "free", seed=0)
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(cell, {"figures": {}})
    assert not list(tmp_path.iterdir()) and store.read(cell) is None


def test_other_settings_are_other_cells(tmp_path):
    cell = Cell(DEFAULT, 1, "free", seed=0)
    others = (
        (replace(BUDGET, steps=3), "data", cell),
        (BUDGET, "other data", cell),
        (BUDGET, "data", replace(cell, seed=1)),
        (BUDGET, "data", replace(cell, method=replace(DEFAULT, gate="sigmoid"))),
        (BUDGET, "data", cell),
    )
    paths = [Store(tmp_path, budget, data).path(one) for budget, data, one in others]
    assert len(set(paths)) == len(paths)
    assert Store(tmp_path, BUDGET, "data").path(replace(cell, method=replace(DEFAULT, title="another"))) == paths[-1]


def test_processes_side_by_side_find_what_one_finds(bench):
    todo = [Cell(DEFAULT, active, "free", seed=0) for active in (1, 2)]
    found = {finished.cell: finished.found for finished in finish(bench.setup, todo, jobs=2)}
    assert set(found) == set(todo)
    alone = build.measure(bench, todo[0])
    assert found[todo[0]]["figures"] == alone["figures"] and found[todo[0]]["threads"] == 1


def test_a_process_that_dies_costs_the_cells_it_was_at_and_no_more(bench):
    broken = replace(bench.setup, threads=0)  # which torch refuses as the process starts
    todo = [Cell(DEFAULT, active, "free", seed=0) for active in (1, 2)]
    assert all(finished.found is None and "died" in finished.error for finished in finish(broken, todo, jobs=2))


def test_a_method_that_is_not_there_is_named_with_those_that_are(workspace, tmp_path, capsys):
    assert command.main(arguments(workspace, tmp_path, "--methods", "magic")) == 2
    output = capsys.readouterr().err
    assert "unknown method or group 'magic'" in output and "coactivation" not in output and "low_rank" in output


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Bench:
    """A tiny language model, texts drawn from itself, and a sample to judge by."""
    root = tmp_path_factory.mktemp("language")
    (root / "sample.txt").write_text("\n".join(make_texts(8, seed=9)[0].split("\n")[0] for _ in range(8)))
    overrides = ("data.corpus=generated", "data.evaluation=sample.txt", "data.max_texts=120", *SMALL)
    teacher = make_tiny_llama(root / "llama")
    prepare.run(make_stage("prepare", root, f"teacher.source={teacher}", *overrides))
    return Bench(Setup(root, root / "cache", BUDGET, threads=1, device="cpu", name="tiny"))


@pytest.mark.parametrize("method", CAUSAL_METHODS, ids=lambda method: method.name)
def test_every_method_for_language_models_runs_to_the_end(language, method):
    found = build.measure(language, Cell(method, 1, method.stages[-1], seed=0))
    assert set(found["figures"]) == {"perplexity", "divergence", "agreement"}
    assert found["kept"]["perplexity"] == pytest.approx(language.dense["perplexity"] / found["figures"]["perplexity"])
    assert language.dense["divergence"] == pytest.approx(0, abs=1e-6)


def made_up(cell: Cell) -> dict:
    """Figures of a cell that nobody measured."""
    generator = random.Random(repr(cell))
    kept = {name: generator.uniform(0.8, 1.0) for name in ("stsb", "retrieval", "sst2")}
    share = cell.num_active / E
    return {
        "figures": {name: 0.5 * value for name, value in kept.items()},
        "kept": kept,
        "errors": {"router_error": 0.3, "oracle_error": 0.2, "gap": 0.1, "router_recall": 0.7},
        "cost": {"active_share": share, "ffn_flops": share + 0.01, "flops": 0.5 + share / 2},
        "seconds": {"made": 1.0, "judged": 1.0, "processor": 2.0},
    }


def test_a_page_of_the_first_version_reads_as_the_present_one(tmp_path):
    cell = {"method": "pruned", "share": 0.25, "stage": "free", "seed": 0}
    grid = {"model": "tiny", "head": "causal", "methods": {"pruned": {"group": "baselines"}}, "cells": [cell, cell]}
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old = json.dumps({"grids": {"tiny": grid}}).replace("baselines", "rivals")
    (tmp_path / "old/ablation.json").write_text(old)
    (tmp_path / "new/ablation.jsonl").write_text("".join(f"{line}\n" for line in page.lines_of({"tiny": grid})))
    assert page.read(tmp_path / "old.md") == page.read(tmp_path / "new.md") == {"tiny": grid}
    assert len((tmp_path / "new/ablation.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.field)
def test_a_new_row_of_a_table_of_the_core_is_a_method_of_the_grid(choice):
    row = copy(choice.table[getattr(DEFAULT, choice.field)])
    object.__setattr__(row, "reference", "here")  # a row may be frozen
    choice.table.register("brand_new", row)
    try:
        found = methods_of(choice.heads[0])["brand_new"]
        assert (getattr(found, choice.field), found.group, found.source) == ("brand_new", choice.group, "here")
    finally:
        choice.table.forget("brand_new")
    assert "brand_new" not in methods_of(choice.heads[0])
