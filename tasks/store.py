"""Find and check the store of run records and registered models: a database file, PostgreSQL, or an MLflow server.

Its address comes from the environment. mlflow is imported inside functions, because its import takes a second.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

TRACKING_URI = "FFN2MOE_TRACKING_URI"
ARTIFACTS = "FFN2MOE_ARTIFACTS"
EXPERIMENT = "ffn2moe"
MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` serves by default
# The kind of work, which some servers of MLflow 3 choose an experiment's page by; 3.17 goes by `page_of_runs` alone.
KIND = {"mlflow.experimentKind": "custom_model_development"}
SECONDS_FOR_A_LOCK = 60.0
SECONDS_TO_ANSWER = 10.0


class StoreError(ValueError):
    """The store of run records and models cannot be used; the message gives the cause and the remedy."""


def default_tracking_uri(root: Path) -> str:
    """Return the absolute address of the store: FFN2MOE_TRACKING_URI, else mlflow.db in the workspace.

    StoreError where the variable holds no usable address.
    """
    uri = os.environ.get(TRACKING_URI)
    if not uri:
        return f"sqlite:///{(root / 'mlflow.db').resolve()}"
    kinds = "http://HOST:PORT, postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:////ABSOLUTE/PATH.db"
    if not re.match(r"(https?|postgresql(\+psycopg2)?)://[^/]|sqlite:///", uri):
        raise StoreError(f"{TRACKING_URI} = {without_password(uri)} is not the address of a store; write {kinds}")
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        raise StoreError(
            f"{TRACKING_URI} = {uri} is relative, so every workspace would make its own store; write {kinds}"
        )
    return uri


def artifacts_destination(root: Path) -> str:
    """Return the URI of the files of runs and registered versions: FFN2MOE_ARTIFACTS, else mlartifacts.

    An MLflow server uses its own place instead. StoreError for a relative folder.
    """
    place = os.environ.get(ARTIFACTS)
    if not place:
        return (root / "mlartifacts").resolve().as_uri()
    if "://" in place:
        return place
    if not Path(place).is_absolute():
        raise StoreError(
            f"{ARTIFACTS} = {place} is relative; write an absolute folder or an address, for example s3://BUCKET/PATH"
        )
    return Path(place).as_uri()


def without_password(uri: str) -> str:
    """Return an address without its password, for messages."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", uri)


def mlflow_client(uri: str) -> Any:
    """Return a quiet MlflowClient on `uri`; make the database and the experiment of all runs where they are missing.

    StoreError where the store does not answer or cannot be used.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # a minute in all
    import mlflow

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # errors are reported where they are caught
    choose_store(uri)

    def connect() -> Any:
        client = mlflow.MlflowClient(uri, uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            client.create_experiment(EXPERIMENT, artifact_location=_artifacts_of(uri), tags=KIND)
        elif not KIND.keys() & experiment.tags.keys():  # made by an earlier version
            for key, value in KIND.items():
                client.set_experiment_tag(experiment.experiment_id, key, value)
        return client

    try:
        if uri.startswith("http"):
            _require_server(uri)
        elif not uri.startswith("sqlite:"):
            _require_database(uri)
        else:
            # One process at a time: several that find no database would all try to make it, and all but one would fail.
            with open(f"{uri.removeprefix('sqlite:///')}.lock", "w") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                return patiently(connect)
        return connect()
    except Exception as error:  # every store raises its own errors
        if isinstance(error, StoreError) or is_locked(error) or "disk is full" in str(error):
            raise
        raise StoreError(f"{without_password(uri)} cannot be used for the run record: {_cause(uri, error)}") from error


def choose_store(uri: str) -> None:
    """Let mlflow's own functions use a store; leave the environment as it is.

    MLflow also writes the address to its variables, where `settle` would read it as the user's choice of all stores.
    """
    import mlflow

    before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _artifacts_of(uri: str) -> str | None:
    """Return where the experiment's files go, which is fixed when it is made; None where a server decides."""
    if uri.startswith("http"):
        return None
    if uri.startswith("sqlite:"):
        return artifacts_destination(Path(uri.removeprefix("sqlite:///")).parent)
    if ARTIFACTS not in os.environ:
        raise StoreError(
            f"{without_password(uri)} holds no experiment {EXPERIMENT!r} yet, and a database keeps no files: set "
            f"{ARTIFACTS} to their place (an absolute folder that every machine sees, or s3://BUCKET/PATH)"
        )
    return artifacts_destination(Path("/"))


def _require_server(uri: str) -> None:
    """Ask a server once, because MLflow's own client tries for minutes. StoreError if it does not answer."""
    remedy = f"start it (make up, or mlflow server), or set {TRACKING_URI} to the right address"
    shown = without_password(uri)
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER):
            return
    except urllib.error.HTTPError as error:
        raise StoreError(f"{shown} answers with status {error.code}, so it is not an MLflow server; {remedy}") from None
    except OSError as error:
        cause = getattr(error, "reason", error)
        raise StoreError(f"the MLflow server at {shown} cannot be reached ({cause}); {remedy}") from None


def _require_database(uri: str) -> None:
    """Connect once, because MLflow tries for two minutes. StoreError if that fails."""
    import sqlalchemy

    try:
        options = {"connect_timeout": int(SECONDS_TO_ANSWER)}
        sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args=options).connect().close()
    except ModuleNotFoundError as error:
        raise StoreError(
            f"{TRACKING_URI} = {without_password(uri)} needs the package {error.name}: pip install psycopg2-binary"
        ) from None
    except sqlalchemy.exc.OperationalError as error:
        raise StoreError(
            f"the database {without_password(uri)} cannot be reached ({_line(error.orig or error)}); start it, or set "
            f"{TRACKING_URI} to the right address, user, password and database (made by `createdb NAME`)"
        ) from None


def _cause(uri: str, error: Exception) -> str:
    text = f"{error} {error.__cause__ or ''}"
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        return (
            "another version of MLflow made the database. If it was older: make a copy, then "
            f"`mlflow db upgrade {without_password(uri)}`. If it was newer: install it, or name another database"
        )
    if "not a database" in text:
        return "the file is not an SQLite database; restore it from a copy, or remove it (make run makes a new one)"
    if "unable to open database" in text or isinstance(error, FileNotFoundError | PermissionError):
        return "the file cannot be opened; check that its folder exists and may be written to"
    if "permission denied" in text:
        return f"its user lacks the permission ({_line(error)}); make the user the owner of the database"
    if "401" in text or "not authenticated" in text.lower():
        return "the server asks for a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return _line(error)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def experiment_id(client: Any) -> str:
    """Return the id of the experiment that holds all runs."""
    return client.get_experiment_by_name(EXPERIMENT).experiment_id


def page_of_runs(server: str, client: Any) -> str:
    """Return the page of an MLflow server that shows the runs.

    Its own start page shows traces of language model applications, unless the address asks for training.
    """
    return f"{server.rstrip('/')}/#/experiments/{experiment_id(client)}/runs?workflowType=machine_learning"


def is_locked(error: BaseException) -> bool:
    """Return whether an error says that another program has locked an SQLite database."""
    return "database is locked" in str(error)


def patiently(action: Callable[[], Item]) -> Item:
    """Return what `action` returns; try again for a minute while another program locks the database."""
    deadline = time.monotonic() + SECONDS_FOR_A_LOCK
    while True:
        try:
            return action()
        except Exception as error:
            if not is_locked(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


if __name__ == "__main__":  # `make` runs this before anything parallel
    try:
        mlflow_client(default_tracking_uri(Path.cwd()))
    except StoreError as error:
        sys.exit(f"error: {error}")
