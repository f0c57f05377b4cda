"""Models with logits through the stages: a tiny LLaMA that writes its own corpus, a classifier, a T5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow.exceptions import MlflowException

import ffn2moe
from ffn2moe import metrics
from ffn2moe.containers.checks import open_native
from ffn2moe.containers.table import CONTAINERS, by_preference
from ffn2moe.dense.load import load_dense
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import moe_layers
from ffn2moe.preflight import duration
from ffn2moe.runtime.plans import plans_of
from tasks import (
    benchmark,
    corpus,
    decompose,
    distill,
    evaluate,
    export,
    judge_logits,
    plan_quality,
    prepare,
    register,
    report,
    train_router,
)
from tasks.measures import HEADLINES, at
from tasks.plan_quality import PlanQuality
from tasks.registry import Registry
from tasks.tokens import read_tokens
from tests.conftest import make_tiny_classifier, make_tiny_llama, make_tiny_t5
from tests.texts import make_stage, make_texts, write_corpus

STAGES = {
    module.__name__.removeprefix("tasks."): module
    for module in (prepare, decompose, train_router, distill, evaluate, export, benchmark, report, register)
}
SMALL = (
    "name=tiny",
    "teacher.source=teacher",
    "teacher.max_length=16",
    "data.calibration_texts=40",
    "data.evaluation_pairs=20",
    "compute.threads=1",
    "decompose.num_experts=4",
    "decompose.calibration_tokens=400",
    "train_router.tokens=600",
    "train_router.steps=5",
    "train_router.batch_tokens=256",
    "distill.steps=8",
    "distill.batch_tokens=256",
    "distill.checkpoint_every=5",
    "evaluate.continuation=6",
    "export.parity_texts=8",
    "benchmark.shapes=[[1, 4], [2, 8]]",
    "benchmark.decode_tokens=3",
    "benchmark.rounds=2",
)
GENERATED = ("data.corpus=generated", "data.max_texts=300", "decompose.container=mixtral")


def run(root: Path, *names: str, settings: tuple[str, ...] = GENERATED) -> None:
    for name in names:
        STAGES[name].run(make_stage(name, root, *SMALL, *settings))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A workspace in which a tiny LLaMA of 44 neurons, which no container takes as they are, wrote its corpus."""
    root = tmp_path_factory.mktemp("prepared")
    make_tiny_llama(root / "teacher", ffn_width=44)
    run(root, "prepare")
    return root


@pytest.fixture(scope="module")
def done(prepared, tmp_path_factory) -> Path:
    """The same after every stage, made for Mixtral."""
    root = tmp_path_factory.mktemp("done") / "root"
    shutil.copytree(prepared, root)
    for name in ("ffn2moe", "tasks"):
        shutil.copytree(Path(ffn2moe.__file__).parent.parent / name, root / name)
    run(root, *list(STAGES)[1:])
    return root


def test_the_figures_are_those_of_plain_transformers(done):
    found = read(done / "metrics/evaluate.json")
    model, _ = load_dense(str(done / "data/teacher"))
    texts = [row["ids"][:16] for row in corpus.read_jsonl(done / "data/corpus/evaluation.jsonl")]
    perplexity = found["teacher"]["language"]["perplexity"]
    assert perplexity == pytest.approx(perplexity_of(model, texts), rel=1e-5)
    assert found["evaluated"]["positions"] == sum(len(ids) - 1 for ids in texts)
    kept = perplexity / found["student"]["language"]["perplexity"]
    assert found["retention"]["language"]["perplexity"] == pytest.approx(kept, rel=1e-4)
    interval = found["retention_interval"]["language"]["perplexity"]
    assert interval["low"] <= found["retention"]["language"]["perplexity"] <= interval["high"]


def perplexity_of(model, texts: list[list[int]]) -> float:
    nats = tokens = 0.0
    for ids in texts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
    return torch.tensor(nats / tokens).exp().item()


def test_the_estimate_counts_the_tokens_that_the_stages_judge():
    assert (duration.PIPELINE_TOKENS, duration.PLAN_TOKENS) == (judge_logits.MOST_TOKENS, plan_quality.MOST_TOKENS)


