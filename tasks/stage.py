"""What every stage has in common: parameters, seed, progress, atomic writes, one clear error, a run record.

It imports mlflow inside functions (as tasks/registry.py does): files are the truth, the record is a copy of them, and a
stage run by plain `dvc repro` needs none.
"""

from __future__ import annotations

import csv
import ctypes
import errno
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.params import Params, load_params
from tasks.store import (
    TRACKING_URI,
    default_tracking_uri,
    experiment_id,
    is_locked,
    mlflow_client,
    patiently,
)

Item = TypeVar("Item")

PARENT_RUN = "FFN2MOE_PARENT_RUN"  # not MLFLOW_RUN_ID: the child would rename and finish the parent
STAGE_RUN = "FFN2MOE_STAGE_RUN"  # the run of a stage that started several processes, for the first of them to write in
USER_ERROR = 2
SECONDS_BETWEEN_LINES = 5.0
PROCESS = "process"  # tag of a pipeline's run: who makes it, so that one that was killed can be told apart


class StageRun:
    """What a stage function receives. Every path is relative to the root of the workspace."""

    def __init__(
        self, name: str, params: Params, root: Path, record: RunRecord | None = None, *, quiet: bool = False
    ) -> None:
        self.name = name
        self.params = params
        self.root = root
        self.record = record
        self._console = Console(highlight=False, soft_wrap=True, markup=False, quiet=quiet)

    def say(self, text: str) -> None:
        """One line for the reader of the log."""
        self._console.print(f"{self.name}: {text}")

    def track(self, items: Iterable[Item], total: int, description: str, completed: int = 0) -> Iterator[Item]:
        """Yields the items and shows progress and the time left: a bar on a terminal, else lines.

        `completed` is what was done before the first item (a resumed stage), out of `total`.
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
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            patience = SECONDS_BETWEEN_LINES * (3 if now - start > 60 else 1)
            if now - last_line >= patience:
                last_line = now
                left = (now - start) / (done - completed) * max(total - done, 0)
                self.say(f"{description} {done}/{total} ({100 * done / max(total, 1):.0f} %), {clock(left)} left")

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers over time for the run record (buffered); nothing when no record is kept."""
        if self.record:
            self.record.metrics(values, step)

    @contextmanager
    def out(self, path: str) -> Iterator[Path]:
        """A temporary folder that becomes `path` if the block ends well; else `path` stays as it was."""
        final = self.root / path
        fresh = final.with_name(f".{final.name}.partial")
        remove(fresh)  # left by a run that was killed
        fresh.mkdir(parents=True)
        try:
            yield fresh
            replace_folder(fresh, final)
        finally:
            remove(fresh)

    def write_text(self, path: str, text: str) -> None:
        """Writes a file that is there whole or not at all."""
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
        """Writes JSON with sorted keys; ValueError, naming the key, when a number is NaN or infinite."""
        for key, value in numbers(payload):
            _refuse_not_finite(path, key, value)
        self.write_text(path, json.dumps(payload, indent=2, sort_keys=True, default=_builtin, allow_nan=False) + "\n")

    def write_csv(self, path: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows as CSV; ValueError when there is none, keys differ or a number is not finite."""
        if not rows:
            raise ValueError(f"{path}: no row to write")
        columns = list(rows[0])
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        for index, row in enumerate(rows):
            if list(row) != columns:
                raise ValueError(f"{path}: row {index} has the columns {list(row)}, the first one {columns}")
            for key, value in numbers(row):
                _refuse_not_finite(path, f"row {index}, {key}", value)
            writer.writerow(row)
        self.write_text(path, buffer.getvalue())


def main(name: str, function: Callable[[StageRun], None], *, torch: bool = True, recorded: bool = True) -> None:
    """Runs one stage in the current folder and ends the process: 0 done, 2 the user's error, 1 a bug.

    `torch=False` for a stage that computes nothing with it and so need not wait for its import;
    `recorded=False` for one whose runs are not worth a record.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, _terminated)
    record: RunRecord | None = None
    try:
        root = Path.cwd()
        params = load_params(root / "params.yaml")
        prepare_process(params, torch=torch)
        record = RunRecord.attach(name, params) if recorded else None
        function(StageRun(name, params, root, record))
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
    """Seeds every generator, sets the threads and asks for deterministic kernels."""
    import numpy

    random.seed(params.seed)
    numpy.random.seed(params.seed)
    if not torch:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its reports of unused weights are not for the reader
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what makes cuBLAS deterministic
    import torch as torch_module

    torch_module.manual_seed(params.seed)
    if params.compute.threads:
        torch_module.set_num_threads(params.compute.threads)
    torch_module.use_deterministic_algorithms(True, warn_only=True)
    torch_module.utils.deterministic.fill_uninitialized_memory = False  # costs time, guards nothing here


