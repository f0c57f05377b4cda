"""A small pipeline with the shape of the real one, for what is about the flow and not about models.

A git and DVC repository with this project's flows, params and stage module, and five stages that take no time.
What they do is set by `seed`: 13 fails with a message, 14 with a bug, 99 goes on until it is stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tasks.params import override, read, write

PROJECT = Path(__file__).resolve().parent.parent

DVC_YAML = """\
stages:
  inputs:
    cmd: python -m tasks.toy inputs
    always_changed: true
    outs: [data/inputs.json]
  prepare:
    cmd: python -m tasks.toy prepare
    deps: [data/inputs.json, tasks/toy.py]
    params: [data.folder]
    outs: [data/corpus]
    metrics: [metrics/prepare.json]
  distill:
    cmd: python -m tasks.toy distill
    deps: [data/corpus, tasks/toy.py]
    params: [seed]
    outs: [models/distilled]
  evaluate:
    cmd: python -m tasks.toy evaluate
    deps: [models/distilled, tasks/toy.py]
    outs: ["exports/${name}/plan.json", "exports/${name}/manifest.json", reports/report.html]
    metrics: [metrics/evaluate.json]
  register:
    cmd: python -m tasks.toy register
    deps: [models/distilled, tasks/toy.py]
    outs: [metrics/register.json]
"""

STAGES = """\
import sys
import time
from pathlib import Path

from tasks.stage import StageRun, main


def inputs(stage: StageRun) -> None:
    stage.write_json("data/inputs.json", {"folder": Path(stage.params.data.folder or ".").name})


def prepare(stage: StageRun) -> None:
    with stage.out("data/corpus") as out:
        (out / "train.jsonl").write_text("{}")
    stage.write_json("metrics/prepare.json", {"texts": 1})


def distill(stage: StageRun) -> None:
    seed = stage.params.seed
    with stage.out("models/distilled") as out:
        (out / "seed").write_text(str(seed))
        for step in range(3):
            stage.log_metrics({"loss": 1 / (step + 1)}, step)
        if seed == 13:
            raise ValueError("the loss is NaN at step 3; lower distill.learning_rate")
        if seed == 14:
            {}["a bug"]
        while seed == 99:
            stage.say("still here")
            (stage.root / "alive").write_text(str(time.time()))
            time.sleep(0.1)


def evaluate(stage: StageRun) -> None:
    figures = {"retrieval": {"ndcg_at_10": 0.7, "mrr": 0.6}}
    retention = {"retrieval": {"ndcg_at_10": 1.0, "mrr": 1.0}}
    stage.write_json(
        "metrics/evaluate.json",
        {"teacher": figures, "training_free": figures, "student": figures, "retention": retention,
         "active_ffn_share": 0.25, "amdahl_bound": 1.9},
    )
    row = {"batch": 1, "sequence": 16, "threads": 1, "phase": "whole", "median_ms": 2.0, "speedup_vs_dense": 1.5,
           "speedup_vs_best_dense": 1.1, "low": 1.05, "high": 1.15}
    plan = {"default_plan": "sorted", "plans": ["sorted"], "reason": "sorted is the fastest",
            "choices": [row | {"plan": "sorted", "best_dense_plan": "dense"}], "timings": {"sorted": [row]}}
    stage.write_json(f"exports/{stage.params.name}/plan.json", plan)
    size = {"export": 18 << 20, "container": 0, "dense": 10 << 20}
    manifest = {"plans": {"sorted": {"retention": 0.99}}, "bytes": size}
    stage.write_json(f"exports/{stage.params.name}/manifest.json", manifest)
    stage.write_text("reports/report.html", "<p>toy</p>")


def register(stage: StageRun) -> None:
    from tasks.registry import Registry

    name = stage.params.model_name
    registry = Registry(stage.root, name)
    what = {"code": stage.root / "tasks/toy_model.py", "export": stage.root / "models/distilled",
            "packages": [], "requirements": ["numpy"], "example": ["a"]}
    with registry.added(**what) as version, registry.moved("challenger", version):
        stage.write_json("metrics/register.json", {"model": name, "version": version,
                                                   "aliases": ["challenger"], "refused": ["it is a toy"]})


main(sys.argv[1], globals()[sys.argv[1]], torch=False, recorded=sys.argv[1] != "inputs")
"""

MODEL = """\
import mlflow


class Toy(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[str]) -> list[int]:
        return [len(text) for text in model_input]


mlflow.models.set_model(Toy())
"""


def make_toy(folder: Path) -> Path:
    """The toy's repository, committed and clean."""
    copy_project(folder)
    (folder / "tasks" / "toy.py").write_text(STAGES)
    (folder / "tasks" / "toy_model.py").write_text(MODEL)
    (folder / "tasks" / "check.py").write_text("")  # there is no teacher to look at
    (folder / "dvc.yaml").write_text(DVC_YAML)
    commit(folder)
    return folder


def make_tiny(folder: Path, teacher: Path, corpus: Path) -> Path:
    """A repository of the real pipeline, with a tiny teacher and few steps as its committed parameters."""
    copy_project(folder)
    params = folder / "params.yaml"
    settings = (
        "name=tiny",
        f"teacher.source={teacher}",
        "teacher.max_length=32",
        f"data.corpus={corpus}",
        "data.max_texts=400",
        "data.calibration_texts=40",
        "data.evaluation_pairs=100",
        "compute.threads=1",
        "decompose.num_experts=4",
        "decompose.num_active=2",
        "decompose.calibration_tokens=1024",
        "train_router.tokens=2048",
        "train_router.steps=4",
        "train_router.batch_tokens=256",
        "distill.steps=6",
        "distill.batch_tokens=256",
        "distill.checkpoint_every=2",
        "export.parity_texts=8",
        "benchmark.shapes=[[1, 8], [4, 16]]",
        "benchmark.rounds=2",
    )
    write(override(read(params), settings), params)
    commit(folder)
    return folder


def copy_project(folder: Path) -> None:
    """The files of this project that a run needs, as they are in the working tree."""
    folder.mkdir(parents=True)
    for name in ("ffn2moe", "flows", "tasks"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml", "constraints.txt", ".gitignore", ".dvcignore"):
        shutil.copy(PROJECT / name, folder)
    (folder / "docs" / "results").mkdir(parents=True)
    (folder / "docs" / "results" / "front.jsonl").write_text("\n")  # a front that nobody has measured
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(PROJECT / ".dvc" / name, folder / ".dvc" / name)


def commit(folder: Path) -> None:
    for command in ("init -q -b main", "add -A", "commit -q -m start"):
        git(folder, *command.split())


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def environment() -> dict[str, str]:
    """A terminal's surroundings, without what this test run itself was given."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "FFN2MOE_", "MLFLOW_", "GIT_"))
    }
    return {**kept, "COLUMNS": "160"}


def start(folder: Path, *settings: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """`python -m flows.compress` as a child in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.compress", *settings],
        cwd=cwd or folder,
        env={**environment(), "PYTHONPATH": str(folder)} if cwd else environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A background job of a shell that has no job control ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def compress(folder: Path, *settings: str, cwd: Path | None = None) -> tuple[int, str]:
    """A whole run: its exit code and what it printed."""
    process = start(folder, *settings, cwd=cwd)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output
