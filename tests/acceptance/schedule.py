"""Watch the schedule: it fires, finds nothing changed, finds new data, and promotes the new version.

    python -m tests.acceptance.schedule [--out docs/results/schedule.md]

It starts the real services (`make up`: Prefect server, worker, MLflow server) on free ports of loopback, in a scratch
repository with the real pipeline, a tiny teacher and a cron of every minute. The schedule starts every run. The gate is
open because a tiny model gains nothing. Exits with 1 if something does not happen, or if a run that finds nothing
changed takes a minute or more.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows import prefect_server, processes
from flows.serve import free_port
from tests.conftest import make_tiny_bert
from tests.texts import make_texts, write_corpus
from tests.toy import PROJECT, commit, environment, make_tiny

LIMIT = 60.0  # seconds allowed for a run that finds nothing changed
PATIENCE = 1800.0  # seconds to wait for a run
CRON = "* * * * *"
OPEN_GATE = {
    "min_retention": 0.0,
    "min_speedup": 0.0,
    "max_quality_loss": 0.99,
    "max_slowdown": 100.0,
    "max_growth": 100.0,
}
console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass(frozen=True)
class Fired:
    """Describe a finished run that the schedule started."""

    due: datetime
    started: datetime
    ended: datetime
    state: str
    message: str

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()


def make_repository(folder: Path) -> Path:
    """Make a repository of the real pipeline with a tiny teacher, an open gate and a cron of every minute."""
    make_tiny_bert(folder / "teacher")
    write_corpus(folder / "texts.jsonl", make_texts(1500))
    repo = make_tiny(folder / "repo", folder / "teacher", folder / "texts.jsonl")
    text = (repo / "params.yaml").read_text(encoding="utf-8")
    for key, value in OPEN_GATE.items():
        old = next(line for line in text.splitlines() if line.startswith(f"  {key}:"))
        text = text.replace(old, f"  {key}: {value}")
    (repo / "params.yaml").write_text(text, encoding="utf-8")
    schedule = (PROJECT / "prefect.yaml").read_text(encoding="utf-8")
    (repo / "prefect.yaml").write_text(schedule.replace('cron: "7 * * * *"', f'cron: "{CRON}"'), encoding="utf-8")
    commit(repo)
    return repo


def services(repo: Path, *arguments: str) -> str:
    """Run `python -m flows.service` in that repository; RuntimeError with its output if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.service", *arguments], cwd=repo, env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


def fired(after: datetime | None) -> list[Fired]:
    """Return the finished runs that the schedule started after that moment, oldest first."""
    with prefect_server.prefect_client() as client:
        runs = [run for run in client.read_flow_runs(limit=200) if run.auto_scheduled and run.state.is_final()]
    found = [
        Fired(run.expected_start_time, run.start_time, run.end_time, run.state_name, run.state.message or "")
        for run in runs
        if run.start_time is not None and (after is None or run.start_time > after)
    ]
    return sorted(found, key=lambda run: run.started)


def wait_for(state: str, after: datetime | None) -> Fired:
    """Return the first run after that moment that ends in this state. RuntimeError if a run fails or none comes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for run in fired(after):
            if run.state not in ("Cached", "Completed"):
                raise RuntimeError(f"a scheduled run ended as {run.state}: {run.message}")
            if run.state == state:
                return run
        time.sleep(1)
    raise RuntimeError(f"no scheduled run has ended as {state} within {PATIENCE:.0f} s")


def champion(repo: Path) -> int | None:
    """Return the version that is champion, as the MLflow server knows it."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(processes.running(repo)["mlflow"].address)
    try:
        return int(client.get_model_version_by_alias("tiny", "champion").version)
    except MlflowException:
        return None


def watch(repo: Path) -> list[tuple[str, Fired, int | None]]:
    """Return for each action the run that followed and the champion afterwards."""
    seen: list[tuple[str, Fired, int | None]] = []

    def see(what: str, state: str, after: datetime | None) -> Fired:
        run = wait_for(state, after)
        seen.append((what, run, champion(repo)))
        console.print(f"{what}: {run.state} in {run.seconds:.1f} s: {run.message}", highlight=False, markup=False)
        return run

    first = see("nothing: the first time", "Completed", None)
    second = see("nothing", "Cached", first.ended)
    third = see("nothing, again", "Cached", second.ended)
    write_corpus(repo.parent / "texts.jsonl", make_texts(1500, seed=1))
    fourth = see("new texts in the watched file", "Completed", third.ended)
    see("nothing", "Cached", fourth.ended)
    return seen


def page(seen: Sequence[tuple[str, Fired, int | None]], load: float) -> str:
    """Return the page docs/results/schedule.md."""
    rows = "\n".join(
        f"| {what} | {run.due:%H:%M:%S} | {(run.started - run.due).total_seconds():.1f} s | {run.state} | "
        f"{run.seconds:.1f} s | {f'version {version}' if version else 'none'} |"
        for what, run, version in seen
    )
    messages = "\n".join(f"- {what}: *{run.message}*" for what, run, _ in seen)
    cached = [run.seconds for _, run, _ in seen if run.state == "Cached"]
    return f"""# The schedule

`python -m tests.acceptance.schedule`, on {os.cpu_count()} CPUs ({platform.machine()}), load average {load:.1f}
at the start. The services of `make up` run the real pipeline of ten stages on a tiny teacher
in a scratch repository. The cron is
`{CRON}`. The schedule started all runs.

| action before | due (UTC) | started after | state | took | champion afterwards |
|---|---|---|---|---|---|
{rows}

A run that finds nothing changed takes {max(cached):.1f} s at most, of {LIMIT:.0f} s allowed. A run starts late if
the run before it has not ended: a workspace holds one run.

Messages of the runs:

{messages}
"""


def problems(seen: Sequence[tuple[str, Fired, int | None]]) -> list[str]:
    """Return one line for each requirement that is not met."""
    slow = [run.seconds for _, run, _ in seen if run.state == "Cached" and run.seconds >= LIMIT]
    found = [f"a run that found nothing changed took {seconds:.0f} s" for seconds in slow]
    versions = [version for _, _, version in seen]
    if versions != [1, 1, 1, 2, 2]:
        found.append(f"the champion went {versions}, not from version 1 to version 2 by the new texts")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PROJECT / "docs/results/schedule.md")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ffn2moe-schedule-") as scratch:
        repo = make_repository(Path(scratch))
        try:
            ports = (f"--{name}-port={free_port()}" for name in ("prefect", "mlflow"))
            console.print(services(repo, "up", *ports), highlight=False)
            os.environ["PREFECT_API_URL"] = str(processes.api(repo))
            seen = watch(repo)
        finally:
            services(repo, "down")
    table = Table("before", "state", "took", "champion", box=None)
    for what, run, version in seen:
        table.add_row(what, run.state, f"{run.seconds:.1f} s", str(version))
    console.print(table)
    options.out.write_text(page(seen, load), encoding="utf-8")
    console.print(f"written: {options.out}")
    for problem in (found := problems(seen)):
        console.print(f"error: {problem}", style="red", markup=False)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
