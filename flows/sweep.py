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
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from flows import compress as pipeline  # first: it sets what Prefect reads when it is imported

# isort: split
import psutil
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from ffn2moe.progress import Heartbeat
from flows import sweep_report
from flows.axes import EXAMPLE, parse
from flows.crew import Crew
from flows.errors import STOPPED, report
from flows.guardian import guard
from flows.progress import CellProgress
from flows.recipes import RECIPE, axes_of, read_recipes
from flows.study import Study
from flows.sweep_cells import run_cells
from flows.sweep_compare import compare_cells, log_front
from flows.sweep_front import compare_front
from flows.workspace import FlowError, check, check_recipes, commit, plan
from tasks.params import ParamsError, load_params
from tasks.record import PipelineRecord
from tasks.stage import USER_ERROR

ROOT = pipeline.ROOT
COMPARE = ("-m", "tasks.compare")
JUDGE = ("-m", "tasks.judge_plans")
PATIENCE = 30.0  # seconds for the processes of a killed sweep to end
console = sweep_report.console


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
                run_cells(study, at_a_time, crew, record, progress)
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
            return _begin(options)
        return 0
    except Exception as error:
        return report(error)


def _begin(options: argparse.Namespace) -> int:
    """Begin or resume a sweep; return the exit code."""
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
    if recipes:
        firsts = [f"{key}={axis[0]}" for key, axis in parse(keys).items() if isinstance(axis, tuple)]
        if not check_recipes(ROOT, {name: _planned(name, [*firsts, *own]) for name, own in recipes.items()}):
            return USER_ERROR
    _guardian = guard(ROOT)  # keep it: it acts when this end of its pipe closes
    sweep.with_options(task_runner=ThreadPoolTaskRunner(max_workers=(options.at_a_time or 2) + 1))(
        keys=keys,
        name=name,
        search=options.search,
        at_a_time=options.at_a_time,
        called_from=str(Path.cwd()),
        recipes=recipes,
    )
    return 0


def _planned(recipe: str, settings: Sequence[str]) -> dict[str, object]:
    """Return the parameters of a recipe; FlowError, with its name, if they contradict each other."""
    try:
        return plan(ROOT, [f"name={recipe}", *settings], Path.cwd())[0]
    except ParamsError as error:
        raise FlowError(f"the recipe {recipe}: {str(error).removeprefix('the settings: ')}") from None


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
