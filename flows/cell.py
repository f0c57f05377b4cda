"""Run one cell of a sweep in its own process: an error, or a lack of memory, costs this cell alone.

python -m flows.cell make JOB.json      the stages whose results are the same bytes everywhere
python -m flows.cell measure JOB.json   the stages with measured times, alone; the results go to exports/NAME
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffn2moe.planning.shipping import complete
from flows import dvc
from flows.workspace import FlowError, Workspace, bring_back, commit, isolate, lock
from tasks.params import load_params
from tasks.stage import explain

MEASURED = ("benchmark", "report")  # they need the machine alone; `register` is for a chosen cell


def make(job: dict[str, Any]) -> None:
    """Bring every stage before `benchmark` up to date in the workspace of the cell."""
    source, record = Path(job["source"]), Path(job["record"])
    workspace = isolate(source, job["settings"], Path(job["called_from"]))
    with lock(workspace.root):
        stages = before_measuring(dvc.stages(workspace.root))
        # The first cell does what several have in common; the others find it in the cache.
        for stage, wanted in zip(stages, fingerprints(workspace.root, stages), strict=True):
            with _one_at_a_time(record.parent / "locks" / f"{stage}-{wanted}"):
                _reproduce(stage, workspace)


def measure(job: dict[str, Any]) -> None:
    """Time the plans of the cell, write its report, and put everything into exports/NAME."""
    source, record = Path(job["source"]), Path(job["record"])
    workspace = isolate(source, job["settings"], Path(job["called_from"]))
    with lock(workspace.root):
        for stage in (stage for stage in dvc.stages(workspace.root) if stage in MEASURED):
            _reproduce(stage, workspace)
        # The session that compares the cells reads the texts of their evaluation.
        texts = workspace.root / "data" / "corpus" / "evaluation.jsonl"
        if texts.is_file():
            shutil.copy2(texts, record / "texts.jsonl")
        # A front judges the plans by them.
        benchmarks = workspace.root / "data" / "benchmarks"
        if benchmarks.is_dir():
            shutil.copytree(benchmarks, record / "benchmarks", dirs_exist_ok=True)
        bring_back(workspace)
        # The session times plans that no cell chose, and the dense ones.
        if (workspace.root / "models" / "exported").is_dir():
            complete(workspace.export, workspace.root / "models" / "exported")


def before_measuring(stages: Sequence[str]) -> list[str]:
    """Return the stages before the first that measures times."""
    measured = [stages.index(stage) for stage in MEASURED if stage in stages]
    return list(stages[: min(measured, default=len(stages))])


def fingerprints(root: Path, stages: Sequence[str]) -> list[str]:
    """Return a fingerprint for each stage: two cells with the same one get the same bytes.

    It covers every parameter that the stage or a stage before it reads.
    """
    values = load_params(root / "params.yaml").flat()
    digest = hashlib.sha256()
    found = []
    for stage in stages:
        for key in dvc.parameters(root, stage):
            own = {one: value for one, value in values.items() if one == key or one.startswith(f"{key}.")}
            digest.update(json.dumps([key, own], sort_keys=True, default=str).encode())
        found.append(digest.hexdigest()[:16])
    return found


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _reproduce(stage: str, workspace: Workspace) -> None:
    head, dirty = commit(workspace.source)
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FFN2MOE_GIT_COMMIT": head,
        "FFN2MOE_GIT_DIRTY": str(dirty).lower(),
    }
    outcome = dvc.reproduce(stage, workspace.root, environment, _say)
    _say(f"{stage} {outcome}")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit code: 0 done, 2 with the reason in the last line."""
    signal.signal(signal.SIGTERM, _terminated)
    step, path = arguments
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        {"make": make, "measure": measure}[step](job)
    except Exception as error:
        message = str(error) if isinstance(error, FlowError) else explain(error)
        if message is None:
            raise
        _say(f"error: {message}")
        return 2
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    _say(f"memory: the largest process held {peak / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
