"""What Prefect, DVC, MLflow and the libraries read from the environment once, so it is set before they are imported.

Quiet, nothing sent anywhere, all of it in the project. What the environment says already has precedence.
"""

from __future__ import annotations

import importlib.util
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from flows.workspace import FlowError

QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the API keeps the log, the board shows it
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",  # it takes 5, on a busy machine much more
    # On disk: held in memory, the slots of runs that died with the server would stay taken after it starts again.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would leave worker processes behind
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def prefect_home(root: Path) -> Path:
    """Where Prefect keeps its database, and the services their notes and logs; git ignores it."""
    return root / ".prefect"


def settle(root: Path) -> None:
    """Sets all of it for this process and its children."""
    for key, value in {**QUIET, "PREFECT_HOME": str(prefect_home(root))}.items():
        os.environ.setdefault(key, value)


def check_database(root: Path) -> None:
    """FlowError when a later Prefect than this one made its database: its server would try to start for ever."""
    path = prefect_home(root) / "prefect.db"
    package = importlib.util.find_spec("prefect")
    assert package is not None and package.origin is not None
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as database:
            made_by = [revision for (revision,) in database.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.OperationalError:  # no table yet: it was being made when that was stopped, and is made anew
        return
    except sqlite3.DatabaseError as error:
        raise FlowError(f"{_aside(path)} it is damaged ({error})") from None
    names = (Path(package.origin).parent / "server/database/_migrations/versions/sqlite").glob("*.py")
    known = " ".join(file.name for file in names)
    if unknown := [revision for revision in made_by if revision not in known]:
        raise FlowError(f"{_aside(path)} another version of Prefect made it (revision {unknown[0]})")


def _aside(path: Path) -> str:
    name = os.path.relpath(path)
    return (
        f"Prefect's database cannot be used; put it aside (mv {name} {name}.other: past runs go out of its list, "
        "results and the run record stay) or install the version that made it:"
    )
