"""Deploy, watch and clean up on the Prefect server."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.workspace import FlowError

POOL = "ffn2moe"
DEPLOYMENT = "compress/scheduled"
AUTOMATION = "ffn2moe: a run failed"
WEBHOOK = "ffn2moe-failed-run"


def prefect_client() -> Any:
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def deploy(root: Path) -> None:
    """Create the work pool, and update the deployments from prefect.yaml."""
    from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    with prefect_client() as client:
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
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise FlowError(f"prefect.yaml could not be deployed: {lines[-1] if lines else 'no reason given'}")
    with prefect_client() as client:  # the server then also refuses parameters that the flow does not have
        for one in client.read_deployments():
            if one.work_pool_name == POOL:
                closed = {**(one.parameter_openapi_schema or {}), "additionalProperties": False}
                client.update_deployment(one.id, DeploymentUpdate(parameter_openapi_schema=closed))


def refuse_shared(root: Path) -> None:
    """Raise FlowError if the server has the deployment of another workspace: they would run each other's runs."""
    from prefect.exceptions import ObjectNotFound

    with prefect_client() as client:
        try:
            place = client.read_deployment_by_name(DEPLOYMENT).job_variables.get("working_dir")
        except ObjectNotFound:
            return
        machines = [name for name in _workers() if name != worker_name()]
        if machines or place != str(root):
            raise FlowError(
                f"the Prefect server at {client.api_url} has {DEPLOYMENT} of another workspace already "
                f"({', '.join(machines) or place}); one server, one schedule: unset PREFECT_API_URL for this project's "
                f"own server, or, if the other workspace is gone, prefect deployment delete {DEPLOYMENT}"
            )


def worker_name() -> str:
    return f"{POOL} on {socket.gethostname()}"


def worker_is_online() -> bool:
    return worker_name() in _workers()


def _workers() -> list[str]:
    """Return the names of the online workers of our pool."""
    with prefect_client() as client:
        response = client.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": POOL}, json={}
        )
        return [one["name"] for one in response.json() if one["status"] == "ONLINE"]


def close_dead_runs() -> list[str]:
    """Close the runs of a machine or worker that went down: they hold their slot until they end. Return their names."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    closed: list[str] = []
    unfinished = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=unfinished))
    with prefect_client() as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state)):
            if run.deployment_id is not None:
                message = "its worker went down; the next run resumes from the finished stages"
                client.set_flow_run_state(run.id, Crashed(message=message), force=True)
                closed.append(run.name)
    return closed


def notify(url: str | None) -> None:
    """Send failed runs to `url` from now on, as JSON with `text`; None sends nothing."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    with prefect_client() as client:
        for automation in client.read_automations_by_name(AUTOMATION):
            client.delete_automation(automation.id)
        if url is None:
            return
        if not re.match(r"https?://[^/]+", url):
            raise FlowError(f"NOTIFY = {url!r} is not an address; give http://... or https://..., or off")
        message = {"text": "{{subject}}\n{{body}}"}  # the form that chat services read
        block = CustomWebhookNotificationBlock(name=POOL, url=url, json_data=message)
        block_id = block.save(WEBHOOK, overwrite=True)
        client.create_automation(
            AutomationCore(
                name=AUTOMATION,
                description="made by `make up NOTIFY=URL`, removed by `make up NOTIFY=off`",
                trigger=EventTrigger(
                    expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")},
                    match={"prefect.resource.id": "prefect.flow-run.*"},
                    # Runs of a deployment only: nobody watches those.
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


def schedule() -> Iterator[tuple[str, ...]]:
    """Yield lines on the schedule, the present, the next and the last run, and who hears of failed runs."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound

    with prefect_client() as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            yield "schedule", f"{DEPLOYMENT} is not deployed: run make up"
            return
        mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))

        def runs(states: list[str], sort: FlowRunSort, limit: int = 1) -> list[Any]:
            wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": states}}})
            return client.read_flow_runs(deployment_filter=mine, flow_run_filter=wanted, sort=sort, limit=limit)

        schedules = [str(getattr(one.schedule, "cron", one.schedule)) for one in deployment.schedules if one.active]
        yield "schedule", f"{DEPLOYMENT}, {' and '.join(schedules) or 'none is active'}"
        for run in runs(["RUNNING", "PENDING"], FlowRunSort.START_TIME_DESC):
            yield "now", f"{run.name}, since {time_of(run.start_time or run.expected_start_time)}"
        if queued := runs(["SCHEDULED"], FlowRunSort.EXPECTED_START_TIME_ASC):
            late = "as soon as it can: it waits in the queue" if queued[0].state_name != "Scheduled" else ""
            yield "next run", late or time_of(queued[0].expected_start_time)
        for run in runs(["COMPLETED", "FAILED", "CRASHED", "CANCELLED"], FlowRunSort.END_TIME_DESC):
            message = f": {run.state.message}" if run.state.message else ""
            yield "last run", f"{run.state_name}, {time_of(run.end_time)}{message}"
        watched = any(automation.enabled for automation in client.read_automations_by_name(AUTOMATION))
        yield "failed runs", "go to the webhook" if watched else "notify nobody; to change that: make up NOTIFY=URL"


def time_of(moment: float | datetime | None) -> str:
    if moment is None:
        return "?"
    if not isinstance(moment, datetime):
        moment = datetime.fromtimestamp(moment, UTC)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
