"""The services that runs need to happen unattended: a Prefect server, a worker and an MLflow server, on loopback.

    python -m flows.service up [--prefect-port N] [--mlflow-port N] [--notify URL|off]
    python -m flows.service down
    python -m flows.service status

Their notes (who runs, on which port), logs and Prefect's database are in .prefect. Every process carries a mark
in its environment, so that none is left behind even when a note is lost.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from flows import guardian
from flows.environment import check_database, prefect_home, settle
from flows.workspace import BusyError, FlowError, check, commit
from tasks.stage import explain
from tasks.store import artifacts_destination, default_tracking_uri, mlflow_client, without_password

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
MARK = "FFN2MOE_SERVICE"
POOL = "ffn2moe"
DEPLOYMENT = "compress/scheduled"
AUTOMATION = "ffn2moe: a run failed"
WEBHOOK = "ffn2moe-failed-run"
PATIENCE = 300.0  # seconds a service may take to answer; it takes 5 to 10, on a busy machine much more
PORTS = {"prefect": 4200, "mlflow": 5000}
VARIABLES = {"prefect": "PREFECT_PORT", "mlflow": "MLFLOW_PORT"}  # of make
ORDER = ("prefect", "mlflow", "worker")
console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True)
class Service:
    """A process of ours: which one it is, when it started (so that another with its number is told apart)."""

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
    """Where the notes and the logs are."""
    return prefect_home(root) / "service"


def noted(root: Path) -> dict[str, Service]:
    """The services that the notes name, dead ones included."""
    try:
        notes = json.loads((folder(root) / "state.json").read_text(encoding="utf-8"))
        return {note["name"]: Service(**note) for note in notes}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):  # cut short by a kill or a full disk
        return {}


def running(root: Path) -> dict[str, Service]:
    """The services that are alive."""
    return {name: service for name, service in noted(root).items() if service.alive}


def api(root: Path) -> str | None:
    """The API that runs of this project report to: what PREFECT_API_URL says, else our own server's, if it runs."""
    return _api(running(root))


def _api(services: Mapping[str, Service]) -> str | None:
    server = services.get("prefect")
    return os.environ.get("PREFECT_API_URL") or (f"{server.address}/api" if server else None)


def _elsewhere(root: Path) -> dict[str, str]:
    """The servers that somebody else runs: their names and addresses."""
    given, uri = os.environ.get("PREFECT_API_URL"), default_tracking_uri(root)
    mine = running(root).get("prefect")
    found = {"prefect": given} if given and not (mine and given == f"{mine.address}/api") else {}
    return {**found, "mlflow": without_password(uri)} if uri.startswith("http") else found


# --- up -------------------------------------------------------------------------------------------


def up(root: Path, ports: dict[str, int | None], notify: str | None = None) -> None:
    """Starts what does not run yet, brings the deployment up to date, and tells where everything is.

    Raises FlowError with cause and remedy, and then nothing runs that did not run before.
    """
    check(root)
    with _alone(root):
        before = running(root)
        for name in sorted(noted(root).keys() - before.keys()):
            console.print(f"{name} had ended without `make down`; it is started again")
        services = dict(before)
        try:
            _start_servers(root, services, ports)
            url = _api(services)
            assert url is not None  # a server runs, or one is named
            os.environ["PREFECT_API_URL"] = url
            if "prefect" not in services:
                _refuse_shared(root)
            _deploy(root)
            if "worker" not in services:
                if "prefect" in services:
                    _close_dead_runs()
                services["worker"] = _start(root, "worker", _worker_command(root), None, services)
            _wait("worker", services["worker"], root, _worker_is_online)
            if notify is not None:
                _notify(None if notify == "off" else notify)
        except BaseException:
            _stop(root, [name for name in ORDER if name in services and name not in before])
            _note(root, before)
            raise
    _, dirty = commit(root)
    console.print("everything runs already" if len(before) == len(services) else "everything runs")
    status(root)
    if dirty:
        console.print(
            "tracked files differ from the last commit; runs use them as they are and are recorded as git.dirty: "
            "commit them for runs that can be repeated"
        )
    console.print(f"logs: {os.path.relpath(folder(root))}; API: {url}; stop everything: make down")


