"""Run the cells of a sweep: make their exports, some in parallel, and measure each alone."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flows import compress as pipeline  # first: it sets what Prefect reads when it is imported

# isort: split
import psutil
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import State

from flows.crew import Crew
from flows.progress import CellProgress
from flows.study import Cell, Study
from flows.workspace import ROOM_NEEDED, FlowError, check, commit
from tasks import compare
from tasks.record import PipelineRecord
from tasks.stage import remove

ROOT = pipeline.ROOT
CELL = ("-m", "flows.cell")
FIRST_GUESS_OF_MEMORY = 4 * 2**30  # bytes of a cell, before one has been measured
_MEMORY = re.compile(r"^memory: the largest process held (\d+) MiB$", re.MULTILINE)


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


def run_cells(
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
            progress.say(job.cell, "made; waits to be measured", made=True)
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
