"""Run the services for unattended runs on loopback: a Prefect server, a worker and an MLflow server.

    python -m flows.service up [--prefect-port N] [--mlflow-port N] [--notify URL|off]
    python -m flows.service down
    python -m flows.service status

The folder .prefect holds their notes (processes and ports), their logs and the database of Prefect. Every process has a
mark in its environment, so that `down` finds all of them even if a note is lost.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows import guardian, prefect_server
from flows.environment import check_database, settle
from flows.errors import report
from flows.processes import (
    HOST,
    MARK,
    ORDER,
    Service,
    answers,
    api,
    api_of,
    folder,
    mark_of,
    note,
    noted,
    refuse_taken,
    refuse_to_move,
    running,
    start,
    stop,
    wait,
)
from flows.workspace import BusyError, FlowError, check, commit
from tasks.store import default_tracking_uri, mlflow_client, page_of_runs, without_password

ROOT = Path(__file__).resolve().parent.parent
PORTS = {"prefect": 4200, "mlflow": 5000}
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False)


def _elsewhere(root: Path) -> dict[str, str]:
    """Return the names and addresses of servers that another machine or user runs."""
    given, uri = os.environ.get("PREFECT_API_URL"), default_tracking_uri(root)
    mine = running(root).get("prefect")
    found = {"prefect": given} if given and not (mine and given == f"{mine.address}/api") else {}
    return {**found, "mlflow": without_password(uri)} if uri.startswith("http") else found


def up(root: Path, ports: dict[str, int | None], webhook: str | None = None) -> None:
    """Start what does not run, update the deployment, and print the addresses.

    FlowError with cause and remedy; then only what ran before still runs.
    """
    check(root)
    with _alone(root):
        before = running(root)
        for name in sorted(noted(root).keys() - before.keys()):
            console.print(f"{name} had ended without `make down`: starting it again")
        services = dict(before)
        try:
            _start_servers(root, services, ports)
            url = api_of(services)
            assert url is not None  # a server runs, or PREFECT_API_URL names one
            os.environ["PREFECT_API_URL"] = url
            if "prefect" not in services:
                prefect_server.refuse_shared(root)
            prefect_server.deploy(root)
            if "worker" not in services:
                if "prefect" in services:
                    for name in prefect_server.close_dead_runs():
                        console.print(f"the run {name} was cut off and is closed")
                services["worker"] = start(root, "worker", _worker_command(root), None, services)
            wait("worker", services["worker"], root, prefect_server.worker_is_online)
            if webhook is not None:
                prefect_server.notify(None if webhook == "off" else webhook)
        except BaseException:
            stop(root, [name for name in ORDER if name in services and name not in before])
            note(root, before)
            raise
    _, dirty = commit(root)
    console.print("everything runs already" if len(before) == len(services) else "everything runs")
    status(root)
    if dirty:
        console.print(
            "tracked files differ from the last commit: runs use them and are recorded as git.dirty; commit them for "
            "runs that can be repeated"
        )
    uri = default_tracking_uri(root)
    server = without_password(uri) if uri.startswith("http") else running(root)["mlflow"].address
    console.print(f"runs: {page_of_runs(server, mlflow_client(uri))}")
    console.print(f"logs: {os.path.relpath(folder(root))}; API: {url}; stop everything: make down")


def _start_servers(root: Path, services: dict[str, Service], ports: dict[str, int | None]) -> None:
    """Start the servers of Prefect and MLflow, unless they run or an address elsewhere is given."""
    uri = default_tracking_uri(root)
    elsewhere = _elsewhere(root)
    commands = {
        "prefect": lambda port: ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)],
        "mlflow": lambda port: ["-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"],
    }
    api_elsewhere = elsewhere.get("prefect")
    if api_elsewhere and not answers(f"{api_elsewhere}/health"):
        raise FlowError(
            f"no Prefect server answers at PREFECT_API_URL = {api_elsewhere}; start it, correct the address, or unset "
            "it for this project's own server"
        )
    missing = []
    for name in commands:
        if name in elsewhere:
            continue
        if name in services:
            refuse_to_move(services[name], ports[name])
            continue
        guardian.end(MARK, mark_of(root, name))  # remains of a killed server may hold the port
        refuse_taken(name, ports[name] or PORTS[name])
        missing.append(name)
    if "prefect" in missing:
        check_database(root)
    mlflow_client(uri)  # makes the database, or raises with the cause
    for name in missing:
        port = ports[name] or PORTS[name]
        services[name] = start(root, name, commands[name](port), port, services)
    health = {"prefect": "/api/health", "mlflow": "/health"}
    for name in missing:
        wait(name, services[name], root, lambda name=name: answers(services[name].address + health[name]))  # type: ignore[misc]


def _worker_command(root: Path) -> list[str]:
    guardian.end(MARK, mark_of(root, "worker"))  # a run of a killed worker would hold the workspace
    return [
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        prefect_server.POOL,
        "--type",
        "process",
        "--name",
        prefect_server.worker_name(),
    ]


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Allow one `up` or `down` at a time."""
    folder(root).mkdir(parents=True, exist_ok=True)
    with (folder(root) / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError("another `make up` or `make down` runs here", "wait for it and try again") from None
        yield


def down(root: Path) -> None:
    """Stop everything, including a run; the next run resumes from its checkpoint."""
    with _alone(root):
        names = [name for name in ORDER if name in noted(root)]
        stopped = stop(root, list(ORDER))
        note(root, {})
    console.print(f"stopped: {', '.join(names)}" if names or stopped else "nothing runs")


def status(root: Path) -> bool:
    """Print what runs, the next run, and the result of the last; return whether everything runs."""
    services, elsewhere = running(root), _elsewhere(root)
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in ORDER:
        service = services.get(name)
        if name in elsewhere:
            table.add_row(name, elsewhere[name], "elsewhere")
        elif service is None:
            table.add_row(name, "does not run")
        else:
            where = service.address if service.port else ""
            table.add_row(name, where, f"process {service.pid}, since {prefect_server.time_of(service.started)}")
    url = api(root)
    if url and answers(f"{url}/health"):
        os.environ["PREFECT_API_URL"] = url
        for row in prefect_server.schedule():
            table.add_row(*row)
    console.print(table)
    if missing := [name for name in ORDER if name not in services and name not in elsewhere]:
        console.print(f"to start {' and '.join(missing)}: make up")
    return not missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.service", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="start what does not run, and print the addresses")
    starting.add_argument("--prefect-port", type=int, metavar="N")
    starting.add_argument("--mlflow-port", type=int, metavar="N")
    starting.add_argument(
        "--notify", metavar="URL", help="send failed runs to this webhook from now on; off: send nothing"
    )
    commands.add_parser("down", help="stop everything")
    commands.add_parser("status", help="print what runs, the next and the last run; exit code 1 unless all of it runs")
    given = parser.parse_args(arguments)
    settle(ROOT)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if given.command == "up":
            up(ROOT, {"prefect": given.prefect_port, "mlflow": given.mlflow_port}, given.notify)
        elif given.command == "down":
            down(ROOT)
        else:
            return 0 if status(ROOT) else 1
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
