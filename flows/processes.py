"""Start, note, find and stop the processes of the services."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flows import guardian
from flows.environment import prefect_home
from flows.workspace import FlowError
from tasks.store import artifacts_destination, default_tracking_uri

HOST = "127.0.0.1"
MARK = "FFN2MOE_SERVICE"  # environment variable of every process of a service
PATIENCE = 300.0  # seconds a service may take to answer; it takes 5 to 10, on a busy machine much more
VARIABLES = {"prefect": "PREFECT_PORT", "mlflow": "MLFLOW_PORT"}  # of make
ORDER = ("prefect", "mlflow", "worker")


@dataclass(frozen=True)
class Service:
    """Name a process of ours and its start, which tells it from a later process of the same number."""

    name: str
    pid: int
    started: float
    port: int | None = None

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 5 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"


def folder(root: Path) -> Path:
    """Return the folder of the notes and the logs."""
    return prefect_home(root) / "service"


def noted(root: Path) -> dict[str, Service]:
    """Return the services that the notes name, including dead ones."""
    try:
        notes = json.loads((folder(root) / "state.json").read_text(encoding="utf-8"))
        return {note["name"]: Service(**note) for note in notes}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):  # a kill or a full disk cut the file
        return {}


def running(root: Path) -> dict[str, Service]:
    """Return the services that are alive."""
    return {name: service for name, service in noted(root).items() if service.alive}


def api(root: Path) -> str | None:
    """Return the API that runs report to: PREFECT_API_URL, else our own server if it runs, else None."""
    return api_of(running(root))


def api_of(services: Mapping[str, Service]) -> str | None:
    server = services.get("prefect")
    return os.environ.get("PREFECT_API_URL") or (f"{server.address}/api" if server else None)


def start(root: Path, name: str, command: list[str], port: int | None, services: dict[str, Service]) -> Service:
    """Start a child in its own session, and note it at once so that `down` always finds it."""
    stores = _stores(root) if name == "mlflow" else {}
    with (folder(root) / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env={**os.environ, MARK: mark_of(root, name), "PYTHONPATH": str(root), "FFN2MOE_ROOT": str(root), **stores},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(name, process.pid, psutil.Process(process.pid).create_time(), port)
    note(root, {**services, name: service})
    return service


def _stores(root: Path) -> dict[str, str]:
    """Return the stores of `mlflow server` for its environment: everybody can read its command line."""
    return {
        "MLFLOW_BACKEND_STORE_URI": default_tracking_uri(root),
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination(root),
    }


def mark_of(root: Path, name: str) -> str:
    return f"{name} of {root}"


def note(root: Path, services: dict[str, Service]) -> None:
    path = folder(root) / "state.json"
    if not services:
        path.unlink(missing_ok=True)
        return
    fresh = path.with_suffix(".partial")
    fresh.write_text(json.dumps([asdict(service) for service in services.values()], indent=2), encoding="utf-8")
    os.replace(fresh, path)


def refuse_to_move(service: Service, port: int | None) -> None:
    if port not in (None, service.port):
        raise FlowError(
            f"{service.name} runs already, at {service.address}; to move it: make down, then "
            f"make up {VARIABLES[service.name]}={port}"
        )


def refuse_taken(name: str, port: int) -> None:
    """Raise FlowError, with the process that holds the port, unless it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((HOST, port))
            return
        except OSError as error:
            reason = error.strerror
    holder = _holder(port)
    raise FlowError(
        f"port {port} for {name} cannot be used ({reason}); {holder or 'its process is hidden from this user'}; "
        f"stop that, or take another port: make up {VARIABLES[name]}={port + 1}"
    )


def _holder(port: int) -> str | None:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())[:100]
                return f"process {connection.pid} has it: {command}"
    except psutil.Error:
        return None
    return None


def wait(name: str, service: Service, root: Path, ready: Callable[[], bool]) -> None:
    """Wait until a service answers; FlowError with its last line if it ends or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if not service.alive:
            raise FlowError(f"{name} did not start: {_last_words(root, name)}")
        if time.monotonic() > deadline:
            raise FlowError(f"{name} does not answer after {PATIENCE:.0f} s: {_last_words(root, name)}")
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _last_words(root: Path, name: str) -> str:
    path = folder(root) / f"{name}.log"
    text = path.read_text(encoding="utf-8", errors="replace")[-20000:]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it printed nothing'} (log: {os.path.relpath(path)})"


def stop(root: Path, names: Sequence[str]) -> int:
    """End the services, the last started first; return the number of processes."""
    services = noted(root)
    count = 0
    if "worker" in names:
        # Its runs end first, while they can still report to the server.
        worker = services.get("worker")
        runs = [
            one for one in guardian.carriers(MARK, mark_of(root, "worker")) if worker is None or one.pid != worker.pid
        ]
        flows = [one for one in runs if "prefect.engine" in command_of(one) or "prefect.flow_engine" in command_of(one)]
        count += guardian.finish(flows, patience=20)
    for name in reversed(names):
        if (service := services.get(name)) and service.alive:
            count += guardian.finish([psutil.Process(service.pid)], patience=10)
        count += guardian.end(MARK, mark_of(root, name))
    return count


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
