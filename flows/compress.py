"""The whole pipeline: a dense model in; a measured, exported, registered mixture of experts out.

    python -m flows.compress [KEY=VALUE ...]

DVC owns the graph and the cache; this flow decides when and again; MLflow keeps the record. With settings on
the command line the run happens in a workspace of its own (.workspaces/NAME); the committed one stays clean.
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
from flows.service import api

ROOT = Path(__file__).resolve().parent.parent

settle(ROOT)
if _address := api(ROOT):  # `make up` has started a server: runs are shown there, and none is started for each
    os.environ.setdefault("PREFECT_API_URL", _address)

from prefect import flow, runtime, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.logging import get_run_logger  # noqa: E402
from prefect.states import Completed, State  # noqa: E402
from rich.console import Console  # noqa: E402

from flows import dvc, summary  # noqa: E402
from flows.guardian import MARK, guard  # noqa: E402
from flows.progress import Board  # noqa: E402
from flows.promote import promote  # noqa: E402
from flows.workspace import (  # noqa: E402
    BusyError,
    FlowError,
    Workspace,
    bring_back,
    check,
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
from tasks.stage import explain, remove  # noqa: E402
from tasks.store import default_tracking_uri, mlflow_client  # noqa: E402

_STOPPED = "stopped; what is finished is kept, and the same command goes on from there"
console = Console(width=None if sys.stdout.isatty() else 110)


def _is_busy(task: Any, run: Any, state: State) -> bool:
    return isinstance(state.data, BusyError)


# No Prefect cache and no persisted result: DVC has both, and two caches disagree.
@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=3,
    retry_delay_seconds=10,
    retry_condition_fn=_is_busy,
)
def bring_up_to_date(stage: str, workspace: Workspace, environment: dict[str, str], board: Board) -> State:
    """One stage by DVC; the state is named Cached, Restored or Completed."""
    logger = get_run_logger()

    def tell(line: str) -> None:
        logger.info(line)
        board.line(stage, line)

    board.begin(stage)
    outcome = dvc.reproduce(
        stage,
        workspace.root,
        environment,
        tell,
        on_start=lambda: board.runs(stage),
        force=_left_the_registry(stage, workspace),
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
    """Runs every stage in order and records it; ends as Cached if nothing changed, else as Completed.

    The state's data are stage -> Cached, Restored or Completed.

    settings: of this run only; what is out of range is refused at submission. overrides: the same as KEY=VALUE, as
    typed at a terminal. called_from: the folder their paths are relative to. wait_minutes: for another run in the
    same workspace to end; stage_hours: longest that one stage may take (None: as long as it likes).
    Raises FlowError (also ParamsError) with cause and remedy; what was good before is there afterwards.
    """
    check(ROOT)
    _guardian = None if MARK in os.environ else guard(ROOT)  # held on to: it acts when this end of its pipe closes
    chosen = [*(settings.assignments() if settings else ()), *(overrides or ())]
    if chosen:
        workspace = isolate(ROOT, chosen, Path(called_from or ROOT))
        _tell(f"settings of this run only: a workspace of its own, {workspace.root.relative_to(ROOT)}")
    else:
        workspace = Workspace(ROOT, ROOT, load_params(ROOT / "params.yaml").name)
    with lock(workspace.root, wait_minutes * 60, _tell):
        outcomes, told = _run(workspace, stage_hours)
    unchanged = set(outcomes.values()) == {"Cached"}
    return Completed(name="Cached" if unchanged else "Completed", message=told, data=outcomes)


def _run(workspace: Workspace, stage_hours: float | None) -> tuple[dict[str, str], str]:
    """Stage -> outcome, and a line on what was found and done."""
    head, dirty = commit(workspace.source)
    if dirty:
        _tell("tracked files differ from the last commit: the run is recorded as git.dirty; commit them to repeat it")
    settings = " ".join(workspace.overrides)
    tags = {"git.commit": head, "git.dirty": str(dirty).lower(), "settings": settings}
    record = PipelineRecord.start(workspace.source, workspace.name, tags)
    environment = {
        **record.environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FFN2MOE_GIT_COMMIT": head,
        "FFN2MOE_GIT_DIRTY": str(dirty).lower(),
    }
    if DASK in os.environ:  # one server for all work on layers: workers stay with the first that they tell of it
        with get_client(sync_client=True) as client:
            environment["PREFECT_API_URL"] = str(client.api_url)
    stages = dvc.stages(workspace.root)
    outcomes: dict[str, str] = {}
    stage_task = bring_up_to_date.with_options(timeout_seconds=stage_hours and stage_hours * 3600)
    before = _inputs(workspace.root)
    try:
        with (
            Board(stages, workspace.source / ".cache" / "durations.json", console) as board,
            kept(workspace.root, workspace.name),
        ):
            for stage in stages:
                state = stage_task(stage, workspace, environment, board, return_state=True)
                if not state.is_completed():
                    raise _failure(stage, state)
                outcomes[stage] = state.name or "Completed"
                fingerprint = _fingerprint(dvc.locked(workspace.root, stage))
                record.link(stage, fingerprint, ran=state.name == "Completed")
        if workspace.isolated:
            bring_back(workspace)
        params = load_params(workspace.root / "params.yaml")
        decision = promote(params.model_name, params.gate, anew=False)
        if set(outcomes.values()) == {"Cached"} and runtime.deployment.id:
            record.discard()  # a schedule that finds nothing to do, hour after hour, is no experiment
        else:
            record.log(
                workspace.root,
                params,
                _datasets(workspace.root),
                {"promotion": decision.told(), **{f"outcome.{stage}": outcome for stage, outcome in outcomes.items()}},
            )
            record.finish("FINISHED")
    except Exception as error:
        record.finish("FAILED", str(error))
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        record.finish("KILLED")
        raise
    told = f"{_verdict(outcomes, before, _inputs(workspace.root))}; {decision.told()}"
    _publish(workspace.name, outcomes, told)
    summary.show(workspace, decision, default_tracking_uri(workspace.source), console)
    if workspace.isolated:
        remove(workspace.root)  # its results are in exports/NAME and, for the next run like it, in the DVC cache
    return outcomes, told


def _tell(line: str) -> None:
    """To the terminal, and to the log that the API keeps."""
    console.print(line, highlight=False, markup=False)
    get_run_logger().info(line)


def _inputs(root: Path) -> dict[str, Any]:
    """What the stage `inputs` last saw outside the workspace: the teacher, the corpus, the data."""
    path = root / "data" / "inputs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _verdict(outcomes: dict[str, str], before: dict[str, Any], after: dict[str, Any]) -> str:
    """One line on what a run found and did."""
    done = [stage for stage, outcome in outcomes.items() if outcome != "Cached"]
    if not done:
        return f"nothing changed: all {len(outcomes)} stages are Cached"
    changed = [key for key in after if before and before.get(key) != after[key]]
    cause = f"changed: {', '.join(changed)}" if changed else "parameters, code or results changed"
    return f"{cause if before else 'a first run'}; {len(done)} of {len(outcomes)} stages ran ({', '.join(done)})"


def _publish(name: str, outcomes: dict[str, str], told: str) -> None:
    """The outcome as an artifact, where the API shows what runs made."""
    rows = "\n".join(f"| {stage} | {outcome} |" for stage, outcome in outcomes.items())
    create_markdown_artifact(
        key="outcome",
        description=f"{name}: {told}",
        markdown=f"**{name}**: {told}\n\n| stage | outcome |\n|---|---|\n{rows}\n",
    )


def _failure(stage: str, state: State) -> BaseException:
    """The exception that ended a task, or one that says how it ended."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, TimeoutError):
        return FlowError(
            f"{stage} took longer than a stage may ({error}); if that is too short, raise stage_hours in prefect.yaml "
            "and `make up`; the next run goes on from its last checkpoint"
        )
    return error if isinstance(error, BaseException) else FlowError(f"{stage} ended as {state.name}: {state.message}")


