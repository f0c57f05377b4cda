"""Distillation in several processes: the steps of one, weights that are equal, an end that leaves nobody behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import multiprocessing

import benchmarks.ablation.methods  # noqa: F401  the divergences selected_tokens and sinkhorn
from ffn2moe.data.batches import Batches
from ffn2moe.data.ranks import ALONE, Ranks, joined
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.objectives import EmbeddingObjective, LogitsObjective, NextTokenObjective, Objective
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.sentence import SentenceModules
from tasks import distill
from tasks.params import load_params, override, read, write
from tasks.processes import take_part
from tasks.stage import StageRun
from tests.conftest import make_tiny_bert, make_tiny_classifier, make_tiny_llama
from tests.mixtures import make_workspace
from tests.texts import PARAMS, make_stage, make_texts, write_corpus

PROJECT = Path(__file__).parent.parent
TOLERANCE = 1e-6  # of weights and optimizer state after 12 steps; the most seen was 2.4e-7
METRICS = 1e-5  # of themselves, or the same 1e-6: the most seen was 7e-8, in a divergence of 0.0024
STEPS = 12
STOPPED = 5
LENGTHS = {"causal": (16, 17)}  # all texts of a language model are blocks of one length


def distiller(case: str, teachers: Path, ranks: Ranks) -> Distiller:
    """A distillation that is the same wherever it is made. Batches have 5, 2 and 1 texts, or 3 blocks."""
    head = {"causal": "causal", "next_token": "causal", "sinkhorn": "classification"}.get(case, "embedding")
    teacher, _ = load_dense(str(teachers / head), head=head)
    student, _ = load_dense(str(teachers / head), head=head)
    spec = spec_of(
        student,
        head=head,
        num_experts=4,
        num_active=2 if head == "causal" else 1,
        partition="contiguous",
        teacher="tiny",
        max_length=48,
        gate="softmax" if case in ("causal", "next_token", "threshold") else "unit",
        sentence=SentenceModules() if head == "embedding" else None,
        selection="threshold" if case == "threshold" else "topk",
        elastic=(2,) if case == "elastic" else (),
    )
    layers = []
    for index in range(spec.num_layers):
        neurons_EM = neurons_by_expert(torch.arange(spec.ffn_width) * 4 // spec.ffn_width, 4)
        layers.append(MoEFFN.from_experts(spec, slice_experts(read_ffn(student, index), neurons_EM), neurons_EM))
        torch.nn.init.normal_(layers[-1].router.weight, generator=torch.Generator().manual_seed(index))
    install_moe(student, layers)
    generator = torch.Generator().manual_seed(0)
    shortest, longest = LENGTHS.get(head, (4, 49))
    lengths = torch.randint(shortest, longest, (120,), generator=generator).tolist()
    texts = [torch.randint(5, 100, (length,), generator=generator).tolist() for length in lengths]
    objective: Objective = {
        "causal": LogitsObjective("selected_tokens", logits_weight=1.0, hidden_weight=1.0),
        "next_token": NextTokenObjective("forward_kl", logits_weight=1.0, hidden_weight=1.0),
        "sinkhorn": LogitsObjective("sinkhorn", logits_weight=1.0, hidden_weight=1.0),
    }.get(case) or EmbeddingObjective(hidden_weight=1.0, embedding_weight=10.0, relational_weight=100.0)
    return Distiller(
        teacher,
        student,
        Batches(texts, batch_tokens=51 if head == "causal" else 80, seed=0, head=head),
        objective,
        Training(steps=STEPS, learning_rate=1e-3, balance_step=1e-3, elastic=spec.elastic),
        ranks,
    )


CASES = ("embedding", "threshold", "elastic", "causal", "next_token", "sinkhorn")
Found = dict[str, Any]


def train(case: str, teachers: Path, ranks: Ranks) -> Found:
    """What became of a distillation: the state after the first step and after the last, and all metrics."""
    run = distiller(case, teachers, ranks)
    rows, first, kept = [], {}, {}
    for metrics in run.run():
        rows.append(metrics.row())
        if run.step == 1:
            first = {name: tensor.clone() for name, tensor in run.state().items()}
        if run.step == STOPPED:
            kept = {name: tensor.clone() for name, tensor in run.state().items()}
    return {"first": first, "stopped": kept, "last": run.state(), "rows": rows}


def continued(case: str, teachers: Path, ranks: Ranks, kept: dict[str, torch.Tensor]) -> Found:
    """The same from the middle on; only the first process knows where it was stopped."""
    run = distiller(case, teachers, ranks)
    if ranks.first:
        run.restore(STOPPED, kept)
    rows = [metrics.row() for metrics in run.run()]
    return {"last": run.state(), "rows": rows}


def gathered(ranks: Ranks) -> Found:
    """Rows of all processes, the second of which has none, and the gradient that comes back."""
    rows = torch.arange(6.0).reshape(3, 2)[: 3 if ranks.first else 0].requires_grad_(True)
    whole = ranks.gather(rows)
    (whole * torch.arange(6.0).reshape(3, 2)).sum().backward()
    return {"whole": whole.detach(), "gradient": rows.grad, "total": ranks.total(len(rows))}


def apart(teachers: Path, ranks: Ranks) -> str:
    """What is said when a weight of one process is not the others'."""
    run = distiller("embedding", teachers, ranks)
    try:
        for metrics in run.run():
            if not ranks.first and metrics.step == 3:
                next(iter(run.trained.values())).data[0] += 1e-6
    except ValueError as error:
        return str(error)
    return "nothing"


