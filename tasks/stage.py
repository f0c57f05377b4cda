"""Run a stage: read the parameters, seed, show progress, write files whole, report one clear error."""

from __future__ import annotations

import csv
import ctypes
import errno
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ffn2moe.progress import Screen
from ffn2moe.progress import clock as clock
from tasks.measures import numbers
from tasks.params import Params, load_params
from tasks.record import RunRecord
from tasks.store import is_locked

Item = TypeVar("Item")

USER_ERROR = 2
SECONDS_BETWEEN_LINES = 5.0


class StageRun:
    """Hold what a stage function needs. Every path is relative to the root of the workspace."""

    def __init__(
        self, name: str, params: Params, root: Path, record: RunRecord | None = None, *, quiet: bool = False
    ) -> None:
        self.name = name
        self.params = params
        self.root = root
        self.record = record
        self._console = Console(highlight=False, markup=False, emoji=False, quiet=quiet)
        self._screen = Screen(self._console)

    def alive(self) -> Screen:
        """Return a context in which a line says, after each 30 seconds without one, that the stage still works."""
        return self._screen

    def say(self, text: str) -> None:
        """Print one line, prefixed with the name of the stage."""
        self._screen.say(f"{self.name}: {text}")

    def track(self, items: Iterable[Item], total: int, description: str, completed: int = 0) -> Iterator[Item]:
        """Yield the items; show progress and the time left, as a bar on a terminal and as lines elsewhere.

        `completed` of `total` items were done before the first one, in a resumed stage.
        """
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(f"{self.name}: {description}", total=total, completed=completed)
                for item in items:
                    yield item
                    progress.advance(task)
            return
        start = last_line = time.monotonic()
        done = completed
        with self._screen.step(f"{self.name}: {description}", total, estimate=False) as step:
            step.done = completed
            for item in items:
                yield item
                step.advance()
                done += 1
                now = time.monotonic()
                patience = SECONDS_BETWEEN_LINES * (3 if now - start > 60 else 1)
                if now - last_line >= patience:
                    last_line = now
                    left = (now - start) / (done - completed) * max(total - done, 0)
                    self.say(f"{description} {done}/{total} ({100 * done / max(total, 1):.0f} %), {clock(left)} left")

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers over time to the run record (buffered); do nothing where no record is kept."""
        if self.record:
            self.record.metrics(values, step)

    @contextmanager
    def out(self, path: str) -> Iterator[Path]:
        """Give a temporary folder that becomes `path` if the block succeeds; else `path` stays as it was."""
        final = self.root / path
        fresh = final.with_name(f".{final.name}.partial")
        remove(fresh)  # a killed run leaves it
        fresh.mkdir(parents=True)
        try:
            yield fresh
            replace_folder(fresh, final)
        finally:
            remove(fresh)

    def write_text(self, path: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        final = self.root / path
        final.parent.mkdir(parents=True, exist_ok=True)
        fresh = final.with_name(f".{final.name}.partial")
        try:
            with open(fresh, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(fresh, final)
        finally:
            fresh.unlink(missing_ok=True)

    def write_json(self, path: str, payload: Mapping[str, Any]) -> None:
        """Write JSON with sorted keys; ValueError, with the key, where a number is NaN or infinite."""
        for key, value in numbers(payload):
            _refuse_not_finite(path, key, value)
        self.write_text(path, json.dumps(payload, indent=2, sort_keys=True, default=_builtin, allow_nan=False) + "\n")

    def write_csv(self, path: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as CSV; ValueError where there is no row, keys differ or a number is not finite."""
        if not rows:
            raise ValueError(f"{path}: no row to write")
        columns = list(rows[0])
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        for index, row in enumerate(rows):
            if list(row) != columns:
                raise ValueError(f"{path}: row {index} has the columns {list(row)}, the first row has {columns}")
            for key, value in numbers(row):
                _refuse_not_finite(path, f"row {index}, {key}", value)
            writer.writerow(row)
        self.write_text(path, buffer.getvalue())


def main(name: str, function: Callable[[StageRun], None], *, torch: bool = True, recorded: bool = True) -> None:
    """Run one stage in the current folder and end the process: 0 done, 2 the user's error, 1 a bug.

    `torch=False` spares a stage that does not use torch its import. `recorded=False` keeps no run record.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, _terminated)
    record: RunRecord | None = None
    try:
        root = Path.cwd()
        params = load_params(root / "params.yaml")
        if params.target.wanted:
            raise ValueError(
                f"params.yaml has a target, {params.target.wanted}, and only `make run` takes the recipe for it: run "
                "that, or set target.keeps and target.speedup to null"
            )
        prepare_process(params, torch=torch)
        record = RunRecord.attach(name, params) if recorded else None
        stage = StageRun(name, params, root, record)
        with stage.alive():
            function(stage)
        if record:
            record.finish("FINISHED", root / "metrics" / f"{name}.json")
        sys.exit(0)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if record and code:
            record.finish("KILLED")
        sys.exit(code)
    except Exception as error:
        if record:
            record.finish("FAILED")
        message = explain(error)
        if message is None or os.environ.get("FFN2MOE_DEBUG"):
            raise
        print(f"{name}: error: {message}", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(USER_ERROR)


def prepare_process(params: Params, *, torch: bool = True) -> None:
    """Seed every generator, set the threads and ask for deterministic kernels."""
    import numpy

    random.seed(params.seed)
    numpy.random.seed(params.seed)
    if not torch:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports unused weights otherwise
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
    import torch as torch_module

    torch_module.manual_seed(params.seed)
    if params.compute.threads:
        torch_module.set_num_threads(params.compute.threads)
    torch_module.use_deterministic_algorithms(True, warn_only=True)
    torch_module.utils.deterministic.fill_uninitialized_memory = False  # it costs time and protects nothing here


def explain(error: BaseException) -> str | None:
    """Return the message of an error that a user can act on; None for a bug, which deserves its traceback."""
    number = getattr(error, "errno", None)
    full = any(sign in str(error) for sign in ("No space left on device", "database or disk is full"))
    if full or number in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(Path.cwd()).free / 2**20
        return (
            f"the disk is full ({free:.0f} MiB free in {Path.cwd()}); make room (`dvc gc -w` drops the "
            "results of other workspaces and commits) and run again: finished stages are kept"
        )
    if is_locked(error):
        return (
            "another program has locked the database of the run record for more than a minute; find it "
            "(fuser -v mlflow.db), wait for it or stop it, and run again: finished stages are kept"
        )
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out of memory; lower distill.batch_tokens, train_router.batch_tokens or evaluate.batch_texts"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename} does not exist; if an earlier stage writes it, run that first: dvc repro"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError | FloatingPointError) and str(error):
        return str(error)
    return None


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that a killed DVC leaves no writer behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)


def _terminated(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # Linux can send it once for each thread of the parent
    sys.exit(128 + number)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(new: Path, final: Path) -> None:
    """Replace the folder `final` by `new`; at every moment one of the two is whole on disk."""
    old = final.with_name(f".{final.name}.old")
    remove(old)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists() or final.is_symlink():
        os.replace(final, old)
    os.replace(new, final)
    remove(old)


def _refuse_not_finite(path: str, key: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"{path}: {key} is {value}, because weights became NaN or infinite or a loss diverged: lower "
            "distill.learning_rate"
        )


def _builtin(value: Any) -> Any:
    """Return a numpy or torch scalar as a Python number, for JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
