"""Ends runs of the whole pipeline badly; each must go on and end in the hashes of an undisturbed one.

    python -m benchmarks.chaos --out docs/results/chaos.md     20 times kill -9, and all that follows (the last as root)
    python -m benchmarks.chaos --kills 20 --only               kill -9 alone
    python -m benchmarks.chaos --kills 0 --only --signals      Ctrl-C and SIGTERM to the flow, DVC and the stage
    python -m benchmarks.chaos --kills 0 --only --restart      a power cut, with the notes and half files it leaves
    python -m benchmarks.chaos --kills 0 --only --locked       the database of the run record locked in the middle
    python -m benchmarks.chaos --kills 0 --only --full-disk    a disk that fills up in the middle (a tmpfs, so as root)

The pipeline is the real one with a tiny teacher. When it is killed is drawn by the seed: once in each stage, some
times in training behind a checkpoint, the rest anywhere in the run. So is who is killed: the flow, DVC, the stage,
DVC's whole process group, or all of it at once with its guardian, as by a power cut. Afterwards no process may be left,
no run in MLflow may be RUNNING, the export is the old one or none until the new one is whole, and where a checkpoint
was there, training went on from it. Exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from benchmarks import show as page
from flows import guardian
from flows.workspace import ROOM_NEEDED
from tasks.params import override, read, write
from tasks.store import EXPERIMENT, mlflow_client
from tests.conftest import make_tiny_bert
from tests.texts import make_texts, write_corpus
from tests.toy import git, make_tiny, start

# Stages before anything is measured: the same bytes on every run.
REPRODUCIBLE = ("inputs", "prepare", "decompose", "train_router", "distill", "evaluate", "export")
VICTIMS = ("flow", "dvc", "stage", "group", "everything")
CHECKPOINT = Path(".cache") / "distill.safetensors"
# Of the tiny run: training long enough for several checkpoints, and one engine, as the plans are not what is shown.
SETTINGS = ("distill.steps=240", "distill.checkpoint_every=20", "export.engines=[onnxruntime]")
TRAINED = 4  # of 20 kills, those in training behind a checkpoint
SECONDS_TO_VANISH = 20.0
OVER = "it was over"
console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass(frozen=True)
class Moment:
    """When to strike: a share of the whole run, of a stage, or of training behind its first checkpoint."""

    share: float
    stage: str = ""
    trained: bool = False


@dataclass(frozen=True)
class Strike:
    """A signal to a part of a run."""

    what: str
    victim: str
    number: signal.Signals
    moment: Moment


@dataclass
class Course:
    """How an undisturbed run went, in seconds."""

    whole: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)  # how long the process of each was there
    trained: float = 0.0  # of distillation, from its first checkpoint on


@dataclass
class Trial:
    """What was done to a run, and how it went on."""

    what: str
    moment: float = 0.0  # seconds after its start
    stage: str = ""  # at work when it happened
    code: int | None = None
    cached: int = 0  # stages that were finished and were not done again
    checkpoint: bool = False  # one was there afterwards
    resumed: bool = False  # training continued from it
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


def watched(repo: Path) -> tuple[Course, int, str]:
    """An undisturbed run: how it went, its exit code and its output."""
    course = Course()
    started = time.monotonic()
    process = start(repo)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
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
    return course, process.returncode, "".join(said)


def stages_at_work(flow: int) -> dict[int, str]:
    """The processes of a flow's stages, and their names."""
    try:
        children = psutil.Process(flow).children(recursive=True)
    except psutil.Error:
        return {}
    words = {one.pid: command(one) for one in children}
    return {pid: text.split("-m tasks.")[1].split()[0] for pid, text in words.items() if "-m tasks." in text}


def reach(process: subprocess.Popen[str], repo: Path, moment: Moment, course: Course) -> None:
    """Waits for a moment of a run, or for its end."""
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
    """Starts a run, lets `act` do its worst (it gives the stage it met) at that moment, and waits for the end."""
    trial = Trial(what)
    process = start(repo)
    began = time.monotonic()
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    reach(process, repo, moment, course)
    trial.moment = time.monotonic() - began
    trial.stage = act(process)
    trial.code = process.wait()
    if left := survivors(process.pid):
        trial.problems.append(f"left behind: {', '.join(left)}")
    trial.checkpoint = (repo / CHECKPOINT).is_file()
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
    if trial.checkpoint != trial.resumed:
        trial.problems.append("a checkpoint was there and training began anew" if trial.checkpoint else "no checkpoint")
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


def striker(victim: str, number: signal.Signals) -> Callable[[subprocess.Popen[str]], str]:
    """Sends a signal to the chosen part of a run, as soon as there is one."""

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