def _left_the_registry(stage: str, workspace: Workspace) -> bool:
    """Whether `register` is cached but its version is not in the registry: the database was removed."""
    path = workspace.root / "metrics" / "register.json"
    if stage != "register" or not path.is_file():
        return False
    registered = json.loads(path.read_text(encoding="utf-8"))
    return not Registry(workspace.source, registered["model"]).holds(registered["version"])


def _fingerprint(locked: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(locked, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _datasets(root: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The data sets `prepare` made: path -> DVC's hash, and what its metrics say of them."""
    counts = root / "metrics" / "prepare.json"
    profile = json.loads(counts.read_text(encoding="utf-8")) if counts.is_file() else {}
    outs = dvc.locked(root, "prepare").get("outs", [])
    return {out["path"]: (out["md5"], profile) for out in outs if out["path"] in ("data/corpus", "data/benchmarks")}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.compress",
        description="Runs the whole pipeline: a dense model in; an exported, registered mixture out.",
        epilog="Settings make a run of its own in .workspaces/NAME; its results come back to exports/NAME.",
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for example decompose.num_experts=16")
    settings = parser.parse_args(arguments).settings
    signal.signal(signal.SIGTERM, _terminated)
    try:
        check(ROOT)
        if "PREFECT_API_URL" not in os.environ:
            check_database(ROOT)
        plan(ROOT, settings, Path.cwd())  # what is wrong with the settings is said before anything starts
        mlflow_client(default_tracking_uri(ROOT))  # and with the run record
        _guardian = guard(ROOT)  # held on to: it acts when this end of its pipe closes
        compress(overrides=settings, called_from=str(Path.cwd()))
        return 0
    except KeyboardInterrupt:
        console.print(_STOPPED)
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, FlowError) else _explain_prefect(error) or explain(error)
        if message is None or os.environ.get("FFN2MOE_DEBUG"):
            raise
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 2


def _terminated(number: int, frame: object) -> None:
    console.print(_STOPPED)
    sys.exit(128 + number)


def _explain_prefect(error: Exception) -> str | None:
    api = os.environ.get("PREFECT_API_URL")
    text = f"{type(error).__name__}: {error}"
    if api and any(word in text for word in ("ConnectError", "Failed to reach API", "ConnectTimeout")):
        return f"no Prefect server answers at PREFECT_API_URL = {api}; run `prefect server start`, or unset it"
    if "ephemeral" in text.lower() or "subprocess server" in text.lower():
        return (
            f"Prefect's own server did not start ({error}); if a port is taken or the machine is busy, run "
            "again, or run the stages without Prefect: make repro"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