def test_plans_and_teacher_are_judged_on_the_same_part_of_many_texts(done, monkeypatch):
    manifest = read(done / "models/exported/manifest.json")
    spec = checkpoint.load_spec(done / "models/distilled")
    teacher, tokenizer = load_dense(str(done / "data/teacher"))

    def quality():
        return PlanQuality(make_stage("export", done, *SMALL, *GENERATED), spec, teacher, tokenizer)

    whole = quality()
    kept, folder = manifest["plans"]["fused"]["retention"], done / "models/exported"
    assert whole.of("fused", manifest["plans"]["fused"], manifest, folder)["retention"] == pytest.approx(kept, abs=1e-5)
    monkeypatch.setattr("tasks.plan_quality.MOST_TOKENS", 70)
    part = quality()
    assert 4 * 16 <= sum(map(len, part.ids)) <= 70 < sum(map(len, whole.ids))
    for plan, same in (("dense", teacher), ("fused", ffn2moe.load(done / "models/distilled"))):
        found = part.of(plan, manifest["plans"][plan], manifest, folder)
        own, teachers = (perplexity_of(one, part.ids) for one in (same, teacher))
        assert found["perplexity"] == pytest.approx(own, rel=1e-3)
        assert found["retention"] == pytest.approx(teachers / own, rel=1e-3)


def test_distillation_brings_the_student_nearer_to_its_teacher(done):
    found = read(done / "metrics/evaluate.json")
    near, before = (found[name]["to_teacher"] for name in ("student", "training_free"))
    assert 0 < near["divergence"] < before["divergence"]
    assert near["divergence_interval"]["low"] < near["divergence"] < near["divergence_interval"]["high"]
    for example in found["examples"]:
        assert set(example) == {"given", "teacher", "training_free", "student"}


def test_the_container_is_written_beside_the_graphs_and_opens_without_this_package(done):
    manifest = read(done / "models/exported/manifest.json")
    assert manifest["container"]["name"] == "mixtral" and manifest["container"]["agreement"]["mean"] < 1e-5
    native = open_native(done / "exports/tiny/container")
    assert type(native).__module__.startswith("transformers.models.mixtral")
    student = ffn2moe.load(done / "exports/tiny/checkpoint")
    ids = torch.tensor([corpus.read_jsonl(done / "data/corpus/train.jsonl")[0]["ids"]])
    with torch.no_grad():
        torch.testing.assert_close(native(ids).logits, student(ids).logits, atol=1e-5, rtol=1e-4)


def test_each_plan_says_its_perplexity_and_what_it_keeps(done):
    manifest = read(done / "models/exported/manifest.json")
    found = read(done / "metrics/evaluate.json")
    assert {*manifest["plans"], *manifest["refused"]} == set(plans_of("causal", ("onnxruntime", "openvino")))
    teacher = found["teacher"]["language"]["perplexity"]
    for name, entry in manifest["plans"].items():
        assert entry["retention"] == pytest.approx(teacher / entry["perplexity"], rel=1e-4), name
    assert manifest["plans"]["dense"]["retention"] == 1
    assert manifest["plans"]["sorted"]["perplexity"] == found["student"]["language"]["perplexity"]
    assert manifest["plans"]["sorted8"]["perplexity"] != found["student"]["language"]["perplexity"]


def test_reading_and_decoding_are_timed_apart_and_the_whole_request_decides(done):
    plan = read(done / "exports/tiny/plan.json")
    for rows in plan["timings"].values():
        assert [row["phase"] for row in rows] == ["prefill", "decode", "request"] * 2
        prefill, decode, request = rows[3:]
        assert decode["tokens_per_second"] == pytest.approx(2000 / decode["median_ms"], rel=0.01)
        assert max(prefill["median_ms"], decode["median_ms"]) < request["median_ms"]
    assert read(done / "metrics/benchmark.json")["largest_shape"]["dense"]["phase"] == "request"


def test_the_report_speaks_of_perplexity_and_shows_how_the_models_go_on(done):
    page = (done / "reports/report.html").read_text()
    for told in ("of the teacher’s perplexity", "tokens decoded a second", "mixtral, audited", "Training-free mixture"):
        assert told in page, told
    assert "nDCG" not in page and "retrieval" not in page.lower()