def ranks_of(rank: int, port: int) -> AbstractContextManager[Ranks]:
    """What torchrun tells a process, and what the process makes of it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return joined("cpu", timedelta(minutes=2))


def in_two_processes(function: Callable[[int, int, Path], None], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(function, (port, folder), nprocs=2, start_method="fork")


def work(rank: int, port: int, folder: Path) -> None:
    with ranks_of(rank, port) as ranks:
        found: dict[str, Any] = {case: train(case, folder, ranks) for case in CASES}
        found["continued"] = continued("elastic", folder, ranks, found["elastic"]["stopped"])
        found["gathered"] = gathered(ranks)
        found["apart"] = apart(folder, ranks)
    torch.save(found, folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    make: dict[str, Callable[[Path], Path]] = {
        "embedding": make_tiny_bert,
        "causal": make_tiny_llama,
        "classification": make_tiny_classifier,
    }
    for head, one in make.items():
        one(folder / head)
    return folder


@pytest.fixture(scope="module")
def two(teachers: Path) -> list[dict[str, Found]]:
    """What each of two processes found, in all cases."""
    in_two_processes(work, teachers)
    return [torch.load(teachers / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_steps_of_one(teachers: Path, two: list[dict[str, Found]], case: str):
    one, both = train(case, teachers, ALONE), two[0][case]
    for when in ("first", "last"):
        assert farthest(one[when], both[when]) < TOLERANCE, when
    for expected, found in zip(one["rows"], both["rows"], strict=True):
        assert found == pytest.approx(expected, rel=METRICS, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_all_processes_hold_the_same_weights(two: list[dict[str, Found]], case: str):
    first, second = (found[case] for found in two)
    assert equal(first["last"], second["last"])
    assert first["rows"] == second["rows"]


def test_one_that_was_stopped_ends_in_the_same_bits_though_only_the_first_knows_where(two: list[dict[str, Found]]):
    for found in two:
        assert equal(found["continued"]["last"], found["elastic"]["last"])
        assert found["continued"]["rows"] == found["elastic"]["rows"][STOPPED:]


def test_rows_are_gathered_in_order_and_each_gets_the_gradient_of_all(two: list[dict[str, Found]]):
    whole = torch.arange(6.0).reshape(3, 2)
    for found, own in zip(two, (whole, whole[:0]), strict=True):
        assert torch.equal(found["gathered"]["whole"], whole) and found["gathered"]["total"] == 3
        assert torch.equal(found["gathered"]["gradient"], 2 * own)  # of the losses of both processes


def test_weights_that_differ_are_noticed(two: list[dict[str, Found]]):
    for found in two:
        assert "after step 12 the processes hold different weights" in found["apart"]


def test_a_batch_is_divided_into_equal_parts_and_its_order_is_kept():
    for size in (1, 2, 3):
        for count in range(8):
            parts = [list(range(count))[Ranks(rank, size).part(count)] for rank in range(size)]
            assert [one for part in parts for one in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def of_stage(rank: int, port: int, root: Path) -> None:
    with ranks_of(rank, port) as ranks:
        distill.distil(StageRun("distill", load_params(root / "params.yaml"), root, quiet=True), ranks)


@pytest.fixture(scope="module")
def workspace(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `distill` can run, in two processes."""
    root = make_workspace(tmp_path_factory.mktemp("stage"), teachers / "embedding")
    shutil.copytree(root / "models/distilled", root / "models/routed", dirs_exist_ok=True)
    shutil.rmtree(root / "models/distilled")
    write_corpus(root / "data/corpus/train.jsonl", make_texts(200))
    settings = ("teacher.max_length=32", "compute.threads=2", "distill.steps=80", "distill.batch_tokens=128")
    settings += ("distill.checkpoint_every=10", "distill.processes=2")
    write(override(read(PARAMS), settings), root / "params.yaml")
    return root


