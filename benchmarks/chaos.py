"""Ends runs of the whole pipeline badly; each must go on and end in the hashes of an undisturbed one.

    python -m benchmarks.chaos --kills 20                      kill -9 at random moments, spread over a whole run
    python -m benchmarks.chaos --kills 0 --locked              the database of the run record locked in the middle
    sudo python -m benchmarks.chaos --kills 0 --full-disk      a disk that fills up in the middle (a tmpfs, so as root)

The pipeline is the real one with a tiny teacher. Who is killed is drawn by the seed: the flow, DVC, the stage, DVC's
whole process group, or all of it at once with its guardian, as by a power cut. Afterwards no process may be left, no
run in MLflow may be RUNNING, the export is the old one or none until the new one is whole. Exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from flows import guardian
from flows.workspace import ROOM_NEEDED
from tasks.store import EXPERIMENT, mlflow_client
from tests.conftest import make_tiny_bert
from tests.texts import make_texts, write_corpus
from tests.toy import make_tiny, start

# Stages before anything is measured: the same bytes on every run.
REPRODUCIBLE = ("inputs", "prepare", "decompose", "train_router", "distill", "evaluate", "export")
VICTIMS = ("flow", "dvc", "stage", "group", "everything")
SECONDS_TO_VANISH = 20.0
OVER = "it was over"
console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass
class Trial:
    """What was done to a run, and how it went on."""

    what: str
    moment: float  # seconds after its start
    stage: str = ""  # at work when it happened
    code: int | None = None
    cached: int = 0  # stages that were finished and were not done again
    resumed: bool = False  # training continued from a checkpoint
    seconds: float = 0.0  # to the end, once more started
    problems: list[str] = field(default_factory=list)


def hashes(repo: Path) -> dict[str, object]:
    """What dvc.lock says of the reproducible stages, and the bytes of the export's files themselves."""
    stages = YAML(typ="safe").load((repo / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    export = repo / "exports" / "tiny"
    files = {
        path.relative_to(export).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(export.rglob("*"))
        if path.is_file() and path.name != "plan.json"  # measured times
    }
    return {**{stage: stages[stage] for stage in REPRODUCIBLE}, "files": files}


def run(repo: Path) -> tuple[int, str]:
    """A run to its end: exit code and output."""
    process = start(repo)
    output, _ = process.communicate()
    return process.returncode, output


def hurt(repo: Path, what: str, moment: float, act: Callable[[subprocess.Popen[str]], str]) -> tuple[Trial, str]:
    """Starts a run, lets `act` do its worst (it gives the stage it met) at that moment, and waits for the end."""
    trial = Trial(what, moment)
    process = start(repo)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    time.sleep(moment)
    trial.stage = act(process)
    trial.code = process.wait()
    if left := survivors(process.pid):
        trial.problems.append(f"left behind: {', '.join(left)}")
    reader.join(5)
    return trial, "".join(said)


def survivors(flow: int) -> list[str]:
    """What a flow had started and is still there after a while."""
    deadline = time.monotonic() + SECONDS_TO_VANISH
    while left := guardian.carriers(guardian.MARK, str(flow)):
        if time.monotonic() > deadline:
            return [f"{one.pid} {' '.join(one.cmdline())[:60]}" for one in left]
        time.sleep(0.1)
    return []


def go_on(repo: Path, trial: Trial, expected: dict[str, object]) -> None:
    """The same command again, and whether everything is as if nothing had happened."""
    started = time.monotonic()
    code, output = run(repo)
    trial.seconds = time.monotonic() - started
    trial.cached = output.count(" Cached") + output.count(" Restored")
    trial.resumed = "continuing from the checkpoint" in output
    if code:
        trial.problems.append(f"did not go on (exit code {code}): {output.strip().splitlines()[-1:]}")
        return
    found = hashes(repo)
    trial.problems += [f"other bytes in {key}" for key in expected if found[key] != expected[key]]
    client = mlflow_client(f"sqlite:///{repo / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    trial.problems += [f"MLflow run {one.info.run_name} is left RUNNING" for one in running]
    halves = [path.name for path in (repo / "exports").iterdir() if path.name not in ("tiny", ".gitignore", ".gitkeep")]
    halves += [str(path) for path in (repo / ".cache").glob("export-before/*")]
    trial.problems += [f"half an export is left: {name}" for name in halves]


def killer(victim: str) -> Callable[[subprocess.Popen[str]], str]:
    """Kills -9 the chosen part of a run, as soon as there is one; the flow if the run ends before that."""

    def act(process: subprocess.Popen[str]) -> str:
        while process.poll() is None:
            marked = {one.pid: command(one) for one in guardian.carriers(guardian.MARK, str(process.pid))}
            stages = {pid: words for pid, words in marked.items() if "-m tasks." in words}
            dvcs = [pid for pid, words in marked.items() if "-m dvc" in words]
            name = next((words.rpartition("tasks.")[2] for words in stages.values()), "between stages")
            if victim == "flow":
                kill([process.pid])
                return name
            if victim == "everything":
                guards = [one.pid for one in psutil.Process(process.pid).children() if "flows.guardian" in command(one)]
                kill([*guards, process.pid, *marked])
                return name
            if victim == "group" and dvcs:
                os.killpg(dvcs[0], signal.SIGKILL)
                return name
            if chosen := {"dvc": dvcs, "stage": list(stages)}.get(victim):
                kill(chosen[:1])
                return name
            time.sleep(0.01)
        return OVER

    return act


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kills(repo: Path, scratch: Path, count: int, seed: int, whole: float, expected: dict[str, object]) -> list[Trial]:
    """`count` runs from the start, each killed in its own part of the duration `whole`, and continued."""
    draw = random.Random(seed)
    trials = []
    for index in range(count):
        moment = (index + draw.random()) / count * whole
        victim = draw.choice(VICTIMS)
        copy = scratch / f"kill-{index}"
        while True:
            shutil.copytree(repo, copy)
            trial, output = hurt(copy, f"kill -9 {victim}", moment, killer(victim))
            if trial.stage != OVER:
                break
            shutil.rmtree(copy)  # the machine is faster now; what was never killed proves nothing
            moment *= 0.8
        failed_well = trial.code == 2 and "error: " in output and "Traceback" not in output
        if victim in ("dvc", "stage", "group") and not failed_well:
            trial.problems.append(f"exit code {trial.code}, said {output.strip().splitlines()[-1:]}")
        go_on(copy, trial, expected)
        tell(trial)
        trials.append(trial)
        if not trial.problems:
            shutil.rmtree(copy)
    return trials


def locked(repo: Path, scratch: Path, whole: float, expected: dict[str, object]) -> Trial:
    """Another program holds mlflow.db for longer than SQLite waits by itself; the run waits, too, and ends well."""
    copy = scratch / "locked"
    shutil.copytree(repo, copy)

    def act(process: subprocess.Popen[str]) -> str:
        if process.poll() is not None:
            return OVER
        other = sqlite3.connect(copy / "mlflow.db", timeout=60, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(12)
        other.execute("COMMIT")
        other.close()
        return ""

    trial, output = hurt(copy, "database locked for 12 s", whole / 3, act)
    if trial.stage == OVER:
        trial.problems.append("it was over before that")
    if trial.code:
        trial.problems.append(f"exit code {trial.code}: {output.strip().splitlines()[-1:]}")
    go_on(copy, trial, expected)
    tell(trial)
    return trial


def full_disk(repo: Path, scratch: Path, whole: float, expected: dict[str, object]) -> Trial:
    """The disk fills up in the middle: a clear message, refused while it is full, and on when there is room."""
    mount = scratch / "disk"
    mount.mkdir()
    size = ROOM_NEEDED + 2**28
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True)
    try:
        copy = mount / "repo"
        shutil.copytree(repo, copy)

        def act(process: subprocess.Popen[str]) -> str:
            if process.poll() is not None:
                return OVER
            with open(mount / "filler", "wb") as filler:
                os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(mount).free)
            return ""

        trial, output = hurt(copy, "disk full", whole / 3, act)
        refused, again = run(copy)
        for code, said, sign in ((trial.code, output, "disk is full"), (refused, again, "disk is nearly full")):
            if code != 2 or sign not in said or "Traceback" in said:
                trial.problems.append(f"exit code {code}, said {said.strip().splitlines()[-1:]}")
        (mount / "filler").unlink()
        go_on(copy, trial, expected)
        tell(trial)
        return trial
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def tell(trial: Trial) -> None:
    verdict = "; ".join(trial.problems) or "the same hashes"
    console.print(f"{trial.what} at {trial.moment:.1f} s ({trial.stage}): {verdict}", highlight=False)


def show(trials: Sequence[Trial], whole: float) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("what", "at", "in", "exit code", "then finished already", "from a checkpoint", "to the end", ""):
        table.add_column(name)
    for one in trials:
        cells = (one.what, f"{one.moment:.1f} s", one.stage, str(one.code), f"{one.cached} stages")
        last = ("yes" if one.resumed else "", f"{one.seconds:.1f} s", "; ".join(one.problems) or "the same hashes")
        table.add_row(*cells, *last)
    console.print(table)
    good = sum(not one.problems for one in trials)
    console.print(f"{good} of {len(trials)} continue and end with the hashes of the undisturbed run ({whole:.0f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("--locked", action="store_true")
    parser.add_argument("--full-disk", action="store_true")
    parser.add_argument("--json", type=Path, help="the trials, for a report")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        scratch = Path(folder)
        make_tiny_bert(scratch / "teacher")
        write_corpus(scratch / "texts.jsonl", make_texts(1500))
        repo = make_tiny(scratch / "repo", scratch / "teacher", scratch / "texts.jsonl")
        calm = scratch / "calm"
        shutil.copytree(repo, calm)
        started = time.monotonic()
        code, output = run(calm)
        whole = time.monotonic() - started
        if code:
            console.print(output)
            return 1
        expected = hashes(calm)
        console.print(f"undisturbed: {whole:.1f} s")
        trials = kills(repo, scratch, given.kills, given.seed, whole, expected)
        if given.locked:
            trials.append(locked(repo, scratch, whole, expected))
        if given.full_disk:
            trials.append(full_disk(repo, scratch, whole, expected))
        show(trials, whole)
        if given.json:
            given.json.write_text(json.dumps([vars(one) for one in trials], indent=2) + "\n", encoding="utf-8")
        return int(any(one.problems for one in trials))


if __name__ == "__main__":
    sys.exit(main())