def test_the_registered_version_writes_what_the_export_writes(done):
    told = read(done / "metrics/register.json")
    assert told["retention"] == read(done / "metrics/evaluate.json")["retention"]["language"]["perplexity"]
    answer = Registry(done, "tiny").predict(told["version"], ["the red house"])
    opened = ffn2moe.open_export(done / "exports/tiny")
    assert list(answer) == ["".join(opened.generate("the red house"))]


def test_the_served_writer_refuses_what_it_cannot_answer(done):
    from tasks.served_model import Served

    limits = {"max_texts": 3, "max_characters": 1000}
    writer = Served()
    writer.load_context(SimpleNamespace(artifacts={"export": str(done / "exports/tiny")}, model_config=limits))
    for bad, message in (([], "there is no text"), (["a", " "], "text 1 is empty"), (["a " * 80], "can hold 64")):
        with pytest.raises(MlflowException, match=message) as error:
            writer.predict(bad)
        assert error.value.get_http_status_code() == 400


@pytest.mark.parametrize("name", [container.name for container in by_preference("llama")])
@pytest.mark.parametrize("num_active", [1, 2])
def test_every_container_fixes_gate_bias_and_width_at_any_k(prepared, tmp_path, name, num_active):
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    settings = (*GENERATED, f"decompose.container={name}", f"decompose.num_active={num_active}")
    run(root, "decompose", settings=settings)
    spec, container = checkpoint.load_spec(root / "models/decomposed"), CONTAINERS[name]
    assert (spec.gate, spec.router_bias, spec.container) == (container.gate, False, name)
    assert spec.expert_width == 16 and spec.num_active == num_active
    assert read(root / "metrics/decompose.json")["identity_max_abs"] < 1e-5
    stage = make_stage("distill", root, *SMALL, *settings)
    assert bool(distill.balance_step_of(stage, spec)) == bool(container.choice_bias)
    for moe in moe_layers(checkpoint.load(root / "models/decomposed")):
        assert not moe.router.has_bias