def start(folder: Path, *program: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FFN2MOE_")}
    return subprocess.Popen(
        [sys.executable, *program],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_stage_that_is_terminated_leaves_nobody_and_ends_in_the_bytes_of_one_that_was_not(workspace, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(workspace, undisturbed)
    in_two_processes(of_stage, undisturbed)

    process = start(workspace, "-m", "tasks.distill")
    checkpoint = workspace / ".cache/distill.safetensors"
    while not checkpoint.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert output.startswith("distill: 2 processes, 1 thread each\n")
    assert not any(child.is_running() for child in children)
    assert not (workspace / "models/distilled").exists()

    process = start(workspace, "-m", "tasks.distill")
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert output.count("distill: resuming from the checkpoint at step") == 1
    for name in ("models/distilled/model.safetensors", "metrics/distill.json", "metrics/plots/distill.csv"):
        assert (workspace / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not checkpoint.exists()


def test_a_process_that_is_killed_ends_the_others_with_one_clear_message(tmp_path):
    (tmp_path / "part.py").write_text(
        "import os, time\n"
        "open(os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "while os.environ['RANK'] == '1' and not os.path.exists('0'): time.sleep(0.01)\n"
        "time.sleep(120) if os.environ['RANK'] == '0' else os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "stage.py").write_text(
        "from tasks.processes import launch\n"
        "from tasks.stage import main\n"
        "main('distill', lambda stage: launch(stage, 2, 'part.py'), recorded=False)\n"
    )
    shutil.copyfile(PARAMS, tmp_path / "params.yaml")
    process = start(tmp_path, "stage.py")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("distill: error: process 1 of 2 was killed (SIGKILL; ") and errors.count("\n") == 1
    assert not psutil.pid_exists(int((tmp_path / "0").read_text()))


def test_what_goes_wrong_in_one_process_is_told_by_the_one_that_started_it(tmp_path, monkeypatch, capsys):
    @contextmanager
    def alone(device, patience):
        yield ALONE

    def fail(stage, ranks):
        raise FloatingPointError("the loss is nan at step 3: lower the learning rate")

    monkeypatch.setattr("ffn2moe.data.ranks.joined", alone)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as end:
        take_part(make_stage("distill", tmp_path), fail, device="cpu", patience=timedelta(minutes=1))
    assert end.value.code == 2 and capsys.readouterr().err == ""
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert told == "ValueError: the loss is nan at step 3: lower the learning rate"


def test_another_number_of_processes_than_the_parameter_says_is_refused(tmp_path):
    stage = make_stage("distill", tmp_path, "distill.processes=3")
    with pytest.raises(ValueError, match=r"torchrun started 2 processes and distill\.processes = 3: make"):
        distill.distil(stage, Ranks(0, 2))
