"""Set the environment variables that Prefect, DVC, MLflow and the libraries read when they are imported.

They print little, send nothing anywhere and keep their files in the project. Variables that are set already win, then
the file .env beside params.yaml, if there is one: it holds addresses and passwords, and git ignores it.
"""

from __future__ import annotations

import importlib.util
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from dotenv import load_dotenv

from flows.workspace import FlowError
from tasks.store import SECONDS_TO_ANSWER, TRACKING_URI, without_password

DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the API keeps the log, the Board shows it
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",  # it takes 5, on a busy machine much more
    # On disk: from memory, a new server could not free the slots of runs that died with the old one.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would leave worker processes behind
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def prefect_home(root: Path) -> Path:
    """Return the folder of Prefect's database and of the notes and logs of the services; git ignores it."""
    return root / ".prefect"


def settle(root: Path) -> None:
    """Set the variables for this process and its children."""
    load_dotenv(root / ".env")
    if theirs := os.environ.get("MLFLOW_TRACKING_URI"):  # MLflow's own variable counts if ours is not set
        os.environ.setdefault(TRACKING_URI, theirs)
    for key, value in {**QUIET, "PREFECT_HOME": str(prefect_home(root))}.items():
        os.environ.setdefault(key, value)


def check_database(root: Path) -> None:
    """Raise FlowError unless this Prefect can use its database: the server would otherwise try forever.

    The database is PREFECT_SERVER_DATABASE_CONNECTION_URL, or the file prefect.db.
    """
    url = os.environ.get(DATABASE) or os.environ.get("PREFECT_API_DATABASE_CONNECTION_URL")
    if not url:
        _check_file(prefect_home(root) / "prefect.db")
    elif url.startswith("sqlite+aiosqlite:///"):
        _check_file(Path(url.removeprefix("sqlite+aiosqlite:///")))
    elif url.startswith("postgresql+asyncpg://"):
        _check_postgresql(url)
    else:
        raise FlowError(
            f"{DATABASE} = {without_password(url)} is not a database that Prefect can use; write "
            "postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE, or unset it to use a file in this project"
        )


def _check_file(path: Path) -> None:
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as database:
            made_by = [revision for (revision,) in database.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.OperationalError:  # no table yet: its creation was stopped; Prefect creates it again
        return
    except sqlite3.DatabaseError as error:
        raise FlowError(f"{_aside(path)} it is damaged ({error})") from None
    if unknown := _unknown(made_by, "sqlite"):
        raise FlowError(f"{_aside(path)} another version of Prefect made it (revision {unknown})")


def _check_postgresql(url: str) -> None:
    import sqlalchemy

    shown = without_password(url)
    options = {"connect_timeout": int(SECONDS_TO_ANSWER)}
    try:
        engine = sqlalchemy.create_engine(
            url.replace("+asyncpg", "+psycopg2"), poolclass=sqlalchemy.NullPool, connect_args=options
        )
        with engine.connect() as database:
            if not sqlalchemy.inspect(database).has_table("alembic_version"):
                return
            made_by = list(database.scalars(sqlalchemy.text("SELECT version_num FROM alembic_version")))
    except ModuleNotFoundError as error:
        raise FlowError(f"{shown} cannot be checked without {error.name}: pip install psycopg2-binary") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        cause = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise FlowError(
            f"Prefect's database {shown} cannot be reached ({cause}); start it, or correct {DATABASE}: address, user, "
            "password and database (made by `createdb NAME`)"
        ) from None
    if unknown := _unknown(made_by, "postgresql"):
        raise FlowError(
            f"Prefect's database {shown} was made by another version of Prefect (revision {unknown}); install "
            f"that one, or name another database in {DATABASE}: the list of past runs starts empty, results and the "
            "run record stay"
        )


def _unknown(revisions: list[str], dialect: str) -> str | None:
    """Return a revision that this Prefect does not know; None if it knows all of them."""
    package = importlib.util.find_spec("prefect")
    assert package is not None and package.origin is not None
    names = (Path(package.origin).parent / f"server/database/_migrations/versions/{dialect}").glob("*.py")
    known = " ".join(file.name for file in names)
    return next((revision for revision in revisions if revision not in known), None)


def _aside(path: Path) -> str:
    name = os.path.relpath(path)
    return (
        f"Prefect's database cannot be used; put it aside (mv {name} {name}.other: the list of past runs starts empty, "
        "results and the run record stay) or install the version that made it:"
    )