def test_a_container_with_a_shared_expert_holds_one(prepared, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    run(root, "decompose", settings=(*GENERATED, "decompose.container=auto", "decompose.shared_width=12"))
    spec = checkpoint.load_spec(root / "models/decomposed")
    assert spec.shared_width == 12 and CONTAINERS[spec.container].shared_expert is not None
    assert "container: granitemoeshared" in capsys.readouterr().out


def test_a_language_model_keeps_a_half_in_a_container_where_no_number_is_named(prepared, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    usual = ("decompose.num_experts=auto", "decompose.num_active=1", "decompose.container=auto")
    run(root, "decompose", settings=(*GENERATED, *usual))
    spec = checkpoint.load_spec(root / "models/decomposed")
    assert (spec.num_experts, spec.num_active, spec.container) == (3, 1, "granitemoeshared")
    assert spec.shared_width == spec.stacks[0].ffn_width // 4 == 11
    run(root, "decompose", settings=(*GENERATED, *usual, "decompose.gate=softmax"))
    assert checkpoint.load_spec(root / "models/decomposed").container is None
    assert "none, because granitemoeshared weighs experts by softmax_topk, not by softmax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("prepare", ["teacher.max_length=65"], "more than the 64 positions"),
        ("decompose", ["decompose.container=qwen3_moe"], r"qwen3_moe cannot hold this model, because .*mixtral .*can"),
        ("prepare", ["teacher.head=classification"], "with the head classification writes no text: name a corpus"),
        (
            "prepare",
            ["teacher.head=classification", "data.corpus=docstrings", "decompose.container=none"],
            "lacks weights",
        ),
        ("benchmark", ["benchmark.shapes=[[1, 62]]"], "more than the 64 that the model can hold"),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_the_reason(done, stage, settings, message):
    with pytest.raises(ValueError, match=message):
        run(done, stage, settings=(*GENERATED, *settings))


@pytest.mark.parametrize(
    ("make", "kept", "stages"), [(make_tiny_classifier, "concordance", 6), (make_tiny_t5, "kappa", 5)]
)
def test_classifiers_and_seq2seq_models_are_distilled_and_judged(tmp_path, make, kept, stages):
    make(tmp_path / "teacher")
    write_corpus(tmp_path / "texts.jsonl", make_texts(300))
    (tmp_path / "sets/sst2").mkdir(parents=True)
    rows = [f"{text.split('.')[0]}\t{number % 2}\n" for number, text in enumerate(make_texts(20, seed=7))]
    for name in ("train", "dev"):
        (tmp_path / f"sets/sst2/{name}.tsv").write_text("".join(rows[::2] if name == "dev" else rows[1::2]))
    run(tmp_path, *list(STAGES)[:stages], settings=("data.corpus=texts.jsonl", "data.folder=sets", "distill.steps=40"))
    found = read(tmp_path / "metrics/evaluate.json")
    near, before = (found[name]["to_teacher"] for name in ("student", "training_free"))
    assert 0 <= near["agreement"] <= 1 and near["divergence"] < before["divergence"]
    assert found["retention"]["to_teacher"][kept] == near[kept] < 1
    interval = found["retention_interval"]["to_teacher"][kept]
    assert interval["low"] <= near[kept] <= interval["high"]
    assert ("sst2" in found["student"].get("classification", {})) == (found["head"] == "classification")
    if stages == 6:
        plans = read(tmp_path / "models/exported/manifest.json")["plans"]
        assert plans["dense"][kept] == plans["dense"]["retention"] == 1
        assert plans["sorted"]["retention"] == near[kept]
        assert 0.5 < plans["dense8"][kept] < 1


def test_kappa_tells_a_right_student_from_one_that_answers_all_texts_alike():
    """Agreement alone does not: the constant student of a classifier whose texts mostly have one label has 90 %."""
    labels = torch.zeros(200, dtype=torch.int64)
    labels[::10] = 1
    text_N = torch.arange(200) // 4
    assert (labels == 0).double().mean() == 0.9
    assert metrics.kappa(labels, labels) == 1 and metrics.kappa(labels, torch.zeros_like(labels)) == 0
    interval = metrics.kappa_interval(labels, torch.zeros_like(labels), text_N=text_N)
    assert interval.low == interval.high == 0
    other = labels.clone()
    other[::20] = 0
    between = metrics.kappa_interval(labels, other, text_N=text_N)
    assert 0 < between.low < metrics.kappa(labels, other) < between.high < 1


@pytest.mark.parametrize(("make", "head"), [(make_tiny_classifier, "classification"), (make_tiny_t5, "seq2seq"),
                                            (make_tiny_llama, "causal")])  # fmt: skip
def test_a_student_that_gives_all_texts_the_same_fails_the_gate(tmp_path, make, head):
    """The judge of the stage: a model whose logits are one vector keeps nothing that the gate lets pass."""
    make(tmp_path / "teacher")
    write_corpus(tmp_path / "texts.jsonl", make_texts(120))
    settings = ("data.corpus=texts.jsonl",) if head != "causal" else GENERATED  # the text that a random one knows
    run(tmp_path, "prepare", settings=settings)
    teacher, tokenizer = load_dense(str(tmp_path / "data/teacher"), head=head)
    constant, _ = load_dense(str(tmp_path / "data/teacher"), head=head)
    stage = make_stage("evaluate", tmp_path, *SMALL, *settings)
    problem = "single_label" if head == "classification" else None
    spec = SimpleNamespace(head=head, problem=problem, max_length=16)
    tokens = read_tokens(tmp_path / "data/corpus/evaluation.jsonl", head, tokenizer, 16, packed=False)
    with torch.no_grad():
        seen = [teacher(**batch.inputs).logits.flatten(0, -2) for batch in tokens.in_order(16)]
    mean_V = torch.cat(seen).softmax(-1).mean(0).log()  # the best that one vector can be
    last = constant.get_output_embeddings() or constant.classifier
    last.register_forward_hook(lambda module, inputs, output: mean_V.expand_as(output))
    models = {"teacher": teacher, "training_free": constant, "student": teacher}
    found = evaluate.JUDGES[head](stage, models, tokenizer, spec, "cpu")
    path, gate = HEADLINES[head].path, stage.params.gate.min_retention
    assert at(found["retention"], path) == pytest.approx(1)
    assert at(found["retention_training_free"], path) < gate


def test_a_teacher_that_answers_everything_with_one_token_is_refused_before_the_work():
    rows = [{"decoder_ids": [0, 7, 7]}, {"decoder_ids": [0, 7]}]
    with pytest.raises(ValueError, match="all 2 held-out texts with one and the same token"):
        prepare.require_varied_answers(rows)
    prepare.require_varied_answers([*rows, {"decoder_ids": [0, 8]}])