def _start_servers(root: Path, services: dict[str, Service], ports: dict[str, int | None]) -> None:
    """Prefect's and MLflow's, side by side, each unless it runs or an address elsewhere is given."""
    uri = default_tracking_uri(root)
    elsewhere = _elsewhere(root)
    commands = {
        "prefect": lambda port: ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)],
        "mlflow": lambda port: ["-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"],
    }
    api_elsewhere = elsewhere.get("prefect")
    if api_elsewhere and not _answers(f"{api_elsewhere}/health"):
        raise FlowError(
            f"no Prefect server answers at PREFECT_API_URL = {api_elsewhere}; start it, correct the address, or unset "
            "it for a server of this project's own"
        )
    missing = []
    for name in commands:
        if name in elsewhere:
            continue
        if name in services:
            _refuse_to_move(services[name], ports[name])
            continue
        guardian.end(MARK, _mark(root, name))  # what a killed server has left, on that port maybe
        _refuse_taken(name, ports[name] or PORTS[name])
        missing.append(name)
    if "prefect" in missing:
        check_database(root)
    mlflow_client(uri)  # makes the database, or says what is wrong with it
    for name in missing:
        port = ports[name] or PORTS[name]
        services[name] = _start(root, name, commands[name](port), port, services)
    health = {"prefect": "/api/health", "mlflow": "/health"}
    for name in missing:
        _wait(name, services[name], root, lambda name=name: _answers(services[name].address + health[name]))  # type: ignore[misc]


def _worker_command(root: Path) -> list[str]:
    guardian.end(MARK, _mark(root, "worker"))  # a run whose worker was killed would hold the workspace
    return ["-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", _worker_name()]


def _worker_name() -> str:
    return f"{POOL} on {socket.gethostname()}"


