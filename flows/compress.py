"""Run the whole pipeline: a dense model in; a measured, exported, registered mixture of experts out.

    python -m flows.compress [KEY=VALUE ...]

DVC owns the graph and the cache; this flow decides when to run and when to run again; MLflow keeps the record. A run
with settings on the command line has its own workspace (.workspaces/NAME); the committed one stays clean.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flows.environment import check_database, settle
from flows.processes import api

ROOT = Path(__file__).resolve().parent.parent

settle(ROOT)
if _address := api(ROOT):  # `make up` started a server: use it, and start none for each run
    os.environ.setdefault("PREFECT_API_URL", _address)

from prefect import flow, runtime, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.logging import get_run_logger  # noqa: E402
from prefect.states import Completed, State  # noqa: E402
from rich.console import Console  # noqa: E402

from flows import dvc, summary, target  # noqa: E402
from flows.errors import STOPPED, report  # noqa: E402
from flows.guardian import MARK, guard  # noqa: E402
from flows.own_server import own_server  # noqa: E402
from flows.progress import Board  # noqa: E402
from flows.promote import promote  # noqa: E402
from flows.workspace import (  # noqa: E402
    BusyError,
    FlowError,
    Workspace,
    bring_back,
    check,
    check_inputs,
    commit,
    isolate,
    kept,
    lock,
    plan,
)
from tasks.layer_map import DASK  # noqa: E402
from tasks.params import Settings, load_params  # noqa: E402
from tasks.record import PipelineRecord  # noqa: E402
from tasks.registry import Registry  # noqa: E402
from tasks.stage import USER_ERROR, remove  # noqa: E402
from tasks.store import default_tracking_uri, mlflow_client  # noqa: E402

console = Console(width=None if sys.stdout.isatty() else 110, markup=False)


def _is_busy(task: Any, run: Any, state: State) -> bool:
    return isinstance(state.data, BusyError)


# Prefect caches nothing and persists no result: DVC does both, and two caches would disagree.
@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=3,
    retry_delay_seconds=10,
    retry_condition_fn=_is_busy,
)
def bring_up_to_date(
    stage: str, workspace: Workspace, environment: dict[str, str], board: Board, *, unchanged: bool = False
) -> State:
    """Bring a stage up to date by DVC; the name of the state is Cached, Restored or Completed.

    unchanged: DVC has said already that nothing is to do.
    """
    logger = get_run_logger()

    def pass_on(line: str) -> None:
        logger.info(line)
        board.line(stage, line)

    board.begin(stage)
    force = _left_the_registry(stage, workspace)
    if unchanged and not force:
        outcome: dvc.Outcome = "Cached"
    else:
        outcome = dvc.reproduce(
            stage, workspace.root, environment, pass_on, on_start=lambda: board.runs(stage), force=force
        )
    board.end(stage, outcome)
    return Completed(name=outcome, message=f"{stage}: {outcome}")


@flow(name="compress", persist_result=False, log_prints=False)
def compress(
    settings: Settings | None = None,
    overrides: list[str] | None = None,
    called_from: str | None = None,
    wait_minutes: Annotated[int, Field(ge=0, le=10080)] = 0,
    stage_hours: Annotated[float, Field(gt=0, le=720)] | None = None,
) -> State:
    """Run every stage in order and record the run; it ends as Cached if nothing changed, else as Completed.

    The data of the state are stage -> Cached, Restored or Completed.

    settings: of this run only; the server refuses values out of range. overrides: the same as KEY=VALUE, as typed at a
    terminal. called_from: the folder of relative paths. wait_minutes: how long to wait for another run in the same
    workspace. stage_hours: limit for one stage (None: no limit). FlowError (also ParamsError) with cause and remedy;
    earlier results survive an error.
    """
    check(ROOT)
    _guardian = None if MARK in os.environ else guard(ROOT)  # keep it: it acts when this end of its pipe closes
    chosen = [*(settings.assignments() if settings else ()), *(overrides or ())] or target.committed(ROOT)
    if chosen:
        workspace = isolate(ROOT, chosen, Path(called_from or ROOT))
        for line in target.lines(ROOT, chosen):
            _say(line)
        _say(f"settings of this run only: it has its own workspace, {workspace.root.relative_to(ROOT)}")
    else:
        workspace = Workspace(ROOT, ROOT, load_params(ROOT / "params.yaml").name)
    with lock(workspace.root, wait_minutes * 60, _say):
        outcomes, message = _run(workspace, stage_hours)
    unchanged = set(outcomes.values()) == {"Cached"}
    return Completed(name="Cached" if unchanged else "Completed", message=message, data=outcomes)


def _run(workspace: Workspace, stage_hours: float | None) -> tuple[dict[str, str], str]:
    """Run the stages; return stage -> outcome, and a line on what changed and what ran."""
    head, dirty = commit(workspace.source)
    if dirty:
        _say("tracked files differ from the last commit: the run is recorded as git.dirty; commit them to repeat it")
    settings = " ".join(workspace.overrides)
    tags = {"git.commit": head, "git.dirty": str(dirty).lower(), "settings": settings}
    record = PipelineRecord.start(workspace.source, workspace.name, tags)
    environment = _environment(record, head, dirty)
    stages = dvc.stages(workspace.root)
    always = dvc.always_changed(workspace.root)
    unchanged: list[str] | None = None  # asked when the stages that always run have run
    outcomes: dict[str, str] = {}
    stage_task = bring_up_to_date.with_options(timeout_seconds=stage_hours and stage_hours * 3600)
    before = _inputs(workspace.root)
    try:
        with (
            Board(stages, workspace.source / ".cache" / "durations.json", console) as board,
            kept(workspace.root, workspace.name),
        ):
            for place, stage in enumerate(stages):
                if unchanged is None and stage not in always:
                    unchanged = dvc.up_to_date(workspace.root, stages[place:], environment)
                known = stage in (unchanged or ())
                state = stage_task(stage, workspace, environment, board, unchanged=known, return_state=True)
                if not state.is_completed():
                    raise _failure(stage, state)
                outcomes[stage] = state.name or "Completed"
                fingerprint = _fingerprint(dvc.locked(workspace.root, stage))
                record.link(stage, fingerprint, ran=state.name == "Completed")
        if workspace.isolated:
            bring_back(workspace)
        params = load_params(workspace.root / "params.yaml")
        decision = promote(params.model_name, params.gate, again=False)
        if set(outcomes.values()) == {"Cached"} and runtime.deployment.id:
            record.discard()  # a scheduled run that finds nothing to do is not an experiment
        else:
            record.log(
                workspace.root,
                params,
                _datasets(workspace.root),
                {
                    "promotion": decision.message(),
                    **{f"outcome.{stage}": outcome for stage, outcome in outcomes.items()},
                },
            )
            record.finish("FINISHED")
    except Exception as error:
        record.finish("FAILED", str(error))
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        record.finish("KILLED")
        raise
    message = f"{_verdict(outcomes, before, _inputs(workspace.root))}; {decision.message()}"
    _publish(workspace.name, outcomes, message)
    summary.show(workspace, decision, default_tracking_uri(workspace.source), console)
    if workspace.isolated:
        remove(workspace.root)  # its results are in exports/NAME and in the cache of DVC
    return outcomes, message


def _environment(record: PipelineRecord, head: str, dirty: bool) -> dict[str, str]:
    """Return the environment of the stages."""
    environment = {
        **record.environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FFN2MOE_GIT_COMMIT": head,
        "FFN2MOE_GIT_DIRTY": str(dirty).lower(),
    }
    if DASK in os.environ:  # one server for all work on layers: Dask workers keep the first one they see
        with get_client(sync_client=True) as client:
            environment["PREFECT_API_URL"] = str(client.api_url)
    return environment


def _say(line: str) -> None:
    """Print a line, and put it into the log of the API."""
    console.print(line, highlight=False)
    get_run_logger().info(line)


def _inputs(root: Path) -> dict[str, Any]:
    """Return what the stage `inputs` last saw outside the workspace: the teacher, the corpus, the data."""
    path = root / "data" / "inputs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _verdict(outcomes: dict[str, str], before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return a line on what changed and what ran."""
    done = [stage for stage, outcome in outcomes.items() if outcome != "Cached"]
    if not done:
        return f"nothing changed: all {len(outcomes)} stages are Cached"
    changed = [key for key in after if before and before.get(key) != after[key]]
    cause = f"changed: {', '.join(changed)}" if changed else "parameters, code or results changed"
    return f"{cause if before else 'a first run'}; {len(done)} of {len(outcomes)} stages ran ({', '.join(done)})"


