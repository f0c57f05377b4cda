"""Interrupt runs of the whole pipeline; each must resume and end with the hashes of an undisturbed run.

    python -m tests.acceptance.chaos --out docs/results/chaos.md     20 times kill -9, and all of the following
    python -m tests.acceptance.chaos --kills 20 --only               kill -9 alone
    python -m tests.acceptance.chaos --kills 0 --only --signals      Ctrl-C and SIGTERM to the flow, DVC and the stage
    python -m tests.acceptance.chaos --kills 0 --only --restart      a power cut with stale locks and torn files
    python -m tests.acceptance.chaos --kills 0 --only --locked       a locked database of the run record
    python -m tests.acceptance.chaos --kills 0 --only --full-disk    a full disk (a tmpfs: needs root)

The pipeline is the real one with a tiny teacher. The seed draws the moments: one in each stage, some in training
after a checkpoint, the rest anywhere in the run. It also draws the victim: the flow, DVC, the stage, the process group
of DVC, or everything with its guardian, as in a power cut. Afterwards no process may survive and no run in MLflow may
be RUNNING. Until the new export is complete, the old one (or none) is there. If there was a checkpoint, training must
resume from it. Exits with 1 if one trial fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.page import about
from flows.workspace import ROOM_NEEDED
from tasks.params import override, read, write
from tests.acceptance.interrupt import (
    CHECKPOINT,
    OVER,
    Course,
    Moment,
    Trial,
    hashes,
    hurt,
    resume,
    run,
    stages_at_work,
    striker,
    tracebacks,
    watched,
)
from tests.conftest import make_tiny_bert
from tests.texts import make_texts, write_corpus
from tests.toy import git, make_tiny

VICTIMS = ("flow", "dvc", "stage", "group", "everything")
# Training is long enough for several checkpoints. One engine is enough: this test does not judge plans.
SETTINGS = ("distill.steps=240", "distill.checkpoint_every=20", "export.engines=[onnxruntime]")
TRAINED = 4  # of 20 kills, the number that strike training after a checkpoint
console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass(frozen=True)
class Strike:
    """Describe a signal to a part of a run."""

    what: str
    victim: str
    number: signal.Signals
    moment: Moment


def moments(count: int, draw: random.Random, course: Course) -> list[Moment]:
    """Draw one moment in each stage, TRAINED of 20 in training after a checkpoint, the others over the whole run."""
    found = [Moment(draw.random(), stage) for stage in course.stages]
    found += [Moment(0.8 * draw.random(), "distill", trained=True) for _ in range(max(1, count * TRAINED // 20))]
    draw.shuffle(found)
    anywhere = max(0, count - len(found))
    return [*found[:count], *(Moment((index + draw.random()) / anywhere) for index in range(anywhere))]


def strike(repo: Path, scratch: Path, one: Strike, course: Course, expected: dict[str, object]) -> Trial:
    """Send a signal to a run, and resume the run."""
    moment = one.moment
    copy = Path(tempfile.mkdtemp(dir=scratch)) / "repo"
    while True:
        shutil.copytree(repo, copy)
        trial, output = hurt(copy, one.what, moment, course, striker(one.victim, one.number))
        if trial.stage != OVER:
            break
        if trial.code:
            return ended(trial, output)
        shutil.rmtree(copy)  # the run ended first: strike earlier
        moment = Moment(moment.share * 0.8, moment.stage, moment.trained)
    trial.problems += tracebacks(output)
    stopped = one.number != signal.SIGKILL and one.victim == "flow"
    failed = one.victim in ("dvc", "stage", "group")
    code = 2 if failed else 128 + one.number if stopped else -one.number
    expected_text = "error: " if failed else "Stopped" if stopped else ""
    # Ctrl-C in a terminal reaches all processes. If DVC alone gets it, DVC leaves it to its stage and continues.
    left_alone = one.number == signal.SIGINT and one.victim == "dvc" and trial.code == 0
    if (trial.code != code or expected_text not in output) and not left_alone:
        trial.problems.append(f"exit code {trial.code}, last line {output.strip().splitlines()[-1:]}")
    resume(copy, trial, expected)
    show_trial(trial)
    if not trial.problems:
        shutil.rmtree(copy.parent)
    return trial


def ended(trial: Trial, output: str) -> Trial:
    """Record that a run ended before it was disturbed: the trial fails."""
    trial.problems.append(f"ended by itself, exit code {trial.code}: {output.strip().splitlines()[-3:]}")
    show_trial(trial)
    return trial


def restart(repo: Path, scratch: Path, course: Course, expected: dict[str, object]) -> Trial:
    """Simulate a power cut in training and a restart of the machine; resume the run.

    Stale locks name process numbers that belong to other processes now. Torn files are cut to two thirds: dvc.lock,
    a checkpoint, the remembered durations.
    """
    copy = scratch / "restart"
    shutil.copytree(repo, copy)
    moment = Moment(0.5, "distill", trained=True)
    trial, output = hurt(copy, "power cut, stale notes", moment, course, striker("everything", signal.SIGKILL))
    if trial.stage == OVER or not trial.checkpoint:
        return ended(trial, output)
    another = subprocess.Popen(["sleep", "600"])  # its number stands in the stale locks
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
        trial.checkpoint = False  # a torn checkpoint is not usable
        resume(copy, trial, expected)
    finally:
        another.kill()
        another.wait()
    if trial.cached < 3:
        trial.problems.append(f"only {trial.cached} finished stages came from the cache")
    show_trial(trial)
    return trial


def locked(repo: Path, scratch: Path, course: Course, expected: dict[str, object]) -> Trial:
    """Lock mlflow.db for longer than the timeout of SQLite; the run must wait and end well."""
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
    resume(copy, trial, expected)
    show_trial(trial)
    return trial


def full_disk(repo: Path, scratch: Path, course: Course, expected: dict[str, object]) -> Trial:
    """Fill the disk in training: the run must say so, refuse to start while it is full, and resume afterwards."""
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
        for code, text, sign in ((trial.code, output, "disk is full"), (refused, again, "disk is nearly full")):
            if code != 2 or sign not in text:
                trial.problems.append(f"exit code {code}, last line {text.strip().splitlines()[-1:]}")
            trial.problems += tracebacks(text)
        (mount / "filler").unlink()
        resume(copy, trial, expected)
        show_trial(trial)
        return trial
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def show_trial(trial: Trial) -> None:
    """Print a line about a trial."""
    verdict = "; ".join(trial.problems) or "the same hashes"
    console.print(f"{trial.what} at {trial.moment:.1f} s ({trial.stage}): {verdict}", highlight=False, markup=False)


COLUMNS = ("trial", "at", "in", "exit code", "from the cache", "from a checkpoint", "second run", "result")


def row(one: Trial) -> tuple[str, ...]:
    """Return the cells of a trial."""
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
    """Summarise the trials: one sentence for kill -9 and one for the others."""
    killed = [one for one in trials if one.what.startswith("kill -9")]
    others = [one for one in trials if one not in killed]
    hit = ", ".join(f"{stage} {number}" for stage, number in sorted(Counter(one.stage for one in killed).items()))
    resumed = sum(one.resumed for one in killed)
    sentences = []
    for several, name, more in (
        (killed, "kill -9", f" ({hit}; {resumed} resumed from a checkpoint in training)"),
        (others, "other interruptions", ""),
    ):
        if several:
            good = sum(not one.problems for one in several)
            sentences.append(f"{name}: {good} of {len(several)} resume and end with the undisturbed hashes{more}")
    return ".\n".join(sentences) + "."


def show(trials: Sequence[Trial]) -> None:
    """Print all trials as a table."""
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
        f"""# Interrupted runs

{verdict(trials)}
Each trial also checks that no process survives, that no run in MLflow is RUNNING and that `exports/` holds no
partial export. The last column names every failure.

```
python -m tests.acceptance.chaos {" ".join(words)}
```

The whole pipeline with a tiny BERT as its teacher. An undisturbed run took {course.whole:.0f} s ({took}).
"Group" is DVC with its stage. "Everything" is all processes of the run, including its guardian.
{about()}; load average {", ".join(f"{load:.1f}" for load in os.getloadavg())}.

{table}
""",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments and the victims")
    parser.add_argument("--at-a-time", type=int, default=1, help="signalled runs in parallel")
    parser.add_argument("--only", action="store_true", help="run only the trials that are named here")
    for name in ("signals", "restart", "locked", "full-disk"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the trials as JSON")
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
        console.print(f"undisturbed: {course.whole:.1f} s, training after a checkpoint {course.trained:.1f} s")
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