def explain(error: BaseException) -> str | None:
    """The message of an error a user can act on; None for a bug, which deserves its traceback."""
    number = getattr(error, "errno", None)
    full = any(sign in str(error) for sign in ("No space left on device", "database or disk is full"))
    if full or number in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(Path.cwd()).free / 2**20
        return (
            f"the disk is full ({free:.0f} MiB free in {Path.cwd()}); make room (`dvc gc -w` drops the "
            "results of other workspaces and commits) and run again: what is finished is kept"
        )
    if is_locked(error):
        return (
            "the database of the run record is locked by another program for longer than a minute; see which "
            "(fuser -v mlflow.db), let it end or stop it, and run again: what is finished is kept"
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
    """Asks Linux to end this process when its parent ends, so that a killed DVC leaves no writer behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)


def _terminated(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # Linux may tell of a dead parent once for each thread that it had
    sys.exit(128 + number)


def clock(seconds: float) -> str:
    """A duration for people: 0:07, 3:05, 1:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def remove(path: Path) -> None:
    """Deletes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(new: Path, final: Path) -> None:
    """Puts `new` in the place of `final`; at every moment one of the two is whole on disk."""
    old = final.with_name(f".{final.name}.old")
    remove(old)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists() or final.is_symlink():
        os.replace(final, old)
    os.replace(new, final)
    remove(old)


def numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted key -> number, for every number (no truth value) in nested mappings and lists."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from numbers(value, f"{prefix}.{index}" if prefix else str(index))
    else:
        value = _builtin(tree) if hasattr(tree, "item") else tree
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix, value


def _refuse_not_finite(path: str, key: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"{path}: {key} is {value}; something before it went wrong (NaN or infinite weights, or a loss "
            "that diverged: lower distill.learning_rate)"
        )


def _builtin(value: Any) -> Any:
    """numpy and torch scalars as Python numbers, for JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


# --- the run record -------------------------------------------------------------------------------


class RunRecord:
    """One stage's run in MLflow, nested under the pipeline's. A record that fails never fails a stage."""

    def __init__(self, client: Any, run_id: str, *, owned: bool = True) -> None:
        self._client = client
        self.run_id = run_id
        self._owned = owned  # whoever made the run ends it
        self._buffer: list[Any] = []
        self._flushed = time.monotonic()
        self._works = True

    @classmethod
    def attach(cls, stage: str, params: Params) -> RunRecord | None:
        """A new run under the parent named in the environment; None when none is named."""
        parent, uri = os.environ.get(PARENT_RUN), os.environ.get(TRACKING_URI)
        if not parent or not uri:
            return None
        client = mlflow_client(uri)
        if os.environ.get(STAGE_RUN):
            return cls(client, os.environ[STAGE_RUN], owned=False)
        tags = {"mlflow.parentRunId": parent, "mlflow.runName": stage, "stage": stage}
        run = patiently(lambda: client.create_run(experiment_id(client), tags=tags))
        record = cls(client, run.info.run_id)
        section = "register_" if stage == "register" else stage
        values = getattr(params, section, None)
        chosen = {"seed": params.seed} | (values.model_dump() if values else {})
        record._try(lambda: client.log_batch(record.run_id, params=_params(chosen)))
        return record

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Buffers numbers; written in batches, as one by one costs 17 ms each."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._buffer += [Metric(key, float(value), now, step or 0) for key, value in values.items()]
        if len(self._buffer) >= 500 or time.monotonic() - self._flushed > 10:
            self._flush()

    def finish(self, status: str, metrics_file: Path | None = None) -> None:
        """Ends the run, with the numbers of the stage's metrics file in it; another's run is only written in."""
        if not self._owned:
            self._flush()
            return
        if metrics_file and metrics_file.is_file():
            payload = json.loads(metrics_file.read_text(encoding="utf-8"))
            self.metrics(dict(numbers(payload)))
        self._flush()
        self._try(lambda: self._client.set_terminated(self.run_id, status))

    def _flush(self) -> None:
        rows, self._buffer, self._flushed = self._buffer, [], time.monotonic()
        for start in range(0, len(rows), 1000):  # the most MLflow takes at once
            batch = rows[start : start + 1000]
            self._try(partial(self._client.log_batch, self.run_id, metrics=batch))

    def _try(self, action: Callable[[], object]) -> None:
        self._works = self._works and _recorded(action)


def _recorded(action: Callable[[], object]) -> bool:
    """Whether it could be written down; if not, that is said, and what is recorded goes on."""
    try:
        patiently(action)
    except Exception as error:  # whatever the tracker's storage throws, the files are the truth
        logging.getLogger(__name__).warning("the run record stops here, the run goes on: %s", error)
        return False
    return True


def _params(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, str(value)[:6000]) for key, value in values.items()]