def _publish(name: str, outcomes: dict[str, str], message: str) -> None:
    """Publish the outcome as an artifact of the run."""
    rows = "\n".join(f"| {stage} | {outcome} |" for stage, outcome in outcomes.items())
    create_markdown_artifact(
        key="outcome",
        description=f"{name}: {message}",
        markdown=f"**{name}**: {message}\n\n| stage | outcome |\n|---|---|\n{rows}\n",
    )


def _failure(stage: str, state: State) -> BaseException:
    """Return the exception that ended a task, or one that says how it ended."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, TimeoutError):
        return FlowError(
            f"{stage} took longer than a stage may ({error}); to allow more, raise stage_hours in prefect.yaml and run "
            "`make up`; the next run resumes from the last checkpoint"
        )
    return error if isinstance(error, BaseException) else FlowError(f"{stage} ended as {state.name}: {state.message}")


def _left_the_registry(stage: str, workspace: Workspace) -> bool:
    """Return whether `register` is cached but the registry lacks its version: the database was removed."""
    path = workspace.root / "metrics" / "register.json"
    if stage != "register" or not path.is_file():
        return False
    registered = json.loads(path.read_text(encoding="utf-8"))
    return not Registry(workspace.source, registered["model"]).holds(registered["version"])


def _fingerprint(locked: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(locked, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _datasets(root: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the data sets of `prepare`: path -> hash of DVC, and their metrics."""
    counts = root / "metrics" / "prepare.json"
    profile = json.loads(counts.read_text(encoding="utf-8")) if counts.is_file() else {}
    outs = dvc.locked(root, "prepare").get("outs", [])
    return {out["path"]: (out["md5"], profile) for out in outs if out["path"] in ("data/corpus", "data/benchmarks")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.compress",
        description="Run the whole pipeline: a dense model in; an exported, registered mixture out.",
        epilog="A run with settings has its own workspace .workspaces/NAME; its results go to exports/NAME.",
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for example decompose.num_experts=16")
    settings = parser.parse_args(arguments).settings
    signal.signal(signal.SIGTERM, _terminated)
    try:
        check(ROOT)
        if "PREFECT_API_URL" not in os.environ:
            check_database(ROOT)
        raw, _ = plan(
            ROOT, settings or target.committed(ROOT), Path.cwd()
        )  # raises for wrong settings before anything starts
        if not check_inputs(ROOT, raw):
            return USER_ERROR
        _guardian = guard(ROOT)  # keep it: it acts when this end of its pipe closes
        with own_server() as wait:
            mlflow_client(default_tracking_uri(ROOT))  # raises for a run record that cannot be used
            wait()
            compress(overrides=settings, called_from=str(Path.cwd()))
        return 0
    except KeyboardInterrupt:
        console.print(STOPPED)
        return 130
    except Exception as error:
        return report(error, None if isinstance(error, FlowError) else _explain_prefect(error))


def _terminated(number: int, frame: object) -> None:
    console.print(STOPPED)
    sys.exit(128 + number)


def _explain_prefect(error: Exception) -> str | None:
    api = os.environ.get("PREFECT_API_URL")
    text = f"{type(error).__name__}: {error}"
    if api and any(word in text for word in ("ConnectError", "Failed to reach API", "ConnectTimeout")):
        return f"no Prefect server answers at PREFECT_API_URL = {api}; run `prefect server start`, or unset it"
    return None


if __name__ == "__main__":
    sys.exit(main())
