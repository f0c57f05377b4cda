"""Run many settings side by side, and find those on the Pareto front of quality and speed.

    python -m flows.sweep run decompose.num_experts=4,8 decompose.num_active=1,2    every combination
    python -m flows.sweep run distill.learning_rate=1e-4..1e-2 --search 12           proposals of a search
    python -m flows.sweep cells                                                      what ran, when and how often
    python -m flows.sweep show                                                       the Pareto front again
    python -m flows.sweep best --keeps 0.99                                          the fastest that keeps 99 %
    python -m flows.sweep run --recipes recipes/encoder.yaml --seeds 0,1,2           a front: recipes, each with seeds
    python -m flows.sweep publish                                                    the front into docs/results

Each cell runs in its own workspace; all share the cache of DVC. A cell is timed alone, and at the end one interleaved
session times the plans of all cells again. The same command resumes a stopped sweep.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flows import compress as pipeline  # first: it sets what Prefect reads when it is imported

# isort: split
import psutil
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner

from ffn2moe.progress import Heartbeat
from flows import sweep_report
from flows.axes import EXAMPLE, parse
from flows.crew import Crew
from flows.errors import STOPPED, report
from flows.guardian import guard
from flows.progress import CellProgress
from flows.recipes import RECIPE, axes_of, read_recipes
from flows.study import Cell, Study
from flows.sweep_compare import compare_cells, log_front
from flows.sweep_front import compare_front
from flows.workspace import ROOM_NEEDED, FlowError, check, commit
from tasks import compare
from tasks.params import load_params
from tasks.record import PipelineRecord
from tasks.stage import remove

ROOT = pipeline.ROOT
CELL = ("-m", "flows.cell")
COMPARE = ("-m", "tasks.compare")
JUDGE = ("-m", "tasks.judge_plans")
FIRST_GUESS_OF_MEMORY = 4 * 2**30  # bytes of a cell, before one has been measured
PATIENCE = 30.0  # seconds for the processes of a killed sweep to end
_MEMORY = re.compile(r"^memory: the largest process held (\d+) MiB$", re.MULTILINE)
console = sweep_report.console


@dataclass
class Job:
    """Hold a cell, its file and its run record."""

    cell: Cell
    file: Path
    record: PipelineRecord
    environment: dict[str, str]


@task(task_run_name="make {name}", cache_policy=NO_CACHE, persist_result=False)
def make(name: str, job: Job, crew: Crew, done: queue.Queue[Job]) -> None:
    """Make the export of a cell, in parallel with others."""
    get_run_logger().info(job.cell.label)
    try:
        crew.run((*CELL, "make", str(job.file)), job.file.with_name("log.txt"), job.environment)
    finally:
        done.put(job)


@task(task_run_name="measure {name}", cache_policy=NO_CACHE, persist_result=False)
def measure(name: str, job: Job, crew: Crew) -> None:
    """Time a cell while nothing else runs."""
    crew.run((*CELL, "measure", str(job.file)), job.file.with_name("log.txt"), job.environment)


@task(task_run_name="compare", cache_policy=NO_CACHE, persist_result=False)
def time_side_by_side(session: Path, out: Path, crew: Crew) -> None:
    """Time the plans of all cells in one interleaved session."""
    crew.run((*COMPARE, str(session), str(out)), session.with_name("session.txt"), {})


@task(task_run_name="judge", cache_policy=NO_CACHE, persist_result=False)
def judge_plans(job: Path, out: Path, crew: Crew) -> None:
    """Judge some plans of a cell by everything that judges its model."""
    crew.run((*JUDGE, str(job), str(out)), job.with_name("log.txt"), {})


@flow(name="sweep", persist_result=False, log_prints=False)
def sweep(
    keys: list[str],
    name: str,
    search: int | None = None,
    at_a_time: int | None = None,
    called_from: str | None = None,
    recipes: dict[str, list[str]] | None = None,
) -> list[dict[str, Any]]:
    """Run every cell that has not run, compare all, and return the points of the Pareto front.

    keys: KEY=VALUE,VALUE,... or, for a search, KEY=LOW..HIGH. search: number of cells to try; None runs a grid.
    at_a_time: cells in parallel; None: two if memory allows. recipes: name -> settings; every one runs with all `keys`,
    and the end is a front. FlowError with cause and remedy.
    """
    check(ROOT)
    axes = parse(keys) | ({RECIPE: tuple(recipes)} if recipes else {})
    with ExitStack() as stack:
        study = Study(ROOT, name, axes, search, Path(called_from or ROOT), recipes)
        crew = Crew(ROOT)
        stack.enter_context(_alone(study, crew))
        record = _record(study)
        try:
            with CellProgress(study, console) as progress:
                _run(study, at_a_time, crew, record, progress)
            console.print("comparing the plans of all cells in one interleaved session")
            with nullcontext() if console.is_terminal else Heartbeat(_still):
                found = _compared(study, crew)
            log_front(study, ROOT, found, record)
        except Exception as error:
            crew.stop()
            record.finish("FAILED", str(error))
            raise
        except BaseException:  # Ctrl-C, SIGTERM
            crew.stop()
            record.finish("KILLED")
            raise
        record.finish("FINISHED")
    sweep_report.show(ROOT, study.folder)
    return [row for row in found if row["on_front"]]


def _compared(study: Study, crew: Crew) -> list[dict[str, Any]]:
    """Compare all cells: plans of a sweep, or the recipes of a front."""

    def time(session: Path, out: Path) -> None:
        time_side_by_side(session, out, crew)

    def judge(job: Path, out: Path) -> None:
        judge_plans(job, out, crew)

    if not study.recipes:
        return compare_cells(study, ROOT, time)
    return compare_front(study, ROOT, time, judge, console.print)


def _still(seconds: float) -> None:
    console.print(f"comparing the plans: {seconds:.0f} s")


@contextmanager
def _alone(study: Study, crew: Crew) -> Iterator[None]:
    """Let one process work on a sweep; FlowError if another one does.

    Its cells inherit the lock: after a kill, the next sweep waits until the guardian has ended them.
    """
    with (study.folder / "lock").open("a+") as stream:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().strip()
                if (holder.isdigit() and psutil.pid_exists(int(holder))) or time.monotonic() > deadline:
                    raise FlowError(
                        f"the sweep {study.name} runs already (process {holder}); wait for it, stop it "
                        f"(kill {holder}), or start another one: --name another"
                    ) from None
                time.sleep(0.2)
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        crew.lock = stream.fileno()
        yield


def _run(
    study: Study,
    at_a_time: int | None,
    crew: Crew,
    record: PipelineRecord,
    progress: CellProgress,
) -> None:
    """Make the cells, some in parallel, and measure each alone.

    A grid makes all cells first. A search measures after every few cells, because it learns from their figures.
    """
    for cell in (unfinished := study.unfinished()):
        progress.say(cell, "resumes")
    cells = _cells(study, unfinished)
    while made := _make(study, cells, at_a_time, crew, record, progress):
        for job in made:
            with progress.beating(job.cell):
                _measure(study, job, crew, progress)


def _cells(study: Study, unfinished: Sequence[Cell]) -> Iterator[Cell]:
    yield from unfinished
    while cell := study.take():
        yield cell


def _make(
    study: Study,
    cells: Iterator[Cell],
    at_a_time: int | None,
    crew: Crew,
    record: PipelineRecord,
    progress: CellProgress,
) -> list[Job]:
    """Make the exports of the next cells; return the jobs that succeeded."""
    done: queue.Queue[Job] = queue.Queue()
    running: dict[int, Any] = {}
    made: list[Job] = []
    wave = cells if study.search is None else islice(cells, at_a_time or 2)
    waiting = next(wave, None)
    while waiting or running:
        while waiting and len(running) < (at_a_time or _fit(study, len(running))):
            _require_room(study)
            job = _job(study, waiting, record)
            if study.noted(waiting, "made"):  # by an earlier process
                made.append(job)
                waiting = next(wave, None)
                continue
            progress.say(waiting, f"runs, {job.file.with_name('log.txt').relative_to(ROOT)}")
            study.begin(waiting, "make")
            running[waiting.number] = make.submit(waiting.name, job, crew, done)
            waiting = next(wave, None)
        if not running:
            break
        with progress.beating():
            job = done.get()
        future = running.pop(job.cell.number)
        future.wait()
        if future.state.is_completed():
            study.note(job.cell, made=True)
            made.append(job)
            progress.say(job.cell, "made; waits to be measured")
        else:
            _failed(study, job, future.state, progress)
    return made


def _measure(study: Study, job: Job, crew: Crew, progress: CellProgress) -> None:
    cell = job.cell
    study.begin(cell, "measure")
    state = measure(cell.name, job, crew, return_state=True)
    if not state.is_completed():
        return _failed(study, job, state, progress)
    export = ROOT / "exports" / cell.name
    params = study.params(cell)
    found = compare.points(cell.number, export)
    if not found:
        return _end_badly(study, job, "the export has no plan of a mixture", progress)
    point = compare.cheapest_of(found, params.gate.min_retention) or max(found, key=lambda one: one.kept)
    log = job.file.with_name("log.txt").read_text(encoding="utf-8", errors="replace")
    study.note(
        cell,
        mebibytes=max(map(int, _MEMORY.findall(log)), default=0),
        room=sum(path.stat().st_size for path in export.rglob("*") if path.is_file()),
    )
    workspace = ROOT / ".workspaces" / cell.name
    if workspace.is_dir():
        job.record.log(workspace, params, {}, {"export": f"exports/{cell.name}"})
        remove(workspace)
    job.record.finish("FINISHED")
    study.finish(cell, point.kept, point.vs_best_dense)
    progress.say(
        cell,
        f"keeps {100 * point.kept:.1f} % at {point.vs_best_dense:.2f}x of the best dense ({point.plan})",
        ended=True,
    )


def _failed(study: Study, job: Job, state: State, progress: CellProgress) -> None:
    error = state.result(raise_on_failure=False)
    if shutil.disk_usage(ROOT).free < ROOM_NEEDED:
        raise FlowError(f"no room: {error}; make room (`dvc gc -w` keeps this workspace's results only) and run again")
    _end_badly(study, job, str(error), progress)


def _end_badly(study: Study, job: Job, reason: str, progress: CellProgress) -> None:
    study.fail(job.cell, reason)
    job.record.finish("FAILED", reason)
    remove(ROOT / ".workspaces" / job.cell.name)  # finished stages stay in the cache of DVC
    progress.say(job.cell, f"failed: {reason}", ended=True)


def _fit(study: Study, running: int) -> int:
    """Return how many cells may run in parallel: two if the free memory holds one more like the largest so far."""
    seen = [study.noted(cell, "mebibytes") or 0 for cell in study.finished()]
    needed = max(seen) * 2**20 if any(seen) else FIRST_GUESS_OF_MEMORY
    # A cell that has just started does not hold its memory yet.
    free = psutil.virtual_memory().available
    return 2 if free >= (2 if running == 1 and not seen else 1) * needed else 1


def _require_room(study: Study) -> None:
    """Raise FlowError if the disk has no room for one more cell like the largest so far."""
    check(ROOT)
    taken = max((study.noted(cell, "room") or 0 for cell in study.finished()), default=0)
    free = shutil.disk_usage(ROOT).free
    if free < ROOM_NEEDED + 2 * taken:  # once in exports, once in the cache of DVC
        raise FlowError(
            f"no room for another cell: it takes about {2 * taken / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
            "make room (remove exports you do not need, `dvc gc -w`) and run again: finished cells are kept"
        )


def _job(study: Study, cell: Cell, record: PipelineRecord) -> Job:
    folder = study.folder / f"{cell.number:03}"
    folder.mkdir(exist_ok=True)
    own = _own_record(study, cell, record)
    file = folder / "job.json"
    file.write_text(
        json.dumps(
            {
                "source": str(ROOT),
                "record": str(folder),
                "settings": cell.settings,
                "called_from": str(study.called_from),
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    threads = str(max(1, len(psutil.Process().cpu_affinity()) // 2))  # two cells share the cores
    quiet = {key: os.environ.get(key, threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return Job(cell, file, own, {**own.environment(), **quiet})


def _record(study: Study) -> PipelineRecord:
    """Return the run of the sweep in MLflow: the earlier one, or a new one."""
    path = study.folder / "run"
    if path.is_file() and (earlier := PipelineRecord.resume(ROOT, path.read_text().strip())):
        return earlier
    head, dirty = commit(ROOT)
    tags = {"sweep": study.name, "git.commit": head, "git.dirty": str(dirty).lower()}
    record = PipelineRecord.start(ROOT, study.name, tags)
    path.write_text(record.run_id + "\n")
    return record


def _own_record(study: Study, cell: Cell, record: PipelineRecord) -> PipelineRecord:
    """Return the run of a cell, nested under the run of the sweep."""
    known = study.noted(cell, "run")
    if known and (earlier := PipelineRecord.resume(ROOT, known)):
        return earlier
    head, dirty = commit(ROOT)
    tags = {
        "mlflow.parentRunId": record.run_id,
        "sweep": study.name,
        "settings": " ".join(cell.settings),
        "git.commit": head,
        "git.dirty": str(dirty).lower(),
    }
    own = PipelineRecord.start(ROOT, cell.name, tags)
    study.note(cell, run=own.run_id)
    return own


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.sweep",
        description="Many settings side by side, each in a workspace of its own; ends in a Pareto front.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the cells that have not run, and compare all")
    run.add_argument("keys", nargs="*", metavar="KEY=VALUE,VALUE,...", help=f"for example {EXAMPLE}")
    run.add_argument("--name", help="name of the sweep, its exports and its runs (default: from its values)")
    run.add_argument(
        "--recipes", type=Path, metavar="FILE", help="compare a table of named settings: recipes/encoder.yaml"
    )
    run.add_argument("--seeds", default="0,1,2", help="seeds of each recipe (default: 0,1,2)")
    run.add_argument("--search", type=int, metavar="CELLS", help="let a search propose this number of cells")
    run.add_argument("--at-a-time", type=int, metavar="N", help="cells in parallel (default: 2 if memory allows)")
    for name, text in (
        ("cells", "print what ran, when and how often"),
        ("show", "print the Pareto front"),
        ("best", "print the fastest that keeps a share of the quality, or the best that is so fast"),
        ("publish", "write a front into docs/results: its points, its page and its picture"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("name", nargs="?", help="name of a sweep (default: the one that ended last)")
        if name == "best":
            target = one.add_mutually_exclusive_group()
            target.add_argument("--keeps", type=float, help="share of the teacher's quality (default 0.99)")
            target.add_argument("--speedup", type=float, help="speed over the best dense plan")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stopped)
    signal.signal(signal.SIGINT, _stopped)
    try:
        if options.command == "cells":
            sweep_report.cells(sweep_report.folder_of(ROOT, options.name))
        elif options.command == "show":
            sweep_report.show(ROOT, sweep_report.folder_of(ROOT, options.name))
        elif options.command == "best":
            keeps = 0.99 if options.keeps is None and options.speedup is None else options.keeps
            if keeps is not None and not 0 < keeps <= 2:
                raise FlowError(f"--keeps {keeps:g} is not a share; write 0.99 for 99 %")
            if options.speedup is not None and not options.speedup > 0:
                raise FlowError(f"--speedup {options.speedup:g} is not a speed; write 2 for twice the best dense plan")
            sweep_report.best(ROOT, sweep_report.folder_of(ROOT, options.name), keeps=keeps, speedup=options.speedup)
        elif options.command == "publish":
            sweep_report.publish(ROOT, sweep_report.folder_of(ROOT, options.name))
        else:
            _begin(options)
        return 0
    except Exception as error:
        return report(error)


def _begin(options: argparse.Namespace) -> None:
    for key, value in (("--search", options.search), ("--at-a-time", options.at_a_time)):
        if value is not None and value < 1:
            raise FlowError(f"{key} {value}: must be at least 1")
    recipes, keys = _recipes(options) if options.recipes else (None, options.keys)
    if not keys:
        raise FlowError(f"the grid is empty: name at least one key with several values, for example {EXAMPLE}")
    check(ROOT)
    raw = load_params(ROOT / "params.yaml")
    values = json.dumps([sorted(keys), options.search is None, raw.flat()], default=str)
    usual = f"{raw.name}-front" if recipes else f"{raw.name}-sweep-{zlib.crc32(values.encode()):08x}"
    name = options.name or usual
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,50}", name):
        raise FlowError(
            f"--name {name}: use at most 51 letters, digits, '.', '_' or '-', and begin with a letter or digit"
        )
    parse(keys)
    _guardian = guard(ROOT)  # keep it: it acts when this end of its pipe closes
    sweep.with_options(task_runner=ThreadPoolTaskRunner(max_workers=(options.at_a_time or 2) + 1))(
        keys=keys,
        name=name,
        search=options.search,
        at_a_time=options.at_a_time,
        called_from=str(Path.cwd()),
        recipes=recipes,
    )


def _recipes(options: argparse.Namespace) -> tuple[dict[str, list[str]], list[str]]:
    """Return the recipes of the command line, and the keys that all of them run with."""
    if options.search is not None:
        raise FlowError("--recipes and --search exclude each other: a front runs every recipe with every seed")
    recipes, common = read_recipes(options.recipes)
    axes = axes_of(recipes, common, options.seeds, options.keys)
    keys = [f"{key}={','.join(axis)}" for key, axis in axes.items() if key != RECIPE and isinstance(axis, tuple)]
    return {name: list(settings) for name, settings in recipes.items()}, keys


def _stopped(number: int, frame: object) -> None:
    """End the sweep on Ctrl-C and SIGTERM, and this process for certain a little later.

    At its end Prefect waits for a server that the same signal may have stopped. By then everything is written.
    """
    console.print(STOPPED)
    end = threading.Timer(PATIENCE, os._exit, (128 + number,))
    end.daemon = True
    end.start()
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