class PipelineRecord:
    """The run of a whole pipeline in MLflow, made by who drives it; the stages' runs are nested under it."""

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self._client = client
        self._uri = uri
        self.run_id = run_id

    @classmethod
    def start(cls, root: Path, name: str, tags: Mapping[str, str]) -> PipelineRecord:
        """A new parent run; the database is made here if need be, before anything parallel."""
        uri = default_tracking_uri(root)
        client = mlflow_client(uri)
        _recorded(lambda: _close_killed(client))
        made_by = {PROCESS: _this_process()}
        run = patiently(lambda: client.create_run(experiment_id(client), run_name=name, tags={**tags, **made_by}))
        return cls(client, uri, run.info.run_id)

    @classmethod
    def go_on(cls, root: Path, run_id: str) -> PipelineRecord | None:
        """An earlier run, under way again; None if this database does not know it."""
        from mlflow.exceptions import MlflowException

        uri = default_tracking_uri(root)
        client = mlflow_client(uri)
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return None
        return cls(client, uri, run_id)

    def add(
        self, values: Mapping[str, float], files: Sequence[Path] = (), tags: Mapping[str, str] | None = None
    ) -> None:
        """Further numbers, files and tags."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id,
            metrics=[Metric(key, float(value), now, 0) for key, value in values.items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        )
        for file in files:
            self._client.log_artifact(self.run_id, str(file))

    def environment(self) -> dict[str, str]:
        """What a stage needs to attach itself."""
        return {PARENT_RUN: self.run_id, TRACKING_URI: self._uri}

    def link(self, stage: str, fingerprint: str, *, ran: bool) -> None:
        """Connects a stage with the run that made its results: its own, or for a cached one an earlier one.

        `fingerprint` identifies what dvc.lock says of the stage.
        """
        _recorded(lambda: self._link(stage, fingerprint, ran))

    def _link(self, stage: str, fingerprint: str, ran: bool) -> None:
        if ran:
            for run in self._search(f"tags.stage = '{stage}' and tags.mlflow.parentRunId = '{self.run_id}'"):
                self._client.set_tag(run.info.run_id, "fingerprint", fingerprint)
                self._client.set_tag(self.run_id, f"made_by.{stage}", run.info.run_id)
            return
        for run in self._search(f"tags.stage = '{stage}' and tags.fingerprint = '{fingerprint}'"):
            self._client.set_tag(self.run_id, f"made_by.{stage}", run.info.run_id)

    def log(
        self,
        root: Path,
        params: Params,
        datasets: Mapping[str, tuple[str, Mapping[str, Any]]],
        tags: Mapping[str, str],
    ) -> None:
        """Parameters, data sets (name -> hash, counts), metrics, and the files that tell what happened."""
        _recorded(lambda: self._log(root, params, datasets, tags))

    def _log(
        self,
        root: Path,
        params: Params,
        datasets: Mapping[str, tuple[str, Mapping[str, Any]]],
        tags: Mapping[str, str],
    ) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(f"{file.stem}.{key}", float(value), now, 0)
            for file in sorted((root / "metrics").glob("*.json"))
            for key, value in numbers(json.loads(file.read_text(encoding="utf-8")))
        ]
        self._client.log_batch(self.run_id, params=_params(params.flat()))
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        self._client.log_inputs(
            self.run_id,
            datasets=[
                DatasetInput(
                    Dataset(name, digest, "local", json.dumps({"uri": name}), profile=json.dumps(dict(profile))),
                    [InputTag("mlflow.data.context", name)],
                )
                for name, (digest, profile) in datasets.items()
            ],
        )
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)
        for path in ("params.yaml", "dvc.lock", "metrics", "reports"):
            if (root / path).is_dir():
                self._client.log_artifacts(self.run_id, str(root / path), path)
            elif (root / path).is_file():
                self._client.log_artifact(self.run_id, str(root / path))

    def finish(self, status: str, error: str = "") -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        if error:
            _recorded(lambda: self._client.set_tag(self.run_id, "error", error[:5000]))
        _recorded(lambda: _close_nested(self._client, self.run_id))
        _recorded(lambda: self._client.set_terminated(self.run_id, status))

    def discard(self) -> None:
        """Takes the run out of the record, as if it had not been."""
        _recorded(lambda: self._client.delete_run(self.run_id))

    def _search(self, query: str) -> list[Any]:
        experiment = experiment_id(self._client)
        return self._client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time DESC"])


def _this_process() -> str:
    """The machine, the process, and when that started: another one may get its number."""
    import psutil

    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time()}"


def _was_killed(process: str) -> bool:
    """Whether that process was on this machine and is no more."""
    import psutil

    host, pid, started = process.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 5  # a clock that was set moves it
    except psutil.NoSuchProcess:
        return True


def _close_killed(client: Any) -> None:
    """Ends the runs whose pipeline could not do so itself: SIGKILL, a power cut."""
    for run in client.search_runs([experiment_id(client)], "attributes.status = 'RUNNING'"):
        if PROCESS in run.data.tags and _was_killed(run.data.tags[PROCESS]):
            _close_nested(client, run.info.run_id)
            client.set_terminated(run.info.run_id, "KILLED")


def _close_nested(client: Any, parent: str) -> None:
    """Ends the stages' runs of a pipeline that is over: one still running belongs to a stage that was killed."""
    query = f"attributes.status = 'RUNNING' and tags.mlflow.parentRunId = '{parent}'"
    for run in client.search_runs([experiment_id(client)], query):
        client.set_terminated(run.info.run_id, "KILLED")