def _start(root: Path, name: str, command: list[str], port: int | None, services: dict[str, Service]) -> Service:
    """A child in a session of its own; noted at once, so that `down` finds it whatever happens next."""
    what = _stores(root) if name == "mlflow" else {}
    with (folder(root) / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env={**os.environ, MARK: _mark(root, name), "PYTHONPATH": str(root), "FFN2MOE_ROOT": str(root), **what},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(name, process.pid, psutil.Process(process.pid).create_time(), port)
    _note(root, {**services, name: service})
    return service


def _stores(root: Path) -> dict[str, str]:
    """What `mlflow server` keeps and where: in its environment, as everybody can read its command line."""
    return {
        "MLFLOW_BACKEND_STORE_URI": default_tracking_uri(root),
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination(root),
    }


def _mark(root: Path, name: str) -> str:
    return f"{name} of {root}"


def _note(root: Path, services: dict[str, Service]) -> None:
    path = folder(root) / "state.json"
    if not services:
        path.unlink(missing_ok=True)
        return
    fresh = path.with_suffix(".partial")
    fresh.write_text(json.dumps([asdict(service) for service in services.values()], indent=2), encoding="utf-8")
    os.replace(fresh, path)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One `up` or `down` at a time."""
    folder(root).mkdir(parents=True, exist_ok=True)
    with (folder(root) / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError("another `make up` or `make down` is at work here", "wait for it and try again") from None
        yield


def _refuse_to_move(service: Service, port: int | None) -> None:
    if port not in (None, service.port):
        raise FlowError(
            f"{service.name} runs already, at {service.address}; to move it: make down, then "
            f"make up {VARIABLES[service.name]}={port}"
        )


def _refuse_taken(name: str, port: int) -> None:
    """FlowError, naming who has the port, unless it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((HOST, port))
            return
        except OSError as error:
            reason = error.strerror
    holder = _holder(port)
    raise FlowError(
        f"port {port} for {name} cannot be used ({reason}); {holder or 'who has it is hidden from this user'}; "
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


def _wait(name: str, service: Service, root: Path, ready: Callable[[], bool]) -> None:
    """Until it answers; FlowError with what it said when it ends or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if not service.alive:
            raise FlowError(f"{name} did not start: {_last_words(root, name)}")
        if time.monotonic() > deadline:
            raise FlowError(f"{name} does not answer after {PATIENCE:.0f} s: {_last_words(root, name)}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _last_words(root: Path, name: str) -> str:
    path = folder(root) / f"{name}.log"
    text = path.read_text(encoding="utf-8", errors="replace")[-20000:]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it said nothing'} ({os.path.relpath(path)} has all of it)"


# --- what the server knows ------------------------------------------------------------------------


def _client() -> Any:
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def _deploy(root: Path) -> None:
    """The work pool and the deployments of prefect.yaml, as the file has them now."""
    from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    with _client() as client:
        template = ProcessWorker.get_default_base_job_template()
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=root,
        env={**os.environ, "FFN2MOE_ROOT": str(root), "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise FlowError(f"prefect.yaml could not be deployed: {said[-1] if said else 'no reason given'}")
    with _client() as client:  # a parameter that the flow does not have is refused at submission, too
        for one in client.read_deployments():
            if one.work_pool_name == POOL:
                closed = {**(one.parameter_openapi_schema or {}), "additionalProperties": False}
                client.update_deployment(one.id, DeploymentUpdate(parameter_openapi_schema=closed))


def _refuse_shared(root: Path) -> None:
    """FlowError where a server has the deployment of another workspace: the two would run each other's conversions."""
    from prefect.exceptions import ObjectNotFound

    with _client() as client:
        try:
            place = client.read_deployment_by_name(DEPLOYMENT).job_variables.get("working_dir")
        except ObjectNotFound:
            return
        machines = [name for name in _workers() if name != _worker_name()]
        if machines or place != str(root):
            raise FlowError(
                f"the Prefect server at {client.api_url} has {DEPLOYMENT} of another workspace already "
                f"({', '.join(machines) or place}); one server, one schedule: unset PREFECT_API_URL for a server of "
                f"this project's own, or, if the other one is over, prefect deployment delete {DEPLOYMENT}"
            )


def _worker_is_online() -> bool:
    return _worker_name() in _workers()


def _workers() -> list[str]:
    """The workers of our pool that are there."""
    with _client() as client:
        response = client.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": POOL}, json={}
        )
        return [one["name"] for one in response.json() if one["status"] == "ONLINE"]


def _close_dead_runs() -> None:
    """Runs that were going on when the machine or the worker went down hold their slot until they are ended."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    going_on = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=going_on))
    with _client() as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state)):
            if run.deployment_id is not None:
                message = "it was going on when its worker went down; the next run goes on from what is finished"
                client.set_flow_run_state(run.id, Crashed(message=message), force=True)
                console.print(f"the run {run.name} was cut off and is closed")


def _notify(url: str | None) -> None:
    """From now on a failed run is told to `url`, as JSON with `text`; None: to nobody."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    with _client() as client:
        for automation in client.read_automations_by_name(AUTOMATION):
            client.delete_automation(automation.id)
        if url is None:
            return
        if not re.match(r"https?://[^/]+", url):
            raise FlowError(f"NOTIFY = {url!r} is no address; give http://... or https://..., or off")
        message = {"text": "{{subject}}\n{{body}}"}  # what chat services expect of a webhook
        block = CustomWebhookNotificationBlock(name=POOL, url=url, json_data=message)
        block_id = block.save(WEBHOOK, overwrite=True)
        client.create_automation(
            AutomationCore(
                name=AUTOMATION,
                description="made by `make up NOTIFY=URL`, removed by `make up NOTIFY=off`",
                trigger=EventTrigger(
                    expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")},
                    match={"prefect.resource.id": "prefect.flow-run.*"},
                    # Of runs that nobody watches: those of a deployment.
                    match_related={"prefect.resource.id": "prefect.deployment.*"},
                    posture=Posture.Reactive,
                    threshold=1,
                ),
                actions=[
                    SendNotification(
                        block_document_id=block_id,
                        subject="{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}",
                        body="{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
                    )
                ],
            )
        )


# --- down -----------------------------------------------------------------------------------------


def down(root: Path) -> None:
    """Stops all of it, a run that is going on included; it goes on from its checkpoint the next time."""
    with _alone(root):
        names = [name for name in ORDER if name in noted(root)]
        stopped = _stop(root, list(ORDER))
        _note(root, {})
    console.print(f"stopped: {', '.join(names)}" if names or stopped else "nothing runs")


def _stop(root: Path, names: Sequence[str]) -> int:
    """Ends the services, the last started first; how many processes that were."""
    services = noted(root)
    count = 0
    if "worker" in names:
        # Its runs first, while the server can still be told how they end.
        worker = services.get("worker")
        runs = [
            one for one in guardian.carriers(MARK, _mark(root, "worker")) if worker is None or one.pid != worker.pid
        ]
        flows = [one for one in runs if "prefect.engine" in _command(one) or "prefect.flow_engine" in _command(one)]
        count += guardian.finish(flows, patience=20)
    for name in reversed(names):
        if (service := services.get(name)) and service.alive:
            count += guardian.finish([psutil.Process(service.pid)], patience=10)
        count += guardian.end(MARK, _mark(root, name))
    return count


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


# --- status ---------------------------------------------------------------------------------------


def status(root: Path) -> bool:
    """Prints what runs, when the next run is, how the last one ended; False unless all of it runs."""
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
            table.add_row(name, where, f"process {service.pid}, since {_time(service.started)}")
    url = api(root)
    if url and _answers(f"{url}/health"):
        os.environ["PREFECT_API_URL"] = url
        for row in _schedule():
            table.add_row(*row)
    console.print(table)
    if missing := [name for name in ORDER if name not in services and name not in elsewhere]:
        console.print(f"to start {' and '.join(missing)}: make up")
    return not missing


def _schedule() -> Iterator[tuple[str, ...]]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound

    with _client() as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            yield "schedule", f"{DEPLOYMENT} is not deployed; make up does it"
            return
        mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))

        def runs(states: list[str], sort: FlowRunSort, limit: int = 1) -> list[Any]:
            wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": states}}})
            return client.read_flow_runs(deployment_filter=mine, flow_run_filter=wanted, sort=sort, limit=limit)

        schedules = [str(getattr(one.schedule, "cron", one.schedule)) for one in deployment.schedules if one.active]
        yield "schedule", f"{DEPLOYMENT}, {' and '.join(schedules) or 'none is active'}"
        for run in runs(["RUNNING", "PENDING"], FlowRunSort.START_TIME_DESC):
            yield "now", f"{run.name}, since {_time(run.start_time or run.expected_start_time)}"
        if queued := runs(["SCHEDULED"], FlowRunSort.EXPECTED_START_TIME_ASC):
            late = "as soon as it can: it waits in the queue" if queued[0].state_name != "Scheduled" else ""
            yield "next run", late or _time(queued[0].expected_start_time)
        for run in runs(["COMPLETED", "FAILED", "CRASHED", "CANCELLED"], FlowRunSort.END_TIME_DESC):
            told = f": {run.state.message}" if run.state.message else ""
            yield "last run", f"{run.state_name}, {_time(run.end_time)}{told}"
        watched = any(automation.enabled for automation in client.read_automations_by_name(AUTOMATION))
        yield (
            "failed runs",
            "are told to the webhook" if watched else "are told to nobody; make up NOTIFY=URL changes that",
        )


def _time(moment: float | datetime | None) -> str:
    if moment is None:
        return "?"
    if not isinstance(moment, datetime):
        moment = datetime.fromtimestamp(moment, UTC)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.service", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="start what does not run yet; prints the addresses")
    starting.add_argument("--prefect-port", type=int, metavar="N")
    starting.add_argument("--mlflow-port", type=int, metavar="N")
    starting.add_argument(
        "--notify", metavar="URL", help="tell failed runs to this webhook from now on; off: to nobody"
    )
    commands.add_parser("down", help="stop everything")
    commands.add_parser("status", help="what runs, the next run, the last one's result; 1 unless all of it runs")
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
        message = str(error) if isinstance(error, FlowError) else explain(error)
        if message is None or os.environ.get("FFN2MOE_DEBUG"):
            raise
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 2


if __name__ == "__main__":
    sys.exit(main())
