"""Run the work that a file of JSON describes, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.stage import explain


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_job(do: Callable[[dict[str, Any], Path], None], arguments: Sequence[str]) -> int:
    """Do what the first file describes, which writes the second; return the exit code, 2 for an error of the user."""
    job, out = (Path(argument) for argument in arguments)
    try:
        do(read_json(job), out)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", flush=True)  # noqa: T201
        return 2
    return 0
