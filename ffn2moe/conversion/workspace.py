"""Keep the unfinished folder of a conversion, so that the same conversion resumes from it and no other does."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

from ffn2moe.conversion.settings import OPTIONS
from ffn2moe.dense.weights import weight_files

if TYPE_CHECKING:
    from ffn2moe.conversion.task import Task


def open_workspace(task: Task) -> str:
    """Make the unfinished folder, or keep this conversion's; return the fingerprint of the conversion.

    The fingerprint covers the settings that decide the result, the source's name, and its files by size and time.
    """
    wanted = [task.settings.identity(), task.dense.source]
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    folder = task.dense.folder
    for path in [folder / "config.json", *sorted(set(weight_files(folder).values()))]:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    fingerprint = digest.hexdigest()
    mark, details = task.work / "fingerprint", task.work / "settings"
    if mark.is_file() and mark.read_text() == fingerprint:
        task.say(f"resuming from {task.work}")
        return fingerprint
    if task.work.exists():
        before = json.loads(details.read_text()) if details.is_file() else None
        task.say(f"discarding {task.work}: it belongs to another conversion ({_difference(before, wanted)})")
        shutil.rmtree(task.work)
    task.work.mkdir(parents=True)
    details.write_text(json.dumps(wanted))
    mark.write_text(fingerprint)
    return fingerprint


def _difference(before: list[Any] | None, wanted: list[Any]) -> str:
    """Return in words how two conversions differ."""
    if before is None:
        return "other settings or another model"
    if before[1] != wanted[1]:
        return f"of {before[1]}"
    flags = [OPTIONS[name].flag for name, value in wanted[0].items() if before[0].get(name) != value]
    return f"different {', '.join(flags)}" if flags else "the model's files have changed"
