"""Record runs in MLflow: the run of a stage, nested under the run of its pipeline.

Files are the truth and the record is a copy of them; a stage run by plain `dvc repro` keeps none. mlflow is imported
inside functions, because its import takes a second.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tasks.measures import numbers
from tasks.params import Params
from tasks.store import TRACKING_URI, default_tracking_uri, experiment_id, mlflow_client, patiently

PARENT_RUN = "FFN2MOE_PARENT_RUN"  # not MLFLOW_RUN_ID: the child would rename and finish the parent
STAGE_RUN = "FFN2MOE_STAGE_RUN"  # the run of a stage with several processes; the first of them writes in it
PROCESS = "process"  # tag of a pipeline's run: the process that makes it, which shows later whether it was killed


class RunRecord:
    """The MLflow run of one stage, nested under the pipeline's run. A record that fails never fails a stage."""

    def __init__(self, client: Any, run_id: str, *, owned: bool = True) -> None:
        self._client = client
        self.run_id = run_id
        self._owned = owned  # the process that made the run ends it
        self._buffer: list[Any] = []
        self._flushed = time.monotonic()
        self._works = True

    @classmethod
    def attach(cls, stage: str, params: Params) -> RunRecord | None:
        """Start a run under the parent that the environment names; return None where it names none."""
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
        """Buffer numbers and write them in batches: a single write takes 17 ms."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._buffer += [Metric(key, float(value), now, step or 0) for key, value in values.items()]
        if len(self._buffer) >= 500 or time.monotonic() - self._flushed > 10:
            self._flush()

    def finish(self, status: str, metrics_file: Path | None = None) -> None:
        """End the run, with the numbers of the stage's metrics file; another process's run is not ended."""
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
        for start in range(0, len(rows), 1000):  # MLflow's limit for one batch
            batch = rows[start : start + 1000]
            self._try(partial(self._client.log_batch, self.run_id, metrics=batch))

    def _try(self, action: Callable[[], object]) -> None:
        self._works = self._works and _recorded(action)


def _recorded(action: Callable[[], object]) -> bool:
    """Return whether the record could be written. If not, a warning says so, and the run continues."""
    try:
        patiently(action)
    except Exception as error:  # every store raises its own errors; the files are the truth
        logging.getLogger(__name__).warning("the run record stops here, the run continues: %s", error)
        return False
    return True


def _params(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, str(value)[:6000]) for key, value in values.items()]


class PipelineRecord:
    """The MLflow run of a whole pipeline; the stages' runs are nested under it."""

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self._client = client
        self._uri = uri
        self.run_id = run_id

    @classmethod
    def start(cls, root: Path, name: str, tags: Mapping[str, str]) -> PipelineRecord:
        """Start a parent run; the database is made here if it does not exist, before anything runs in parallel."""
        uri = default_tracking_uri(root)
        client = mlflow_client(uri)
        _recorded(lambda: _close_killed(client))
        made_by = {PROCESS: _this_process()}
        run = patiently(lambda: client.create_run(experiment_id(client), run_name=name, tags={**tags, **made_by}))
        return cls(client, uri, run.info.run_id)

    @classmethod
    def resume(cls, root: Path, run_id: str) -> PipelineRecord | None:
        """Reopen an earlier run; return None if this database does not have it."""
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
        """Add numbers, files and tags."""
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
        """Return the environment variables that a stage needs to attach its run."""
        return {PARENT_RUN: self.run_id, TRACKING_URI: self._uri}

    def link(self, stage: str, fingerprint: str, *, ran: bool) -> None:
        """Link a stage to the run that made its results: its own run, or an earlier one for a cached stage.

        `fingerprint` identifies the stage's entry in dvc.lock.
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
        """Log parameters, data sets (name -> hash and counts), metrics, tags, and the files that show the results."""
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
        """End the run: FINISHED, FAILED or KILLED."""
        if error:
            _recorded(lambda: self._client.set_tag(self.run_id, "error", error[:5000]))
        _recorded(lambda: _close_nested(self._client, self.run_id))
        _recorded(lambda: self._client.set_terminated(self.run_id, status))

    def discard(self) -> None:
        """Delete the run from the record."""
        _recorded(lambda: self._client.delete_run(self.run_id))

    def _search(self, query: str) -> list[Any]:
        experiment = experiment_id(self._client)
        return self._client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time DESC"])


def _this_process() -> str:
    """Return host, process id and start time: another process can get the same id later."""
    import psutil

    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time()}"


def _was_killed(process: str) -> bool:
    """Return whether that process ran on this machine and has ended."""
    import psutil

    host, pid, started = process.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 5  # setting the clock moves it
    except psutil.NoSuchProcess:
        return True


def _close_killed(client: Any) -> None:
    """End the runs whose pipeline could not end them: after SIGKILL or a power cut."""
    for run in client.search_runs([experiment_id(client)], "attributes.status = 'RUNNING'"):
        if PROCESS in run.data.tags and _was_killed(run.data.tags[PROCESS]):
            _close_nested(client, run.info.run_id)
            client.set_terminated(run.info.run_id, "KILLED")


def _close_nested(client: Any, parent: str) -> None:
    """End the stages' runs of a pipeline that is over: a run that is still open belongs to a killed stage."""
    query = f"attributes.status = 'RUNNING' and tags.mlflow.parentRunId = '{parent}'"
    for run in client.search_runs([experiment_id(client)], query):
        client.set_terminated(run.info.run_id, "KILLED")
