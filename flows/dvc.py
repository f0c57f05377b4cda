"""Run DVC as a child process: one stage at a time, pass its lines on, and leave nothing running when stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from flows.workspace import BusyError, FlowError, locked_stages

Outcome = Literal["Cached", "Restored", "Completed"]

_NOISE = re.compile(
    r"^$|^> |^Updating lock file|^Generating lock file|^To track the changes|^\s+git add|^To enable auto"
    r"|^\s+dvc config|^Use `dvc push`|^Data and pipelines are up|^Stage '.*'( didn't change| is cached)"
    r"|^Running stage|^Successfully registered model|^Created version|^Registered model '.*' already exists"
    r"|.*Any type hint is inferred as AnyType|^\s+col_spec_type = _infer"  # MLflow; the model checks its own inputs
)
_KILLED = re.compile(r"^ERROR: failed to reproduce .* exited with (-9|137)$")
_BUSY = re.compile(
    r"is busy, it is being blocked by|Unable to acquire lock|database is locked|database .* is locked by", re.IGNORECASE
)


def stages(root: Path) -> list[str]:
    """Return the stages of dvc.yaml, in order."""
    return list(_yaml(root / "dvc.yaml")["stages"])


def parameters(root: Path, stage: str) -> list[str]:
    """Return the keys or sections of params.yaml that a stage reads."""
    return list(_yaml(root / "dvc.yaml")["stages"][stage].get("params", []))


def locked(root: Path, stage: str) -> dict[str, Any]:
    """Return the entry of a stage in dvc.lock: command, deps, params and outs with their hashes; {} if none."""
    return (locked_stages(root) or {}).get(stage, {})


def always_changed(root: Path) -> set[str]:
    """Return the stages that run every time."""
    return {name for name, stage in _yaml(root / "dvc.yaml")["stages"].items() if stage.get("always_changed", False)}


def up_to_date(root: Path, stages: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the stages before the first that has to run or to be restored, asked of DVC in one process.

    A process for each stage spends its time on starting. Nothing is changed. [] if DVC does not answer: `reproduce`
    then says why. FlowError if it was killed.
    """
    lines: list[str] = []
    code = _dvc(["--wait-for-lock", "status", "--json", *stages], root, environment, lines, lambda line: None)
    if code < 0:
        raise FlowError(_reason(stages[0], code, lines))
    if code:
        return []
    try:
        changed = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    except (StopIteration, ValueError):
        return []
    return list(takewhile(lambda stage: stage not in changed, stages))


def reproduce(
    stage: str,
    root: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None],
    *,
    on_start: Callable[[], None] = lambda: None,
    force: bool = False,
) -> Outcome:
    """Bring one stage up to date; BusyError, or FlowError with the error of the stage.

    `on_start` is called if the stage is not cached and runs; `on_line` gets each line that a reader needs. An exception
    ends the whole process group of the child before it is passed on.
    """
    before = locked(root, stage).get("outs")
    always = stage in always_changed(root)
    # Without --single-item DVC walks the graph upwards. Without --wait-for-lock it reports a finished stage as failed
    # when another process holds the lock for more than 3 s.
    command = ["--wait-for-lock", "repro", "--single-item", *(["--force"] if force else []), stage]
    lines: list[str] = []
    started = f"Running stage '{stage}'"

    def on_output(line: str) -> None:
        if line.startswith(started):
            if not always:
                on_start()
        elif not _NOISE.match(line) and not line.startswith("ERROR: failed to reproduce"):
            on_line(line)

    try:
        code = _dvc(command, root, environment, lines, on_output)
    except BaseException:  # stopped, or over its time limit
        _restore(stage, root, environment)
        raise
    text = "\n".join(lines)
    if code:
        _restore(stage, root, environment)
        if _BUSY.search(text):
            raise BusyError(f"the workspace is busy: {_tail(lines)}", "wait for the other DVC and run again")
        raise FlowError(_reason(stage, code, lines))
    if started not in text:
        return "Restored" if "is cached - skipping run" in text else "Cached"
    # A stage that always runs (inputs) counts as cached if it wrote the same as before.
    return "Cached" if always and locked(root, stage).get("outs") == before else "Completed"


def _restore(stage: str, root: Path, environment: Mapping[str, str]) -> None:
    """Restore the outs of dvc.lock from the cache: DVC removed them before the stage ran."""
    if locked(root, stage):
        _dvc(["checkout", "--quiet", "--force", stage], root, environment, [], lambda line: None)


def _dvc(
    arguments: list[str],
    root: Path,
    environment: Mapping[str, str],
    lines: list[str],
    on_line: Callable[[str], None],
) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # its own group: only this module stops it, as a whole
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            line = line.rstrip()
            lines.append(line)
            del lines[:-2000]
            on_line(line)
        return process.wait()
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """Interrupt, terminate, then kill the group until it is empty."""
    for number, patience in ((signal.SIGINT, 2.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        if not _alive(process):
            return
        os.killpg(process.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _alive(process):
            time.sleep(0.05)


def _alive(process: subprocess.Popen[str]) -> bool:
    process.poll()  # reaps the leader; its group may outlive it
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _reason(stage: str, code: int, lines: list[str]) -> str:
    """Return the error line of the stage, else which process was killed, else the last lines."""
    marker = f"{stage}: error: "
    own = [line.removeprefix(marker) for line in lines if line.startswith(marker)]
    if own:
        return f"{stage} stopped: {own[-1]}"
    if any("No space left on device" in line for line in lines):
        return f"{stage} stopped: the disk is full; make room (`dvc gc -w`) and run again; finished stages are kept"
    remedy = "run again: finished stages are kept, and training resumes from its last checkpoint"
    if code < 0:
        return f"DVC was killed (signal {-code}) in stage {stage}; {remedy}"
    if any(_KILLED.search(line) for line in lines):
        return f"{stage} was killed (signal 9; if nobody sent it, memory ran out: see dmesg); {remedy}"
    return f"{stage} failed: {_tail(lines)}"


def _tail(lines: list[str]) -> str:
    """Return the last line of the stage, and the errors of DVC."""
    useful = [line for line in lines if not _NOISE.match(line)]
    last = [line for line in useful if not line.startswith("ERROR: ")][-1:]
    errors = [line.removeprefix("ERROR: ") for line in useful if line.startswith("ERROR: ")]
    return "; ".join(dict.fromkeys(last + errors)) or "no reason was given"


def _yaml(path: Path) -> dict[str, Any]:
    return _parsed(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)  # dvc.yaml is read many times in a run
def _parsed(text: str) -> dict[str, Any]:
    return YAML(typ="safe").load(text)
