"""The report is one file that says the truth about the numbers it was given."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tasks import report
from tasks.timings import timings
from tests.mixtures import flat_spec
from tests.texts import make_stage

LAYERS, EXPERTS = 3, 4
SHAPES = [(1, 16), (32, 128)]


def quality(kept: float = 0.986, folder: bool = True) -> dict[str, Any]:
    def model(factor: float) -> dict[str, Any]:
        figures: dict[str, Any] = {"retrieval": {"ndcg_at_10": 0.7 * factor, "mrr": 0.66 * factor}}
        if folder:
            figures |= {"stsb": {"spearman": 86.72 * factor}, "classification": {"sst2": {"accuracy": 0.8 * factor}}}
        return figures

    def ratios(factor: float) -> tuple[dict[str, Any], dict[str, Any]]:
        def nest(leaf: Any) -> dict[str, Any]:
            nested = {"retrieval": {"ndcg_at_10": leaf, "mrr": leaf}}
            if folder:
                nested |= {"stsb": {"spearman": leaf}, "classification": {"sst2": {"accuracy": leaf}}}
            return nested

        return nest(factor), nest({"low": factor - 0.012, "high": factor + 0.011})

    retention, intervals = ratios(kept)
    free, free_intervals = ratios(0.9)
    found = {"document": 'A document <script>alert("no")</script> & more', "right": True}
    return {
        "teacher": model(1),
        "training_free": model(0.9) | {"embedding_cosine": 0.91},
        "student": model(kept) | {"embedding_cosine": 0.98},
        "retention": retention,
        "retention_interval": intervals,
        "retention_training_free": free,
        "retention_interval_training_free": free_intervals,
        "layers": layers(),
        "agreement": agreement() if folder else None,
        "active_ffn_share": 0.25,
        "amdahl_bound": 1.9,
        "flops_per_token": {"teacher": 22413312, "student": 11700000, "length": 128},
        "parameters": {"teacher": 22565376, "student": 22600000, "student_active": 17200000},
        "evaluated": {
            "retrieval_pairs": 1000,
            "stsb_pairs": 1500 if folder else 0,
            "classification": {"sst2": 872} if folder else {},
        },
        "examples": [
            {"query": "Return the <b>mean</b>.", "teacher": [found], "student": [found | {"right": False}, found]}
        ],
    }


def layers() -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "oracle_error": 0.2 + 0.02 * layer,
            "router_error": 0.25 + 0.02 * layer,
            "gap": 0.05,
            "router_recall": 0.75,
            "captured_energy": 0.94,
            "mean_active": 1.0,
            "max_over_mean_load": 1.4,
            "dead_experts": 0,
            "load": [0.1, 0.35, 0.3, 0.25],
        }
        for layer in range(LAYERS)
    ]


def agreement() -> dict[str, Any]:
    rows = [
        {"layer": layer, "tokens": 0.1 + 0.2 * (layer == 1), "texts": 0.31, "load_CE": [[0.1, 0.4, 0.3, 0.2]] * 2}
        for layer in range(LAYERS)
    ]
    return {"layers": rows, "texts": {"docstrings": 200, "sst2": 56}}


def plan(speedup: float = 1.06, chosen: str = "sorted8") -> dict[str, Any]:
    speeds = {"dense": 1.0, "dense8": 2.18, "fused": 1.08, "sorted": 1.44, "sorted8": 2.18 * speedup}
    return {
        "default_plan": chosen,
        "best_dense_plan": "dense8",
        "reason": "no plan of the student beats dense8 here",
        "machine": {"cpu": "Some CPU", "cores": 2},
        "timings": {
            name: [
                {
                    "batch": batch,
                    "sequence": sequence,
                    "threads": 1,
                    "median_ms": batch * sequence / speed / 4,
                    "speedup_vs_dense": speed,
                    "speedup_vs_best_dense": speed / 2.18,
                }
                for batch, sequence in SHAPES
            ]
            for name, speed in speeds.items()
        },
    }


def write(root: Path, *, kept: float = 0.986, speedup: float = 1.06, folder: bool = True, steps: int = 40) -> None:
    spec = flat_spec(
        num_layers=LAYERS, width=384, ffn_width=1536, expert_width=384, num_experts=EXPERTS, num_active=1,
        partition="coactivation",
    )  # fmt: skip
    manifest = {
        "spec": spec.to_dict(),
        "plans": {
            name: {"file": f"onnx/{name.removeprefix('ov-')}.onnx", "parity_max_abs": 2e-6,
                   "retrieval_ndcg_at_10": 0.68, "retention": 0.971}
            for name in (*plan()["timings"], "ov-dense", "ov-sorted")
        },
        "versions": {"ffn2moe": "0.1.0", "torch": "2.13.0"},
        "data_sha256": "0123abcd",
        "seed": 0,
    }  # fmt: skip
    prepared = {"texts": {"train": 38488}, "retrieval": {"from": "docstrings", "pairs": 1000}}
    for path, payload in (
        ("metrics/evaluate.json", quality(kept, folder)),
        ("metrics/prepare.json", prepared),
        ("metrics/train_router.json", {"layers": layers()}),
        ("metrics/distill.json", {"steps": 700}),
        ("exports/minilm/plan.json", plan(speedup)),
        ("models/exported/manifest.json", manifest),
        ("exports/minilm/manifest.json", {"bytes": {"export": 170 * 2**20, "container": 0, "dense": 87 * 2**20}}),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(payload))
    (root / "metrics/plots").mkdir(exist_ok=True)
    (root / "models/exported/onnx").mkdir(exist_ok=True)
    for name, mebibytes in (("dense", 6), ("dense8", 3), ("fused", 6), ("sorted", 6), ("sorted8", 2)):
        (root / f"models/exported/onnx/{name}.onnx").write_bytes(bytes(mebibytes * 2**20))
    router = [{"layer": n, "step": s, "loss": 2 / (1 + s) + n} for n in range(LAYERS) for s in range(steps + 1)]
    distill = [{"step": s, "loss": 9 / (1 + s), "hidden": 1.0} for s in range(steps + 1)]
    for name, rows in (("train_router", router[: 1 if steps == 0 else None]), ("distill", distill)):
        with (root / f"metrics/plots/{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def make(root: Path, *overrides: str, **options: Any) -> str:
    write(root, **options)
    report.run(make_stage("report", root, *overrides))
    return (root / "reports/report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return make(tmp_path_factory.mktemp("report"))


class Checker(HTMLParser):
    """Collects what a browser would fetch, and tags that do not nest."""

    VOID = frozenset({"meta", "path", "use", "rect", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [
            value or ""
            for key, value in attrs
            if key in ("src", "href", "xlink:href") and not (value or "").startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_well_formed_and_fetches_nothing(page):
    checker = Checker()
    checker.feed(page)
    assert not checker.wrong and not checker.open
    assert not checker.fetched and not {"script", "link", "img", "iframe"} & checker.tags
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_every_drawing_is_there_in_the_colours_of_the_page(page):
    assert page.count("<svg") == page.count("</svg>") == 8
    assert "var(--student)" in page and "#0d0e0f" not in page
    assert 'width="' not in "".join(re.findall(r"<svg [^>]*>", page)), "a drawing fills its place"


def test_every_layer_is_diagnosed_and_the_layer_whose_experts_tell_most_is_shown(page, tmp_path):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "layer error, oracle error, router gap energy captured recall" in text
    assert "Experts and where texts are from, layer 1" in text and "docstrings 200, sst2 56" in text
    alone = make(tmp_path, folder=False)
    assert "All calibration texts are of one source" in alone and "agreement, tokens" not in alone
    assert "Budgets" not in page


def test_every_budget_of_an_elastic_model_is_shown(tmp_path):
    write(tmp_path)
    path = tmp_path / "metrics/evaluate.json"
    rows = [
        {"num_active": active, "active_ffn_share": active / 4, "figure": 0.6 + 0.02 * active, "retention": 0.9}
        for active in (2, 1)
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"budgets": rows}))
    report.run(make_stage("report", tmp_path))
    page = (tmp_path / "reports/report.html").read_text(encoding="utf-8")
    assert "Budgets" in page and "0.6400" in page and "0.6200" in page


def test_the_verdict_comes_first_and_says_what_the_numbers_say(page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<h2>")[0]))
    assert "Worth using: the plan sorted8 keeps" in text and "98.6 % in float32" in text
    assert "2.31 times as fast as dense float32, 1.06 times as fast as the best dense plan" in text
    assert "97.4 % to 99.7 %" in text


def judged(kept: float, timed: dict[str, Any]) -> dict[str, Any]:
    return report.verdict(make_stage("report", Path()).params.gate, quality(kept), timings(timed), timed)


def test_a_run_that_misses_the_gate_says_so_and_why(tmp_path):
    page = make(tmp_path, speedup=0.9, folder=False, steps=0)
    assert "Not worth using yet" in page
    assert "its speed is 0.90 times that of the best dense plan (dense8)" in page
    weak = judged(0.9, plan())
    assert not weak["passed"] and weak["reasons"] == ["it keeps 90.0 % of the teacher, and 97 % is required"]

    assert "STS-B" not in page, "no data folder was given"
    assert "Nothing was trained" in page and page.count("<svg") == 5


def test_a_language_model_that_loses_its_tasks_misses_the_gate():
    known = quality(0.99)
    known["retention"]["tasks"] = {"kept": 0.85}
    gate, timed = make_stage("report", Path()).params.gate, plan()
    reasons = report.verdict(gate, known, timings(timed), timed)["reasons"]
    assert reasons == ["it keeps 85.0 % of the teacher's accuracy above chance, and 90 % is required"]
    known["retention"]["tasks"] = {"kept": 0.95}
    assert report.verdict(gate, known, timings(timed), timed)["passed"]


def test_an_encoder_that_differs_on_general_sentences_misses_the_gate():
    known = quality(0.99)
    known["student"]["general"] = {"rank_correlation": 0.5, "cosine": 0.6, "cosine_low": 0.4}
    gate, timed = make_stage("report", Path()).params.gate, plan()
    (reason,) = report.verdict(gate, known, timings(timed), timed)["reasons"]
    assert reason.endswith(f"its rank correlation with the teacher is 0.500, and {gate.min_general:g} is required")
    known["student"]["general"]["rank_correlation"] = 0.99
    assert report.verdict(gate, known, timings(timed), timed)["passed"]
    labels = [row["label"] for row in report.benchmark_rows(known)]
    assert "general sentences, rank correlation with the teacher" in labels


def test_where_dense_wins_the_nearest_mixture_is_shown_and_the_reason_given():
    timed = plan(0.9, chosen="dense8")
    shown = timings(timed)["shown"]
    assert shown["name"] == "sorted8" and shown["vs_best_dense"] == pytest.approx(0.9)
    assert judged(0.99, timed)["reasons"] == ["no plan of the student beats dense8 here"]


def test_texts_cannot_become_markup(page):
    assert "<b>mean</b>" not in page and "<script>" not in page
    assert "Return the &lt;b&gt;mean&lt;/b&gt;." in page


def test_the_same_numbers_give_the_same_page(tmp_path, page):
    assert make(tmp_path) == page


def test_several_thread_counts_are_told_apart(tmp_path):
    write(tmp_path)
    timed = plan()
    for rows in timed["timings"].values():
        rows += [row | {"threads": 2, "speedup_vs_best_dense": row["speedup_vs_best_dense"] - 0.04} for row in rows]
    found = timings(timed)
    assert found["shapes"] == ["1 × 16, 1 thr.", "32 × 128, 1 thr.", "1 × 16, 2 thr.", "32 × 128, 2 thr."]
    assert found["shown"]["threads"] == 2 and found["shown"]["vs_best_dense"] == pytest.approx(1.02)


def test_the_first_screen_says_the_size_and_what_to_do(tmp_path):
    page = make(tmp_path / "good")
    assert "2 MiB</b><span>on disk, plan sorted8; dense8 3 MiB, dense 6 MiB" in page
    assert "the export 170 MiB, 2.0x the dense model (87 MiB)" in page
    assert "Use it: <code>ffn2moe.open_export(&#34;exports/minilm&#34;)</code>" in page
    page = make(tmp_path / "bad", kept=0.9)
    assert "To keep more: train longer (<code>distill.steps=" in page


def test_layers_that_differ_are_told_and_so_is_what_stays_dense(tmp_path):
    write(tmp_path)
    path = tmp_path / "models/exported/manifest.json"
    content = json.loads(path.read_text())
    report.run(make_stage("report", tmp_path))
    assert "keeps the teacher’s FFN" not in (tmp_path / "reports/report.html").read_text(encoding="utf-8")
    content["spec"]["active_per_layer"] = [1] * (LAYERS - 1) + [3]
    content["plans"]["sorted-d5"] = content["plans"]["sorted"] | {"dense_layers": [5]}
    path.write_text(json.dumps(content))
    report.run(make_stage("report", tmp_path))
    page = (tmp_path / "reports/report.html").read_text(encoding="utf-8")
    assert "experts; a token runs 1, 1" in page and "3 in the layers in turn</h1>" in page
    assert "A plan with <code>-d</code> and layers in its name keeps the teacher’s FFN in those." in page


def test_a_student_without_experts_is_shown_as_a_dense_model_of_some_layers(tmp_path):
    write(tmp_path)
    path, evaluated = tmp_path / "models/exported/manifest.json", tmp_path / "metrics/evaluate.json"
    content, found = json.loads(path.read_text()), json.loads(evaluated.read_text())
    kept = {"num_layers": 4, "layers_kept": [0, 2, 3, 5], "teacher_layers": 6, "ffn_width": 768, "expert_width": 768}
    content["spec"]["stacks"][0] |= kept | {"teacher_ffn_width": 1536}
    content["spec"] |= {"num_experts": 1, "num_active": 1}
    path.write_text(json.dumps(content))
    evaluated.write_text(json.dumps(found | {"layers": [], "agreement": None}))
    (tmp_path / "metrics/train_router.json").write_text(json.dumps({"layers": []}))
    report.run(make_stage("report", tmp_path))
    page = (tmp_path / "reports/report.html").read_text(encoding="utf-8")
    assert "a dense model of 4 of 6 layers (0, 2, 3, 5), with FFNs of 768 of 1536 neurons</h1>" in page
    assert "Load of the experts" not in page and "mixture" not in page.partition("<details>")[0]


def test_plans_of_several_engines_and_a_plan_of_its_own_for_each_shape_are_shown(tmp_path):
    write(tmp_path)
    path = tmp_path / "exports/minilm/plan.json"
    content = json.loads(path.read_text())
    for name, speed in (("ov-dense", 2.0), ("ov-sorted", 3.0)):
        rows = [row | {"median_ms": row["median_ms"] / speed} for row in content["timings"]["dense"]]
        content["timings"][name] = [
            row | {"speedup_vs_dense": speed, "speedup_vs_best_dense": speed / 2.18} for row in rows
        ]
    content["timings"]["ov-native4"] = content["timings"]["dense"][:1]  # at the second shape
    content["choices"] = [
        row | {"plan": plan} for row, plan in zip(content["timings"]["dense"], ("dense8", "ov-sorted"), strict=True)
    ]
    content["by_threads"] = [{"threads": 1, "speedup_vs_best_dense": 1.2, "low": 1.1, "high": 1.3}]
    on_lists = {"plan": "sorted8", "best_dense_plan": "dense8", "speedup_vs_best_dense": 1.5, "low": 1.4, "high": 1.6}
    content["lists"] = [{"threads": 1, **on_lists}]
    path.write_text(json.dumps(content))
    report.run(make_stage("report", tmp_path))
    page = (tmp_path / "reports/report.html").read_text(encoding="utf-8")
    assert "Worth using: the plan <code>ov-sorted</code>" in page
    assert "1.20 times the best dense plans (1.10 to 1.30 with the noise)" in page
    assert "The plan that is used at a shape is in bold there." in page
    lists = "1 thread: sorted8, 1.50 times the speed of dense8 (1.40 to 1.60 with the noise)"
    assert f"Lists of texts, in batches of mixed shapes, {lists}" in page
    assert "ov-native4" not in page
    timed = timings(content)
    assert [plan.name for plan in timed["plans"]] == [
        "dense8", "dense", "ov-dense", "ov-sorted", "fused", "sorted", "sorted8"
    ]  # fmt: skip
    assert {plan.name: plan.chosen_at for plan in timed["plans"]}["dense8"] == [True, False]
