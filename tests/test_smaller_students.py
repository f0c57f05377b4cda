"""Students with fewer layers, narrower FFNs, and no experts or some, through every stage."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import ffn2moe
from ffn2moe.cli import main as cli
from ffn2moe.dense.load import load_dense
from ffn2moe.distill.distiller import compared_layers
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import moe_layers
from ffn2moe.planning.shipping import complete
from ffn2moe.runtime.plans import is_dense
from flows import summary
from flows.workspace import Workspace
from tasks import (
    benchmark,
    decompose,
    distill,
    evaluate,
    export,
    front,
    judge_plans,
    prepare,
    register,
    report,
    train_router,
)
from tasks.params import ParamsError
from tasks.registry import Registry
from tests.conftest import make_tiny_bert, make_tiny_llama
from tests.points import point
from tests.texts import make_stage, make_texts, write_corpus

STAGES = {
    module.__name__.removeprefix("tasks."): module
    for module in (prepare, decompose, train_router, distill, evaluate, export, benchmark, report, register)
}
SMALL = (
    "name=small",
    "compute.threads=1",
    "teacher.source=teacher",
    "teacher.max_length=32",
    "data.corpus=texts.jsonl",
    "data.max_texts=300",
    "data.calibration_texts=40",
    "data.evaluation_pairs=30",
    "decompose.calibration_tokens=400",
    "train_router.tokens=600",
    "train_router.steps=4",
    "train_router.batch_tokens=256",
    "distill.steps=6",
    "distill.batch_tokens=256",
    "distill.checkpoint_every=3",
    "export.parity_texts=8",
    "export.engines=[onnxruntime]",
    "benchmark.shapes=[[1, 8], [4, 16]]",
    "benchmark.rounds=2",
)
DENSE = ("decompose.keep_layers=3", "decompose.num_experts=1", "decompose.num_active=1", "distill.scope=all")
MIXED = ("decompose.keep_layers=[0, 3]", "decompose.ffn_width=0.5", "decompose.num_experts=4", "distill.scope=all")


def run(root: Path, settings: tuple[str, ...], *names: str) -> None:
    for name in names:
        STAGES[name].run(make_stage(name, root, *SMALL, *settings))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def world(folder: Path, make, settings: tuple[str, ...], **options: object) -> Path:
    """A workspace in which every stage has run on a teacher of four layers."""
    make(folder / "teacher", **options)
    write_corpus(folder / "texts.jsonl", make_texts(300))
    for name in ("ffn2moe", "tasks"):  # the registered version holds its code
        shutil.copytree(Path(ffn2moe.__file__).parent.parent / name, folder / name)
    run(folder, settings, *STAGES)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return world(tmp_path_factory.mktemp("dense"), make_tiny_bert, DENSE, num_hidden_layers=4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return world(tmp_path_factory.mktemp("mixed"), make_tiny_bert, MIXED, num_hidden_layers=4)


def test_the_closed_form_start_is_the_teachers_own_layers(dense):
    """Before training a student of layers 0, 2 and 3 is the teacher whose layer 1 was taken out by hand."""
    teacher, tokenizer = load_dense(str(dense / "data/teacher"), head="embedding")
    del teacher.encoder.layer[1]
    text = tokenizer("sort the list of words", return_tensors="pt")
    for folder in ("decomposed", "routed"):
        student = checkpoint.load(dense / "models" / folder)
        assert len(student.encoder.layer) == 3 and not moe_layers(student)
        with torch.no_grad():
            expected, found = teacher(**text).last_hidden_state, student(**text).last_hidden_state
        assert (found - expected).abs().max() <= 1e-6
    spec = checkpoint.load_spec(dense / "models/distilled")
    assert spec.stacks[0].layers_kept == (0, 2, 3) and compared_layers(spec) == (1, 2, 3)


def test_distillation_trains_every_weight_of_it_and_brings_it_nearer(dense):
    before, after = (checkpoint.load(dense / "models" / name).state_dict() for name in ("routed", "distilled"))
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in unchanged if "encoder.layer" in name]
    figures = read(dense / "metrics/evaluate.json")
    assert figures["student"]["embedding_cosine"] > figures["training_free"]["embedding_cosine"]
    assert figures["layers"] == [] and figures["active_ffn_share"] == 0.75
    assert figures["amdahl_bound"] == pytest.approx(4 / 3) and figures["parameters"]["student_active"] > 0


def test_without_scope_all_its_ffns_alone_are_trained(dense, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(dense, root)
    run(root, (*DENSE, "distill.scope=experts"), "distill")
    before, after = (checkpoint.load(root / "models" / name).state_dict() for name in ("routed", "distilled"))
    changed = {name.split(".", 3)[3] for name in before if not torch.equal(before[name], after[name])}
    parts = ("intermediate.dense", "output.dense")
    assert changed == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_its_plans_are_dense_graphs_of_fewer_layers_beside_those_of_the_teacher(dense):
    manifest = read(dense / "models/exported/manifest.json")
    assert set(manifest["plans"]) == {"dense", "dense8", "student", "student8"} and not manifest["refused"]
    nodes = {}
    for plan in manifest["plans"]:
        graph = onnx.load(dense / f"models/exported/onnx/{plan}.onnx").graph
        nodes[plan] = sum(node.op_type == "Attention" for node in graph.node)
        assert not [node.op_type for node in graph.node if node.op_type in ("TopK", "NonZero", "Mixture")]
        assert manifest["plans"][plan]["parity_max_abs"] <= 1e-4 or plan.endswith("8")
    assert nodes == {"dense": 4, "dense8": 4, "student": 3, "student8": 3}
    figures, entries = read(dense / "metrics/evaluate.json"), manifest["plans"]
    assert entries["student"]["retrieval_ndcg_at_10"] == figures["student"]["retrieval"]["ndcg_at_10"]
    assert entries["dense"]["retrieval_ndcg_at_10"] == figures["teacher"]["retrieval"]["ndcg_at_10"]


def test_the_race_compares_it_with_the_dense_plans_of_the_teacher(dense):
    plan = read(dense / "exports/small/plan.json")
    assert plan["best_dense_plan"] in ("dense", "dense8") and {"student", "student8"} <= set(plan["timings"])
    assert not is_dense("student") and is_dense("dense8")
    assert plan["bounds"]["amdahl"] == pytest.approx(4 / 3, abs=1e-3)


def test_the_report_the_version_and_the_command_line_say_what_was_kept(dense, capsys):
    page = (dense / "reports/report.html").read_text(encoding="utf-8")
    assert "a dense model of 3 of 4 layers (0, 2, 3), with FFNs of 64 neurons" in page
    assert Registry(dense, "small").version_of("challenger") == 1
    assert cli(["info", str(dense / "exports/small")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 of 4 layers (0, 2, 3)" in shown and "none: a dense model, FFNs of 64 neurons" in shown


def test_the_report_and_the_summary_show_the_baselines_of_its_front(dense, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(dense, root)
    speeds = {"1x8": 9.0, "4x16": 9.0}
    ahead = point("l2", 0.999, 9.0, model="teacher", student={"retrieval.ndcg_at_10": 9.99}, speeds=speeds)
    front.write([ahead, replace(ahead, recipe="l1", model="another")], root / front.FRONT)
    run(root, DENSE, "report")
    page = (root / "reports/report.html").read_text(encoding="utf-8")
    assert "Beside students without experts" in page and "A baseline is ahead at this speed: l2 (sorted8)" in page
    assert "l1 (sorted8)" not in page
    (root / "params.yaml").write_text(
        json.dumps(make_stage("report", root, *SMALL, *DENSE).params.model_dump(by_alias=True))
    )
    quality, plan = read(root / "metrics/evaluate.json"), read(root / "exports/small/plan.json")
    console = Console(file=io.StringIO(), width=120)
    console.print(*summary._baselines(Workspace(root, root, "small"), quality, plan))
    assert "A baseline is ahead at this speed: l2 (sorted8) keeps 999.0 % at 9.00x" in console.file.getvalue()


def test_its_checkpoint_is_an_ordinary_folder_and_its_export_answers_alike(dense):
    """Opened by transformers alone, and by the runtime, it gives what the student gives."""
    folder = dense / "exports/small/checkpoint"
    plain = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    student, tokenizer = ffn2moe.load(folder), AutoTokenizer.from_pretrained(folder)
    assert type(plain) is type(student) and plain.config.num_hidden_layers == 3
    assert read(folder / "config.json")["architectures"] == ["BertModel"]
    texts = ["a red house", "sort a list of words"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = student(**batch).last_hidden_state, plain(**batch).last_hidden_state
    assert torch.equal(found, expected)
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((found * mask).sum(1) / mask.sum(1))
    export = ffn2moe.open_export(dense / "models/exported", "student")
    assert (torch.from_numpy(export.encode(texts)) - pooled).abs().max() <= 1e-5
    assert cli(["verify", str(dense / "exports/small")]) == 0


def test_its_plans_are_judged_as_it_is_and_cost_what_they_compute(dense, tmp_path):
    """What a front says of a float32 plan is what stage 5 said of the student, with the same benchmarks."""
    export, out = tmp_path / "small", tmp_path / "judged.json"
    shutil.copytree(dense / "exports/small", export)
    complete(export, dense / "models/exported")
    shutil.copytree(dense / "metrics", export / "metrics")
    job = {"export": export, "benchmarks": dense / "data/benchmarks", "threads": 1, "shape": (4, 16), "seed": 0}
    judge_plans.judge({**job, "plans": ["dense", "student"]}, out)
    written = read(out)
    judge_plans.judge({**job, "plans": ["dense", "student", "student8"]}, out)
    found = read(out)
    assert {plan: found[plan] for plan in written} == written and list(found) == ["dense", "student", "student8"]
    kept = read(dense / "metrics/evaluate.json")["retention"]["retrieval"]["ndcg_at_10"]
    assert found["student"]["judges"] == {"retrieval.ndcg_at_10": pytest.approx(kept, abs=1e-4)}
    assert found["dense"]["judges"] == {"retrieval.ndcg_at_10": pytest.approx(1, abs=1e-4)}
    assert found["dense"]["flops"] == 1 and found["student"]["flops"] == pytest.approx(3 / 4, abs=1e-3)
    assert found["student8"]["bytes"] < found["student"]["bytes"] < found["dense"]["bytes"]
    assert all(row["memory_mib"] > 0 for row in found.values())


def test_fewer_layers_narrower_ffns_and_experts_go_together(mixed):
    spec = checkpoint.load_spec(mixed / "models/distilled")
    shape = spec.stacks[0]
    assert (shape.num_layers, shape.ffn_width, shape.expert_width, shape.teacher_ffn_width) == (2, 32, 8, 64)
    assert spec.active_share == pytest.approx(2 / 4 * 32 / 64 * 2 / 4)  # of layers, of neurons, of experts
    decomposed = read(mixed / "metrics/decompose.json")
    assert decomposed["identity_max_abs"] <= 1e-5  # all experts are the smaller dense model
    assert all(0 < row["narrow_error"] < 1 for row in decomposed["layers"])
    student = ffn2moe.load(mixed / "exports/small/checkpoint")
    assert len(moe_layers(student)) == 2 and student.config.num_hidden_layers == 2
    plans = read(mixed / "models/exported/manifest.json")["plans"]
    assert {"dense", "sorted", "sorted8"} <= set(plans) and "student" not in plans
    graph = onnx.load(mixed / "models/exported/onnx/sorted.onnx").graph
    assert sum(node.op_type == "Attention" for node in graph.node) == 2
    assert "2 of 4 layers (0, 3), each FFN of 32 of 64 neurons decomposed into 4 experts" in (
        mixed / "reports/report.html"
    ).read_text(encoding="utf-8")


def test_a_language_model_of_fewer_layers_is_a_container_of_fewer_layers(tmp_path):
    settings = (
        "decompose.keep_layers=[1]",
        "decompose.container=mixtral",
        "decompose.num_experts=4",
        "distill.steps=2",
    )
    root = world(tmp_path, make_tiny_llama, settings)
    native = AutoModelForCausalLM.from_pretrained(root / "exports/small/container")
    assert native.config.model_type == "mixtral" and len(native.model.layers) == 1
    assert checkpoint.load_spec(root / "exports/small/checkpoint").stacks[0].layers_kept == (1,)


def test_a_narrow_language_model_is_an_ordinary_folder_that_writes(tmp_path):
    settings = ("decompose.ffn_width=20", "decompose.num_experts=1", "decompose.num_active=1", "distill.steps=2")
    root = world(tmp_path, make_tiny_llama, (*settings, "decompose.container=auto"))
    export = root / "exports/small"
    plain, student = AutoModelForCausalLM.from_pretrained(export / "checkpoint"), ffn2moe.load(export / "checkpoint")
    assert plain.config.intermediate_size == 20
    ids = torch.tensor([[2, 40, 41, 42]])
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, student(ids).logits)
    assert set(read(root / "models/exported/manifest.json")["plans"]) == {
        *("dense", "dense4", "dense8", "dense8b", "student", "student4", "student8", "student8b")
    }
    assert "".join(ffn2moe.open_export(root / "models/exported", "student").generate("the list", max_new_tokens=4))
    assert not (export / "container").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("decompose.keep_layers=[]",), "at least one layer"),
        (("decompose.keep_layers=[1, 1]",), "each once and in order"),
        (("decompose.ffn_width=0",), "a number of neurons from 1"),
        (("decompose.ffn_width=1.5",), "a share between 0 and 1"),
        (("decompose.num_experts=1", "decompose.num_active=1"), "it is the teacher"),
        ((*DENSE, "decompose.shared_width=4"), "shared_width = 4 is about experts"),
        ((*DENSE, "decompose.expert_width=8"), "expert_width = 8 is about experts"),
        ((*DENSE, "decompose.container=mixtral"), "container = mixtral is about experts"),
        ((*DENSE, "distill.layerwise_steps=5"), "trains mixtures layer by layer"),
    ],
)
def test_what_numbers_alone_tell_is_refused_by_the_parameters(tmp_path, settings, message):
    with pytest.raises(ParamsError, match=message):
        make_stage("decompose", tmp_path, *settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("decompose.keep_layers=[0, 4]", "the model has the layers 0 to 3"),
        ("decompose.keep_layers=5", "between 1 and 4"),
        ("decompose.ffn_width=65", "FFNs of the model have 64"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_any_work(dense, tmp_path, settings, message):
    root = tmp_path / "root"
    shutil.copytree(dense, root, ignore=shutil.ignore_patterns("models", "exports", "mlruns", "mlflow.db"))
    with pytest.raises(ValueError, match=message):
        run(root, (settings,), "decompose")
    assert not (root / "models").exists()
