"""Run the unfinished cells, several at a time, each in one thread; report the failures at the end."""

from __future__ import annotations

import gc
import os
import subprocess
import traceback
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from rich.console import Console

import benchmarks.ablation.methods  # noqa: F401  a worker finds every method in the tables
from benchmarks.ablation.bench import Bench, Setup
from benchmarks.ablation.build import measure
from benchmarks.ablation.grid import Cell, Store
from ffn2moe.planning.timing import machine
from ffn2moe.progress import Screen
from tasks.stage import die_with_parent


@dataclass(frozen=True)
class Finished:
    """A cell that ended, with its results or its error."""

    cell: Cell
    found: dict[str, Any] | None
    error: str | None


def run(setup: Setup, store: Store, todo: Sequence[Cell], jobs: int, console: Console) -> list[Finished]:
    """Run the cells in their order and write each; return those that failed."""
    failed: list[Finished] = []
    with (
        Screen(console) as screen,
        closing(finish(setup, todo, jobs)) as finishing,  # Ctrl-C then ends the other processes, too
    ):
        for number, finished in enumerate(screen.track(finishing, len(todo), "cells"), 1):
            if finished.found is None:
                failed.append(finished)
                line = f"failed: {finished.error}"
            else:
                store.write(finished.cell, finished.found)
                spent = finished.found["seconds"]
                figures = ", ".join(f"{name} {figure:.4g}" for name, figure in finished.found["figures"].items())
                line = f"{figures}, {spent['made']:.0f} + {spent['judged']:.0f} s"
            screen.say(f"{number}/{len(todo)} {finished.cell.name(store.budget.experts)}: {line}")
    return failed


def finish(setup: Setup, cells: Sequence[Cell], jobs: int) -> Generator[Finished]:
    """Yield each cell when it ends. One job runs in this process, more run in as many others.

    If a process dies, all running cells count as failed, because the pool cannot say which one it was. The remaining
    cells run in new processes.
    """
    if jobs == 1:
        bench = Bench(setup)
        yield from (_finish(bench, cell) for cell in cells)
        return
    waiting = list(cells)
    while waiting:
        pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start, initargs=(setup,))
        running: dict[Future[Finished], Cell] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running[pool.submit(_in_worker, waiting[0])] = waiting[0]
                    waiting.pop(0)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finished = future.result()
                    del running[future]
                    yield finished
        except BrokenProcessPool:
            for future, cell in running.items():
                if future.done() and future.exception() is None:
                    yield future.result()
                else:
                    yield Finished(
                        cell, None, "its process, or another one, died: if the memory ran out, use fewer --jobs"
                    )
        except BaseException:  # stopped: do not wait for the other processes
            for process in active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_bench: Bench


def _start(setup: Setup) -> None:
    global _bench
    die_with_parent()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(setup.threads))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _bench = Bench(setup)


def _in_worker(cell: Cell) -> Finished:
    return _finish(_bench, cell)


def _finish(bench: Bench, cell: Cell) -> Finished:
    try:
        found = measure(bench, cell)
    except Exception as error:  # any error of a method must not stop the other cells
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Finished(cell, None, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    finally:
        gc.collect()
    return Finished(cell, found | about(bench, cell), None)


def about(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Return what identifies a cell, and how it was computed."""
    return {
        "method": cell.method.name,
        "share": cell.share(bench.budget.experts),
        "stage": cell.stage,
        "seed": cell.seed,
        "settings": cell.method.settings(),
        "commit": commit(),
        "machine": machine()["cpu"],
        "threads": bench.setup.threads,
        "device": bench.setup.device,
        "bf16": bench.bf16,
    }


def commit() -> str:
    """Return the commit that is checked out, with a plus if files differ from it."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