def moments(count: int, draw: random.Random, course: Course) -> list[Moment]:
    """One in each stage, TRAINED of 20 in training behind a checkpoint, the others in equal parts of the whole run."""
    found = [Moment(draw.random(), stage) for stage in course.stages]
    found += [Moment(0.8 * draw.random(), "distill", trained=True) for _ in range(max(1, count * TRAINED // 20))]
    draw.shuffle(found)
    anywhere = max(0, count - len(found))
    return [*found[:count], *(Moment((index + draw.random()) / anywhere) for index in range(anywhere))]


def strike(repo: Path, scratch: Path, one: Strike, course: Course, expected: dict[str, object]) -> Trial:
    """A run that gets a signal and is continued."""
    moment = one.moment
    copy = Path(tempfile.mkdtemp(dir=scratch)) / "repo"
    while True:
        shutil.copytree(repo, copy)
        trial, output = hurt(copy, one.what, moment, course, striker(one.victim, one.number))
        if trial.stage != OVER:
            break
        if trial.code:
            return ended(trial, output)
        shutil.rmtree(copy)  # it was faster this time; what was never hit proves nothing
        moment = Moment(moment.share * 0.8, moment.stage, moment.trained)
    trial.problems += tracebacks(output)
    stopped = one.number != signal.SIGKILL and one.victim == "flow"
    failed = one.victim in ("dvc", "stage", "group")
    code = 2 if failed else 128 + one.number if stopped else -one.number
    said = "error: " if failed else "stopped; what is finished is kept" if stopped else ""
    # From a terminal Ctrl-C reaches all processes; DVC alone leaves it to the stage that it waits for, and goes on.
    left_alone = one.number == signal.SIGINT and one.victim == "dvc" and trial.code == 0
    if (trial.code != code or said not in output) and not left_alone:
        trial.problems.append(f"exit code {trial.code}, said {output.strip().splitlines()[-1:]}")
    go_on(copy, trial, expected)
    tell(trial)
    if not trial.problems:
        shutil.rmtree(copy.parent)
    return trial


def tracebacks(output: str) -> list[str]:
    """What ended in a traceback, if anything did: the error of each."""
    _, *found = output.split("Traceback (most recent call last)")
    errors = [re.search(r"^\s*([\w.]*(Error|Exception)\b.*)$", part, re.MULTILINE) for part in found]
    return [f"a traceback: {error[1] if error else '?'}" for error in errors]


def ended(trial: Trial, output: str) -> Trial:
    """A trial whose run ended by itself before it was disturbed: that is a failure, too."""
    trial.problems.append(f"ended by itself, exit code {trial.code}: {output.strip().splitlines()[-3:]}")
    tell(trial)
    return trial


def restart(repo: Path, scratch: Path, course: Course, expected: dict[str, object]) -> Trial:
    """A power cut in training, and what the next start of the machine finds.

    Locks that name processes which are others by now, and files that were being written: DVC's notes, its lock file,
    a checkpoint, the remembered durations.
    """
    copy = scratch / "restart"
    shutil.copytree(repo, copy)
    moment = Moment(0.5, "distill", trained=True)
    trial, output = hurt(copy, "power cut, stale notes", moment, course, striker("everything", signal.SIGKILL))
    if trial.stage == OVER or not trial.checkpoint:
        return ended(trial, output)
    another = subprocess.Popen(["sleep", "600"])  # it has the number that one of ours had before
    try:
        (copy / ".cache" / "run.lock").write_text(f"{another.pid}\n", encoding="utf-8")
        (copy / ".dvc" / "tmp" / "lock").write_text(f" {another.pid}\n", encoding="utf-8")
        note = {"pid": another.pid, "cmd": "dvc repro"}
        (copy / ".dvc" / "tmp" / "rwlock").write_text(
            json.dumps({"write": {str(copy / "models" / "distilled"): note}}), encoding="utf-8"
        )
        for torn in (copy / "dvc.lock", copy / CHECKPOINT, copy / ".cache" / "durations.json"):
            content = torn.read_bytes()
            torn.write_bytes(content[: len(content) * 2 // 3])
        trial.checkpoint = False  # half of one is none
        go_on(copy, trial, expected)
    finally:
        another.kill()
        another.wait()
    if trial.cached < 3:
        trial.problems.append(f"only {trial.cached} finished stages were found again")
    tell(trial)
    return trial


def locked(repo: Path, scratch: Path, course: Course, expected: dict[str, object]) -> Trial:
    """Another program holds mlflow.db for longer than SQLite waits by itself; the run waits, too, and ends well."""
    copy = scratch / "locked"
    shutil.copytree(repo, copy)

    def act(process: subprocess.Popen[str]) -> str:
        if process.poll() is not None:
            return OVER
        other = sqlite3.connect(copy / "mlflow.db", timeout=60, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        name = next(iter(stages_at_work(process.pid).values()), "between stages")
        time.sleep(12)
        other.execute("COMMIT")
        other.close()
        return name

    trial, output = hurt(copy, "database locked for 12 s", Moment(0.3), course, act)
    if trial.stage == OVER:
        return ended(trial, output)
    if trial.code:
        trial.problems.append(f"exit code {trial.code}: {output.strip().splitlines()[-1:]}")
    go_on(copy, trial, expected)
    tell(trial)
    return trial


def full_disk(repo: Path, scratch: Path, course: Course, expected: dict[str, object]) -> Trial:
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
            return next(iter(stages_at_work(process.pid).values()), "between stages")

        trial, output = hurt(copy, "disk full", Moment(0.5, "distill", trained=True), course, act)
        if trial.stage == OVER:
            return ended(trial, output)
        refused, again = run(copy)
        for code, said, sign in ((trial.code, output, "disk is full"), (refused, again, "disk is nearly full")):
            if code != 2 or sign not in said:
                trial.problems.append(f"exit code {code}, said {said.strip().splitlines()[-1:]}")
            trial.problems += tracebacks(said)
        (mount / "filler").unlink()
        go_on(copy, trial, expected)
        tell(trial)
        return trial
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def tell(trial: Trial) -> None:
    verdict = "; ".join(trial.problems) or "the same hashes"
    console.print(f"{trial.what} at {trial.moment:.1f} s ({trial.stage}): {verdict}", highlight=False)


COLUMNS = ("what", "at", "in", "exit code", "found finished", "from a checkpoint", "to the end", "")


def row(one: Trial) -> tuple[str, ...]:
    return (
        one.what,
        f"{one.moment:.1f} s",
        one.stage,
        str(one.code),
        f"{one.cached} stages",
        "yes" if one.resumed else "",
        f"{one.seconds:.1f} s",
        "; ".join(one.problems) or "the same hashes",
    )


def verdict(trials: Sequence[Trial]) -> str:
    """What the trials show, in a sentence for the kills and one for the others."""
    killed = [one for one in trials if one.what.startswith("kill -9")]
    others = [one for one in trials if one not in killed]
    hit = ", ".join(f"{stage} {number}" for stage, number in sorted(Counter(one.stage for one in killed).items()))
    resumed = sum(one.resumed for one in killed)
    told = []
    for several, name, more in (
        (killed, "kill -9", f" ({hit}; {resumed} went on from a checkpoint in the middle of training)"),
        (others, "otherwise disturbed", ""),
    ):
        if several:
            good = sum(not one.problems for one in several)
            told.append(f"{name}: {good} of {len(several)} continue and end with the undisturbed run's hashes{more}")
    return ".\n".join(told) + "."


def show(trials: Sequence[Trial]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name)
    for one in trials:
        table.add_row(*row(one))
    console.print(table)
    console.print(verdict(trials), highlight=False)


def write_page(trials: Sequence[Trial], course: Course, words: Sequence[str], path: Path) -> None:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, trials)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in course.stages.items())
    path.write_text(
        f"""# Interrupted in every way

{verdict(trials)}
Afterwards no process was left, no run in MLflow was left RUNNING and no half export lay in `exports/`, or the last
column tells.

```
python -m benchmarks.chaos {" ".join(words)}
```

The whole pipeline with a tiny BERT as its teacher; undisturbed it took {course.whole:.0f} s ({took}).
"Group" is DVC with its stage, "everything" all processes of the run with the guardian that would have cleaned up.
{page.about()}; load average {", ".join(f"{load:.1f}" for load in os.getloadavg())}.

{table}
""",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("--at-a-time", type=int, default=1, help="signalled runs beside each other")
    parser.add_argument("--only", action="store_true", help="of the following those that are named, else all")
    for name in ("signals", "restart", "locked", "full-disk"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--json", type=Path, help="the trials, for a report")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/chaos.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        make_tiny_bert(scratch / "teacher")
        write_corpus(scratch / "texts.jsonl", make_texts(1500))
        repo = make_tiny(scratch / "repo", scratch / "teacher", scratch / "texts.jsonl")
        write(override(read(repo / "params.yaml"), SETTINGS), repo / "params.yaml")
        git(repo, "commit", "-q", "-a", "-m", "settings")
        calm = scratch / "calm"
        shutil.copytree(repo, calm)
        course, code, output = watched(calm)
        if code:
            console.print(output)
            return 1
        expected = hashes(calm)
        console.print(f"undisturbed: {course.whole:.1f} s, training behind a checkpoint {course.trained:.1f} s")
        draw = random.Random(given.seed)
        victims = [VICTIMS[index % len(VICTIMS)] for index in range(given.kills)]
        draw.shuffle(victims)
        planned = [
            Strike(f"kill -9 {victim}", victim, signal.SIGKILL, moment)
            for victim, moment in zip(victims, moments(given.kills, draw, course), strict=True)
        ]
        if given.signals or not given.only:
            planned += [
                Strike(f"{'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'} {victim}", victim, number, moment)
                for number in (signal.SIGINT, signal.SIGTERM)
                for victim, moment in zip(
                    ("flow", "dvc", "stage"), draw.sample(moments(20, draw, course), 3), strict=True
                )
            ]
        with ThreadPoolExecutor(given.at_a_time) as pool:
            trials = list(pool.map(lambda one: strike(repo, scratch, one, course, expected), planned))
        for chosen, act in ((given.restart, restart), (given.locked, locked), (given.full_disk, full_disk)):
            if chosen or not given.only:
                trials.append(act(repo, scratch, course, expected))
        show(trials)
        if given.json:
            given.json.write_text(json.dumps([vars(one) for one in trials], indent=2) + "\n", encoding="utf-8")
        if given.out:
            write_page(trials, course, sys.argv[1:], given.out)
        return int(any(one.problems for one in trials))


if __name__ == "__main__":
    sys.exit(main())
