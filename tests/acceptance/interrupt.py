"""Interrupt a run of the pipeline at a chosen moment, resume it, and compare it with an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from flows import guardian
from tasks.store import EXPERIMENT, mlflow_client
from tests.toy import start

# These stages measure nothing: they write the same bytes on every run.
REPRODUCIBLE = ("inputs", "prepare", "decompose", "train_router", "distill", "evaluate", "export")
CHECKPOINT = Path(".cache") / "distill.safetensors"
SECONDS_TO_VANISH = 20.0
OVER = "it was over"


@dataclass(frozen=True)
class Moment:
    """Say when to strike: a share of the whole run, of a stage, or of training after its first checkpoint."""

    share: float
    stage: str = ""
    trained: bool = False


@dataclass
class Course:
    """Hold the seconds of an undisturbed run."""

    whole: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)  # how long the process of each stage lived
    trained: float = 0.0  # distillation after its first checkpoint


@dataclass
class Trial:
    """Record what was done to a run, and how it resumed."""

    what: str
    moment: float = 0.0  # seconds after its start
    stage: str = ""  # the stage that ran at that moment
    code: int | None = None
    cached: int = 0  # finished stages that did not run again
    checkpoint: bool = False  # there was one after the interruption
    resumed: bool = False  # training resumed from it
    seconds: float = 0.0  # the second run, to its end
    problems: list[str] = field(default_factory=list)


def hashes(repo: Path) -> dict[str, object]:
    """Return the entries of dvc.lock for the reproducible stages, and the hashes of the files of every plan."""
    stages = YAML(typ="safe").load((repo / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    export = repo / "models" / "exported"  # exports/tiny has the plans that were faster, by measured times
    files = {
        path.relative_to(export).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(export.rglob("*"))
        if path.is_file()
    }
    return {**{stage: stages[stage] for stage in REPRODUCIBLE}, "files": files}


def run(repo: Path) -> tuple[int, str]:
    """Run the pipeline to its end; return the exit code and the output."""
    process = start(repo)
    output, _ = process.communicate()
    return process.returncode, output


def watched(repo: Path) -> tuple[Course, int, str]:
    """Run the pipeline undisturbed; return its seconds, its exit code and its output."""
    course = Course()
    started = time.monotonic()
    process = start(repo)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    last = started
    while process.poll() is None:
        time.sleep(0.02)
        now = time.monotonic()
        for stage in stages_at_work(process.pid).values():
            course.stages[stage] = course.stages.get(stage, 0.0) + now - last
            if (repo / CHECKPOINT).is_file():
                course.trained += now - last
        last = now
    reader.join(5)
    course.whole = time.monotonic() - started
    return course, process.returncode, "".join(output)


def stages_at_work(flow: int) -> dict[int, str]:
    """Return the processes of a flow's stages and the names of the stages."""
    try:
        children = psutil.Process(flow).children(recursive=True)
    except psutil.Error:
        return {}
    words = {one.pid: command(one) for one in children}
    return {pid: text.split("-m tasks.")[1].split()[0] for pid, text in words.items() if "-m tasks." in text}


def reach(process: subprocess.Popen[str], repo: Path, moment: Moment, course: Course) -> None:
    """Wait for a moment of a run, or for its end."""
    if not moment.stage:
        time.sleep(moment.share * course.whole)
        return
    while process.poll() is None:
        if moment.stage in stages_at_work(process.pid).values():
            if moment.trained and not (repo / CHECKPOINT).is_file():
                time.sleep(0.01)
                continue
            time.sleep(moment.share * (course.trained if moment.trained else course.stages[moment.stage]))
            return
        time.sleep(0.02)


def hurt(
    repo: Path, what: str, moment: Moment, course: Course, act: Callable[[subprocess.Popen[str]], str]
) -> tuple[Trial, str]:
    """Start a run, call `act` at that moment (it returns the stage that it met), and wait for the end."""
    trial = Trial(what)
    process = start(repo)
    began = time.monotonic()
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    reach(process, repo, moment, course)
    trial.moment = time.monotonic() - began
    trial.stage = act(process)
    trial.code = process.wait()
    if left := survivors(process.pid):
        trial.problems.append(f"processes survive: {', '.join(left)}")
    trial.checkpoint = (repo / CHECKPOINT).is_file()
    reader.join(5)
    return trial, "".join(output)


def survivors(flow: int) -> list[str]:
    """List the processes that a flow started and that still live after SECONDS_TO_VANISH."""
    deadline = time.monotonic() + SECONDS_TO_VANISH
    while left := guardian.carriers(guardian.MARK, str(flow)):
        if time.monotonic() > deadline:
            return [f"{one.pid} {' '.join(one.cmdline())[:60]}" for one in left]
        time.sleep(0.1)
    return []


def resume(repo: Path, trial: Trial, expected: dict[str, object]) -> None:
    """Run the same command again, and record every difference from an undisturbed run."""
    started = time.monotonic()
    code, output = run(repo)
    trial.seconds = time.monotonic() - started
    trial.cached = output.count(" Cached") + output.count(" Restored")
    trial.resumed = "resuming from the checkpoint" in output
    if trial.checkpoint != trial.resumed:
        trial.problems.append("training ignored its checkpoint" if trial.checkpoint else "no checkpoint")
    if code:
        trial.problems.append(f"did not resume (exit code {code}): {output.strip().splitlines()[-1:]}")
        return
    found = hashes(repo)
    trial.problems += [f"different bytes in {key}" for key in expected if found[key] != expected[key]]
    client = mlflow_client(f"sqlite:///{repo / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    trial.problems += [f"MLflow run {one.info.run_name} is still RUNNING" for one in running]
    halves = [path.name for path in (repo / "exports").iterdir() if path.name not in ("tiny", ".gitignore", ".gitkeep")]
    halves += [str(path) for path in (repo / ".cache").glob("export-before/*")]
    trial.problems += [f"a partial export is left: {name}" for name in halves]


def striker(victim: str, number: signal.Signals) -> Callable[[subprocess.Popen[str]], str]:
    """Return an act that sends a signal to the chosen part of a run, as soon as that part exists."""

    def act(process: subprocess.Popen[str]) -> str:
        while process.poll() is None:
            marked = {one.pid: command(one) for one in guardian.carriers(guardian.MARK, str(process.pid))}
            stages = {pid: words for pid, words in marked.items() if "-m tasks." in words}
            dvcs = [pid for pid, words in marked.items() if "-m dvc" in words]
            name = next((words.rpartition("tasks.")[2] for words in stages.values()), "between stages")
            if victim == "flow":
                send([process.pid], number)
                return name
            if victim == "everything":
                guards = [one.pid for one in psutil.Process(process.pid).children() if "flows.guardian" in command(one)]
                send([*guards, process.pid, *marked], number)
                return name
            if victim == "group" and dvcs:
                os.killpg(dvcs[0], number)
                return name
            if chosen := {"dvc": dvcs, "stage": list(stages)}.get(victim):
                send(chosen[:1], number)
                return name
            time.sleep(0.01)
        return OVER

    return act


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def tracebacks(output: str) -> list[str]:
    """Return the error of each traceback in the output."""
    _, *found = output.split("Traceback (most recent call last)")
    errors = [re.search(r"^\s*([\w.]*(Error|Exception)\b.*)$", part, re.MULTILINE) for part in found]
    return [f"a traceback: {error[1] if error else '?'}" for error in errors]
