"""Many settings side by side: what each keeps of the teacher, how fast it is, and which of them are worth having.

    python -m flows.sweep run decompose.num_experts=4,8 decompose.num_active=1,2    every combination
    python -m flows.sweep run distill.learning_rate=1e-4..1e-2 --search 12           what a search proposes
    python -m flows.sweep cells                                                      what ran, when and how often
    python -m flows.sweep show                                                       the Pareto front again
    python -m flows.sweep best --keeps 0.99                                          the fastest that keeps 99 %

Each cell runs in a workspace of its own with the DVC cache shared; what times it runs alone, and at the end the plans
of all cells are timed once more in one interleaved session. A stopped sweep goes on where it was: the same command.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from flows import compress as pipeline  # first: it tells Prefect to be quiet before Prefect is imported

# isort: split
import psutil
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flows import study as studies
from flows.guardian import guard
from flows.study import Cell, Study
from flows.workspace import ROOM_NEEDED, FlowError, check, commit
from tasks import compare
from tasks.params import Params, load_params
from tasks.record import PipelineRecord
from tasks.stage import clock, explain, remove
from tasks.store import default_tracking_uri, without_password

ROOT = pipeline.ROOT
CELL = ("-m", "flows.cell")
COMPARE = ("-m", "tasks.compare")
# Of a cell, before any of this sweep has been measured: bytes, with room to spare for a small encoder.
FIRST_GUESS_OF_MEMORY = 4 * 2**30
PATIENCE = 30.0  # seconds for what a killed sweep has left to end
_STOPPED = "stopped; what is finished is kept, and the same command goes on from there"
_MEMORY = re.compile(r"^memory: the largest process held (\d+) MiB$", re.MULTILINE)
console = pipeline.console


class Crew:
    """The processes that work on cells: started from threads, and all stopped from the main one."""

    def __init__(self) -> None:
        self.lock: int | None = None  # of the sweep: free again when all of these processes are gone
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Runs a command of this Python to its end; FlowError with the last thing it said if that is no good one."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            with self._lock:
                if self._stopped:
                    raise FlowError("stopped")
                begin = stream.tell()
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # stopped by us only, and then as a group
                    pass_fds=() if self.lock is None else (self.lock,),
                )
                self._processes.add(process)
            try:
                code = process.wait()
            finally:
                self._processes.discard(process)
        if code:
            with log.open("rb") as stream:
                stream.seek(begin)
                said = stream.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            told = said[0].removeprefix("error: ") if said else ""
            killed = f"killed by signal {-code}; if nobody did it, memory ran out" if code < 0 else ""
            raise FlowError(killed or told or f"ended with code {code} and said nothing")

    def stop(self) -> None:
        """Ends all that is under way, and lets nothing more begin."""
        with self._lock:
            self._stopped = True
            left = list(self._processes)
        for process in left:
            process.terminate()  # a cell stops what it has started, which takes a few seconds
        deadline = time.monotonic() + 15
        for process in left:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Job:
    """A cell, and where it is recorded."""

    cell: Cell
    file: Path
    record: PipelineRecord
    environment: dict[str, str]


@task(task_run_name="make {name}", cache_policy=NO_CACHE, persist_result=False)
def make(name: str, job: Job, crew: Crew, done: queue.Queue[Job]) -> None:
    """Brings a cell to its export, beside others."""
    get_run_logger().info(job.cell.label)
    try:
        crew.run((*CELL, "make", str(job.file)), job.file.with_name("log.txt"), job.environment)
    finally:
        done.put(job)


@task(task_run_name="measure {name}", cache_policy=NO_CACHE, persist_result=False)
def measure(name: str, job: Job, crew: Crew) -> None:
    """Times a cell, alone."""
    crew.run((*CELL, "measure", str(job.file)), job.file.with_name("log.txt"), job.environment)


@task(task_run_name="compare", cache_policy=NO_CACHE, persist_result=False)
def time_side_by_side(session: Path, out: Path, crew: Crew) -> None:
    """One interleaved session over the plans of all cells, alone."""
    crew.run((*COMPARE, str(session), str(out)), session.with_name("session.txt"), {})


class Progressing:
    """How far a sweep is: a bar on a terminal, a line for each cell anywhere."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._seconds: list[float] = []
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("cells", total=None)

    def __enter__(self) -> Progressing:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def tell(self, cell: Cell, text: str, *, ended: bool = False) -> None:
        """A line about a cell; `ended` if there is nothing left to do for it."""
        if ended:
            self._seconds.append(time.monotonic())
        left = self._left()
        console.print(
            f"cell {cell.number:>3}  {cell.label}: {text}" + (f"; {left}" if left else ""),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        if self._bar:
            remaining = self._study.remaining()
            ended_all = len(self._study.finished()) + len(self._study.failed())
            self._bar.update(self._task, completed=ended_all, total=ended_all + remaining, description=left or "cells")

    def _left(self) -> str:
        """From how long the cells of this sitting have taken, two at a time or not."""
        remaining = self._study.remaining()
        if not self._seconds or not remaining:
            return ""
        pace = (self._seconds[-1] - self._began) / len(self._seconds)
        return f"{remaining} to go, about {clock(pace * remaining)} left"


@flow(name="sweep", persist_result=False, log_prints=False)
def sweep(
    keys: list[str],
    name: str,
    search: int | None = None,
    at_a_time: int | None = None,
    called_from: str | None = None,
) -> list[dict[str, Any]]:
    """Runs every cell that has not run, compares all, and returns the points of the Pareto front.

    keys: KEY=VALUE,VALUE,... or, for a search, KEY=LOW..HIGH. search: how many cells a search tries; None is a grid.
    at_a_time: cells beside each other; None: two where memory allows. Raises FlowError with cause and remedy.
    """
    check(ROOT)
    axes = studies.parse(keys)
    with ExitStack() as stack:
        study = Study(ROOT, name, axes, search, Path(called_from or ROOT))
        crew = Crew()
        stack.enter_context(_alone(study, crew))
        record = _record(study)
        try:
            with Progressing(study) as progress:
                _run(study, at_a_time, crew, record, progress)
            console.print("comparing: the plans of all cells in one interleaved session, alone")
            found = _compare(study, crew)
            _log(study, found, record)
        except Exception as error:
            crew.stop()
            record.finish("FAILED", str(error))
            raise
        except BaseException:  # Ctrl-C, SIGTERM
            crew.stop()
            record.finish("KILLED")
            raise
        record.finish("FINISHED")
    show(study.folder)
    return [row for row in found if row["on_front"]]


@contextmanager
def _alone(study: Study, crew: Crew) -> Iterator[None]:
    """One process works on a sweep; FlowError if there is one already.

    Its cells inherit the lock: after a kill, the next waits until the guardian has ended what was left of them.
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
                        f"the sweep {study.name} is under way (process {holder}); wait for it, stop it "
                        f"(kill {holder}), or begin another beside it: --name another"
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
    progress: Progressing,
) -> None:
    """Makes the cells, some beside each other, and measures each alone.

    All of a grid is made first. A search waits after each few cells for their figures, which it goes on from.
    """
    for cell in (unfinished := study.unfinished()):
        progress.tell(cell, "goes on")
    cells = _cells(study, unfinished)
    while made := _make(study, cells, at_a_time, crew, record, progress):
        for job in made:
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
    progress: Progressing,
) -> list[Job]:
    """Brings the next cells to their exports; the jobs of those that got there."""
    done: queue.Queue[Job] = queue.Queue()
    running: dict[int, Any] = {}
    made: list[Job] = []
    wave = cells if study.search is None else islice(cells, at_a_time or 2)
    waiting = next(wave, None)
    while waiting or running:
        while waiting and len(running) < (at_a_time or _fit(study, len(running))):
            _require_room(study)
            job = _job(study, waiting, record)
            if study.noted(waiting, "made"):  # before the sweep was stopped
                made.append(job)
                waiting = next(wave, None)
                continue
            progress.tell(waiting, f"runs, {job.file.with_name('log.txt').relative_to(ROOT)}")
            study.begin(waiting, "make")
            running[waiting.number] = make.submit(waiting.name, job, crew, done)
            waiting = next(wave, None)
        if not running:
            break
        job = done.get()
        future = running.pop(job.cell.number)
        future.wait()
        if future.state.is_completed():
            study.note(job.cell, made=True)
            made.append(job)
            progress.tell(job.cell, "made; measured when the others are")
        else:
            _failed(study, job, future.state, progress)
    return made


def _measure(study: Study, job: Job, crew: Crew, progress: Progressing) -> None:
    cell = job.cell
    study.begin(cell, "measure")
    state = measure(cell.name, job, crew, return_state=True)
    if not state.is_completed():
        return _failed(study, job, state, progress)
    export = ROOT / "exports" / cell.name
    params = study.params(cell)
    found = compare.points(cell.number, export)
    if not found:
        return _end_badly(study, job, "the export holds no plan of a mixture", progress)
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
    progress.tell(
        cell,
        f"keeps {100 * point.kept:.1f} % at {point.vs_best_dense:.2f}x of the best dense ({point.plan})",
        ended=True,
    )


def _failed(study: Study, job: Job, state: State, progress: Progressing) -> None:
    error = state.result(raise_on_failure=False)
    if shutil.disk_usage(ROOT).free < ROOM_NEEDED:
        raise FlowError(f"no room: {error}; make room (`dvc gc -w` keeps this workspace's results only) and run again")
    _end_badly(study, job, str(error), progress)


def _end_badly(study: Study, job: Job, reason: str, progress: Progressing) -> None:
    study.fail(job.cell, reason)
    job.record.finish("FAILED", reason)
    remove(ROOT / ".workspaces" / job.cell.name)  # nothing goes on from here; finished stages are in DVC's cache
    progress.tell(job.cell, f"failed: {reason}", ended=True)


def _fit(study: Study, running: int) -> int:
    """Cells that may be under way at a time: two if what is free now holds one more, by what others have needed."""
    seen = [study.noted(cell, "mebibytes") or 0 for cell in study.finished()]
    needed = max(seen) * 2**20 if any(seen) else FIRST_GUESS_OF_MEMORY
    # One that has only just begun has not yet taken its part.
    free = psutil.virtual_memory().available
    return 2 if free >= (2 if running == 1 and not seen else 1) * needed else 1


def _require_room(study: Study) -> None:
    """FlowError where the disk has no room for one more cell, by what the largest has taken."""
    check(ROOT)
    taken = max((study.noted(cell, "room") or 0 for cell in study.finished()), default=0)
    free = shutil.disk_usage(ROOT).free
    if free < ROOM_NEEDED + 2 * taken:  # once in exports, once in DVC's cache
        raise FlowError(
            f"no room for another cell: it takes about {2 * taken / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
            "make room (remove exports you do not need, `dvc gc -w`) and run again: what is finished is kept"
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
    """The sweep's run in MLflow: the one it had, or a new one."""
    path = study.folder / "run"
    if path.is_file() and (earlier := PipelineRecord.resume(ROOT, path.read_text().strip())):
        return earlier
    head, dirty = commit(ROOT)
    tags = {"sweep": study.name, "git.commit": head, "git.dirty": str(dirty).lower()}
    record = PipelineRecord.start(ROOT, study.name, tags)
    path.write_text(record.run_id + "\n")
    return record


def _own_record(study: Study, cell: Cell, record: PipelineRecord) -> PipelineRecord:
    """A cell's run, nested under the sweep's."""
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


def _compare(study: Study, crew: Crew) -> list[dict[str, Any]]:
    """The points of all cells with speeds from one session, as rows; in points.csv, results.json and front.png too."""
    cells = study.finished()
    if not cells:
        raise FlowError("no cell came to anything; " + "; ".join(_without_figures(study)[:3]))
    found: list[compare.Point] = []
    # Cells with one teacher share its dense plans; another teacher has its own, in a session of its own.
    by_teacher = sorted(cells, key=lambda cell: str(study.params(cell).teacher))
    for number, (_, group) in enumerate(groupby(by_teacher, key=lambda cell: str(study.params(cell).teacher))):
        for part, several in enumerate(_in_memory(list(group))):
            found += _session(study, several, study.folder / f"session-{number}-{part}.json", crew)
    best = compare.best_of(found)
    labels = {cell.number: cell.label for cell in cells}
    rows = [
        {
            "on_front": point in best,
            **{key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(point).items()},
            "settings": labels[point.cell],
            "export": f"exports/{study.name}-{point.cell:03}",
        }
        for point in sorted(found, key=lambda point: (-point.kept, -point.vs_best_dense))
    ]
    _write_csv(study.folder / "points.csv", rows)
    _write_csv(study.folder / "cells.csv", studies.history(study.folder))
    params = study.params(cells[0])
    batch, sequence, threads = *_shape(params), params.benchmark.threads[0]
    title = f"{study.name}: quality against speed at {batch} × {sequence} tokens, {threads} thread{'s'[: threads - 1]}"
    compare.draw(found, labels, params.gate.min_retention, title, study.folder / "front.png")
    results = {"points": rows, "without_figures": _without_figures(study)}
    (study.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return rows


def _without_figures(study: Study) -> list[str]:
    """A line for each cell that failed or was left out, with the reason."""
    return [
        f"cell {cell.number}  {cell.label}: {word}: {reason}"
        for word, cells in (("failed", study.failed()), ("left out", study.left_out()))
        for cell, reason in cells
    ]


def _in_memory(cells: list[Cell]) -> list[list[Cell]]:
    """As many cells a session as memory holds open at a time, by the size of their graphs; all of them, mostly."""
    sizes = [sum(path.stat().st_size for path in (ROOT / "exports" / cell.name).rglob("*.onnx*")) for cell in cells]
    # What a session holds is up to twice its file, while it is opened.
    at_once = max(1, int(psutil.virtual_memory().available / 2 / max(1, 2 * max(sizes))))
    return [cells[start : start + at_once] for start in range(0, len(cells), at_once)]


def _session(study: Study, cells: list[Cell], path: Path, crew: Crew) -> list[compare.Point]:
    """The points of some cells, timed in turn within each round beside the dense plans of their teacher.

    Of each cell those plans that none of its own beats. A session of the same plans that is there is not repeated.
    """
    params = study.params(cells[0])
    first = ROOT / "exports" / cells[0].name
    own = {
        f"{point.cell}:{point.plan}": point
        for cell in cells
        for point in compare.best_of(compare.points(cell.number, ROOT / "exports" / cell.name))
    }
    job = {
        "texts": str(study.folder / f"{cells[0].number:03}" / "texts.jsonl"),
        "exports": {plan: [str(first), plan] for plan in compare.dense_plans(first, params.gate.min_retention)}
        | {label: [str(ROOT / "exports" / f"{study.name}-{one.cell:03}"), one.plan] for label, one in own.items()},
        "shape": _shape(params),
        "threads": params.benchmark.threads[0],
        "rounds": params.benchmark.rounds,
        "decode_tokens": params.benchmark.decode_tokens,
    }
    out, text = path.with_suffix(".timings.json"), json.dumps(job, indent=2) + "\n"
    if not (out.is_file() and path.is_file() and path.read_text(encoding="utf-8") == text):
        out.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        time_side_by_side(path, out, crew)
    rows = {row["plan"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    return [
        compare.Point(
            one.cell,
            one.plan,
            one.kept,
            rows[label]["speedup_vs_best_dense"],
            rows[label]["speedup_vs_dense"],
            rows[label]["median_ms"],
        )
        for label, one in own.items()
    ]


def _shape(params: Params) -> list[int]:
    """The batch and sequence that decide: the largest."""
    return [int(size) for size in max(params.benchmark.shapes, key=lambda shape: shape[0] * shape[1])[:2]]


def _log(study: Study, rows: Sequence[Mapping[str, Any]], record: PipelineRecord) -> None:
    """The front in the run record: the picture and the table in the sweep's run, its figures in each cell's."""
    front = [row for row in rows if row["on_front"]]
    record.add(
        {
            "cells.finished": len(study.finished()),
            "cells.failed": len(study.failed()),
            "cells.left_out": len(study.left_out()),
            "front.points": len(front),
            "front.most_kept": max(row["kept"] for row in front),
            "front.fastest": max(row["vs_best_dense"] for row in front),
        },
        [study.folder / name for name in ("front.png", "points.csv", "cells.csv")],
    )
    for cell in study.finished():
        own = PipelineRecord.resume(ROOT, study.noted(cell, "run"))
        if own is None:  # the database was removed since
            continue
        values = {
            f"sweep.{row['plan']}.{key}": row[key]
            for row in rows
            for key in ("kept", "vs_best_dense", "vs_dense", "median_ms")
            if row["cell"] == cell.number
        }
        on_front = any(row["on_front"] for row in rows if row["cell"] == cell.number)
        own.add(values, tags={"on_front": str(on_front).lower()})
        own.finish("FINISHED")


def show(folder: Path) -> None:
    """Prints the Pareto front of a finished sweep, and what came to nothing."""
    results = _results(folder)
    rows = results["points"]
    table = Table(title=f"{folder.name}: worth having, from the most kept to the fastest", title_justify="left")
    for heading in ("cell", "settings", "plan"):
        table.add_column(heading, overflow="fold")
    for heading in ("kept", "over best dense", "over dense", "ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["on_front"]:
            table.add_row(
                str(row["cell"]),
                row["settings"],
                row["plan"],
                f"{100 * row['kept']:.1f} %",
                f"{row['vs_best_dense']:.2f}x",
                f"{row['vs_dense']:.2f}x",
                f"{row['median_ms']:.2f}",
            )
    console.print(table)
    for line in results["without_figures"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    where = folder.relative_to(ROOT)
    console.print(f"all {len(rows)} plans: {where}/points.csv, the picture: {where}/front.png", highlight=False)
    console.print(
        f"the fastest that keeps 99 %: python -m flows.sweep best {folder.name} --keeps 0.99", highlight=False
    )
    shown = without_password(default_tracking_uri(ROOT))
    record = shown if shown.startswith("http") else f"mlflow ui --backend-store-uri {shown}"
    console.print(f"run record: {record}", highlight=False, soft_wrap=True)


def cells(folder: Path) -> None:
    """Prints what became of every cell, at any time, and writes it to cells.csv."""
    rows = studies.history(folder)
    _write_csv(folder / "cells.csv", rows)
    table = Table(title=f"{folder.name}: cells", title_justify="left")
    for heading in ("cell", "settings", "state", "made", "measured", "began (UTC)", "ended (UTC)", "stages that ran"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(str(value).removesuffix("+00:00") for value in row.values()))
    console.print(table)
    twice = [row["cell"] for row in rows if len(ran := row["stages"].split()) > len(set(ran))]
    told = f"of cells {', '.join(map(str, twice))}" if twice else "of no cell"
    again = sum(row["made"] > 1 or row["measured"] > 1 for row in rows)
    console.print(f"{again} gone on with after an interruption; a stage ran to its end twice: {told}", highlight=False)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def best(folder: Path, keeps: float) -> None:
    """Prints the cheapest cell that keeps a share of the quality: its settings, its export, how to go on with it."""
    rows = _results(folder)["points"]
    found = [compare.Point(**{key: row[key] for key in compare.Point.__dataclass_fields__}) for row in rows]
    point = compare.cheapest_of(found, keeps)
    if point is None:
        most = max(rows, key=lambda row: row["kept"])
        raise FlowError(
            f"no plan of {folder.name} keeps {100 * keeps:g} %; the most is {100 * most['kept']:.1f} % "
            f"(cell {most['cell']}, {most['settings']}, plan {most['plan']})"
        )
    row = rows[found.index(point)]
    lines = [
        f"keeps    {100 * point.kept:.1f} % of the teacher's quality",
        f"speed    {point.vs_best_dense:.2f}x the best dense plan, {point.vs_dense:.2f}x dense float32",
        f"params   {row['settings']}",
        f"export   {row['export']}, plan {point.plan}",
        f'use it   ffn2moe.open_export("{row["export"]}", "{point.plan}")',
        f'register make run SET="name={folder.name}-best {row["settings"]}"  (from the cache, up to the benchmark)',
    ]
    if point.vs_best_dense <= 1:
        lines.insert(2, "         the best dense plan is at least as fast: on this machine no mixture here is worth it")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise FlowError(
            f"{folder.relative_to(ROOT)} holds no finished sweep; give the command that began it again, and it goes on"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _folder(name: str | None) -> Path:
    """The folder of a sweep by its name, or of the one that ended last."""
    if name is not None:
        if not (ROOT / "sweeps" / name).is_dir():
            known = sorted(path.name for path in (ROOT / "sweeps").glob("*"))
            raise FlowError(f"there is no sweep {name}; there are: {', '.join(known) or 'none yet'}")
        return ROOT / "sweeps" / name
    ended = sorted((ROOT / "sweeps").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    if not ended:
        raise FlowError(f"no sweep has ended yet; begin one: python -m flows.sweep run {studies.EXAMPLE}")
    return ended[-1].parent


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.sweep",
        description="Many settings side by side, each in a workspace of its own; ends in a Pareto front.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the cells that have not run, and compare all")
    run.add_argument("keys", nargs="*", metavar="KEY=VALUE,VALUE,...", help=f"for example {studies.EXAMPLE}")
    run.add_argument("--name", help="of the sweep, its exports and its runs (default: by its values)")
    run.add_argument("--search", type=int, metavar="CELLS", help="propose so many cells instead of running them all")
    run.add_argument("--at-a-time", type=int, metavar="N", help="cells beside each other (default: 2 if memory allows)")
    for name, text in (
        ("cells", "what ran, when and how often"),
        ("show", "the Pareto front"),
        ("best", "the fastest that keeps a share of the quality"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("name", nargs="?", help="of a sweep (default: the one that ended last)")
        if name == "best":
            one.add_argument("--keeps", type=float, default=0.99, help="share of the teacher's quality (default 0.99)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stopped)
    signal.signal(signal.SIGINT, _stopped)
    try:
        if options.command == "cells":
            cells(_folder(options.name))
        elif options.command == "show":
            show(_folder(options.name))
        elif options.command == "best":
            if not 0 < options.keeps <= 2:
                raise FlowError(f"--keeps {options.keeps:g} is no share; 0.99 stands for 99 %")
            best(_folder(options.name), options.keeps)
        else:
            _begin(options)
        return 0
    except Exception as error:
        message = str(error) if isinstance(error, FlowError) else explain(error)
        if message is None or os.environ.get("FFN2MOE_DEBUG"):
            raise
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 2


def _begin(options: argparse.Namespace) -> None:
    for key, value in (("--search", options.search), ("--at-a-time", options.at_a_time)):
        if value is not None and value < 1:
            raise FlowError(f"{key} {value}: must be at least 1")
    if not options.keys:
        raise FlowError(f"the grid is empty: name at least one key with several values, for example {studies.EXAMPLE}")
    check(ROOT)
    raw = load_params(ROOT / "params.yaml")
    values = json.dumps([sorted(options.keys), options.search is None, raw.flat()], default=str)
    name = options.name or f"{raw.name}-sweep-{zlib.crc32(values.encode()):08x}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,50}", name):
        raise FlowError(f"--name {name}: should be letters, digits, '.', '_' or '-', at most 51, the first no sign")
    studies.parse(options.keys)
    _guardian = guard(ROOT)  # held on to: it acts when this end of its pipe closes
    sweep.with_options(task_runner=ThreadPoolTaskRunner(max_workers=(options.at_a_time or 2) + 1))(
        keys=options.keys,
        name=name,
        search=options.search,
        at_a_time=options.at_a_time,
        called_from=str(Path.cwd()),
    )


def _stopped(number: int, frame: object) -> None:
    """Ctrl-C and SIGTERM: ends what is under way, and this process for good a little later.

    Prefect waits at the end for a server that may have been stopped by the same signal; nothing that counts is left
    to be written then.
    """
    console.print(_STOPPED)
    end = threading.Timer(PATIENCE, os._exit, (128 + number,))
    end.daemon = True
    end.start()
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
