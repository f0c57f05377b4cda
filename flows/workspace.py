"""Check and lock the folder of a run, and make a separate one for a run with its own settings."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import psutil
from ruamel.yaml import YAML, YAMLError

from ffn2moe.planning.shipping import complete_as, leave_out
from flows import target
from flows.guardian import orphaned
from tasks import params as parameters
from tasks.stage import clock, remove, replace_folder

ROOM_NEEDED = 2**30  # bytes that the smallest useful run writes
ORPHANS_END = 15.0  # seconds; a guardian terminates the processes of a killed flow, and kills them after 3


class FlowError(Exception):
    """Say that a run cannot continue; the message has the cause and the remedy."""


class BusyError(FlowError):
    """Say that another process uses the workspace."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")
        self.cause = cause


@dataclass(frozen=True)
class Workspace:
    """Hold the folder of a run; `source` is its repository, the same folder unless the run has settings."""

    root: Path
    source: Path
    name: str
    overrides: tuple[str, ...] = ()

    @property
    def isolated(self) -> bool:
        return self.root != self.source

    @property
    def export(self) -> Path:
        """Return the folder of the finished export."""
        return self.source / "exports" / self.name

    @property
    def report(self) -> Path:
        return self.export / "report.html" if self.isolated else self.root / "reports" / "report.html"


def check(source: Path) -> None:
    """Raise FlowError unless `source` is a git and DVC repository on a disk with room for a run."""
    if shutil.which("git") is None:
        raise FlowError("git is not installed; install it (Debian, Ubuntu: apt install git) and run again")
    if not (source / ".dvc" / "config").is_file():
        raise FlowError(f"{source} has no .dvc folder; restore it (git checkout -- .dvc) or clone again")
    inside = _git(source, "rev-parse", "--show-toplevel", check=False)
    if inside.returncode:
        reason = inside.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise FlowError(
            f"{source} is not a git repository git can use ({reason[0]}); clone the project, or make it one: "
            "git init && git add -A && git commit -m start"
        )
    if _git(source, "rev-parse", "--verify", "HEAD", check=False).returncode:
        raise FlowError(
            "the repository has no commit yet, and a run is recorded with its commit; "
            "make one: git add -A && git commit -m start"
        )
    free = shutil.disk_usage(source).free
    if free < ROOM_NEEDED:
        raise FlowError(
            f"the disk is nearly full: {free / 2**20:.0f} MiB free in {source}, at least 1 GiB is needed; "
            "make room (for example `dvc gc -w`: results that no workspace uses) and run again"
        )


def commit(root: Path) -> tuple[str, bool]:
    """Return the commit of a repository, and whether tracked files differ from it."""
    head = _git(root, "rev-parse", "HEAD").stdout.strip()
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock").stdout
    return head, bool(changes.strip())


@contextmanager
def lock(root: Path, patience: float = 0, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold a workspace: one workspace, one run. BusyError if another run or DVC uses it.

    patience: seconds to wait for that to end. `say` gets a line about the wait, and one about a repair.
    """
    path = root / ".cache" / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    said = False
    with path.open("a+") as stream:
        while True:
            try:
                _acquire(stream, root)
                _refuse_other_dvc(root)
                break
            except BusyError as busy:
                fcntl.flock(stream, fcntl.LOCK_UN)  # so that two waiting runs do not block each other
                if time.monotonic() >= deadline:
                    raise
                if not said:
                    say(f"{busy.cause}; waiting for up to {clock(patience)}")
                    said = True
                time.sleep(1)
        _mend(root, say)
        _hide_lock(root)
        try:
            yield
        finally:
            stream.seek(0)
            stream.truncate()


def locked_stages(root: Path) -> dict[str, Any] | None:
    """Return the stages of dvc.lock; {} if there is no file, None if it is damaged.

    DVC overwrites the file in place: a kill or a full disk at that moment leaves only its beginning.
    """
    path = root / "dvc.lock"
    return _stages_of(path.read_bytes()) if path.is_file() else {}


@lru_cache(maxsize=1)  # a run reads the file several times for each stage
def _stages_of(lock_file: bytes) -> dict[str, Any] | None:
    try:
        found = YAML(typ="safe").load(lock_file.decode("utf-8"))
    except (YAMLError, UnicodeDecodeError):
        return None
    stages = found.get("stages") if isinstance(found, dict) else None
    return stages if isinstance(stages, dict) and all(map(_is_whole, stages.values())) else None


def _is_whole(stage: Any) -> bool:
    """Return whether the entry of a stage in dvc.lock has the form that DVC needs."""
    if not isinstance(stage, dict) or not isinstance(stage.get("cmd"), str):
        return False
    params = stage.get("params", {})
    files = [stage.get(key, []) for key in ("deps", "outs")]
    return (
        isinstance(params, dict)
        and all(isinstance(values, dict) for values in params.values())
        and all(isinstance(several, list) for several in files)
        and all(_names_content(one) for several in files for one in several)
    )


def _names_content(entry: Any) -> bool:
    types = {"path": str, "md5": str, "size": int}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), one) for key, one in types.items())


def _mend(root: Path, say: Callable[[str], None]) -> None:
    """Replace a damaged dvc.lock by the committed one, or remove it.

    No finished stage is lost: DVC finds it in its cache by command, parameters and dependencies.
    """
    if locked_stages(root) is not None:
        return
    say("dvc.lock was cut short by a kill or a full disk: making it again; finished stages come from DVC's cache")
    committed = _git(root, "show", "HEAD:dvc.lock", check=False)
    fresh = root / ".cache" / "dvc.lock.partial"
    fresh.write_text(committed.stdout if committed.returncode == 0 else "", encoding="utf-8")
    if fresh.stat().st_size:
        os.replace(fresh, root / "dvc.lock")
    else:
        remove(fresh)
        remove(root / "dvc.lock")


def _hide_lock(root: Path) -> None:
    """Keep what a run writes into dvc.lock out of `git status`, unless the repository has committed results of its own.

    DVC refuses a dvc.lock that git ignores, so the repository has one without stages (docs/decisions/0021).
    """
    committed = _git(root, "show", "HEAD:dvc.lock", check=False)
    if committed.returncode == 0 and not (YAML(typ="safe").load(committed.stdout) or {}).get("stages"):
        _git(root, "update-index", "--skip-worktree", "dvc.lock", check=False)


def _acquire(stream: TextIO, root: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        raise BusyError(
            f"another run uses {root} (process {holder})",
            f'wait for it, stop it (kill {holder}), or run in a workspace of your own: make run SET="name=another"',
        ) from None
    stream.seek(0)
    stream.truncate()
    stream.write(f"{os.getpid()}\n")
    stream.flush()


def _refuse_other_dvc(root: Path) -> None:
    """Refuse if a DVC runs here, and clear rwlock: the note of a killed DVC would block every later one."""
    path = root / ".dvc" / "tmp" / "rwlock"
    deadline = time.monotonic() + ORPHANS_END
    while alive := _at_work(path):
        # The guardian of a killed flow ends its DVC in a moment.
        if time.monotonic() > deadline or not all(orphaned(pid) for pid in alive):
            raise BusyError(
                f"DVC is at work in {root} (process {', '.join(map(str, alive))})",
                f"wait for it or stop it (kill {' '.join(map(str, alive))}), then run again",
            )
        time.sleep(0.2)
    path.unlink(missing_ok=True)


def _at_work(path: Path) -> list[int]:
    """Return the living DVC processes that rwlock names."""
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a kill or a full disk cut the file
        return []
    writers = list(notes.get("write", {}).values())
    readers = [reader for group in notes.get("read", {}).values() for reader in group]
    return sorted({note["pid"] for note in writers + readers if _is_dvc(note["pid"])})


def _is_dvc(pid: int) -> bool:
    try:
        return any("dvc" in part for part in psutil.Process(pid).cmdline()[:4])
    except psutil.Error:  # gone, or of another user: not a DVC in our folder
        return False


def plan(source: Path, overrides: Sequence[str], called_from: Path) -> tuple[dict[str, object], str]:
    """Return the validated raw parameters of a run and its name; FlowError or ParamsError.

    Paths in the settings are relative to the folder of the user, paths in params.yaml to the repository.
    """
    raw = parameters.read(source / "params.yaml")
    committed = parameters.validate(raw)
    if not overrides:
        return raw, committed.name
    keys = [item.partition("=")[0] for item in overrides]
    raw = parameters.with_absolute_paths(raw, source)
    raw = parameters.with_absolute_paths(parameters.override(raw, overrides), called_from, keys)
    target.resolve(raw, source, keys)
    if raw["name"] == committed.name:
        # The committed run has that name. Another name keeps both exports and both model histories.
        raw["name"] = _name_for(committed.name, overrides)
    return raw, parameters.validate(raw, source="the settings").name


def check_inputs(source: Path, raw: dict[str, object]) -> bool:
    """Return whether teacher, corpus, settings and machine fit; if not, the reason was printed.

    It is asked once for the same parameters: the stages that read the inputs ask again. A process of its own imports
    torch, so that this one stays small.
    """
    return _checked(source, _as_json(raw))


def check_recipes(source: Path, recipes: Mapping[str, dict[str, object]]) -> bool:
    """Return whether the parameters of every recipe fit, as `check_inputs`; the printed reason names the recipe."""
    return _checked(source, [(name, _as_json(raw)) for name, raw in recipes.items()])


def _as_json(raw: dict[str, object]) -> dict[str, object]:
    return parameters.validate(raw).model_dump(mode="json", by_alias=True)


def _checked(source: Path, what: object) -> bool:
    given = json.dumps(what)
    mark = source / ".cache" / "checked"
    if mark.is_file() and mark.read_text(encoding="utf-8") == given:
        return True
    done = subprocess.run([sys.executable, "-m", "tasks.check", "-"], cwd=source, input=given, text=True, check=False)
    if done.returncode == 0:
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(given, encoding="utf-8")
    return done.returncode == 0


def _name_for(name: str, overrides: Sequence[str]) -> str:
    text = "-".join(sorted(item for item in overrides if not item.startswith("name=")))
    slug = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "again"
    if len(name) + len(slug) > 60:
        slug = f"{zlib.crc32(text.encode()):08x}"
    return f"{name}-{slug}"


def isolate(source: Path, overrides: Sequence[str], called_from: Path) -> Workspace:
    """Make a clone in .workspaces/NAME: the working state of `source`, the settings on top, a shared DVC cache.

    The workspace of a stopped run is brought up to date and keeps its checkpoints.
    """
    raw, name = plan(source, overrides, called_from)
    root = source / ".workspaces" / name
    if not (root / ".git").exists():
        partial = root.with_name(f".{name}.partial")
        remove(partial)
        partial.parent.mkdir(exist_ok=True)
        _git(source, "clone", "--quiet", "--no-checkout", str(source), str(partial))
        os.replace(partial, root)
    with lock(root):  # not while the same run uses it
        head = _git(source, "rev-parse", "HEAD").stdout.strip()
        _git(root, "fetch", "--quiet", str(source), "HEAD")
        _git(root, "update-index", "--no-skip-worktree", "dvc.lock", check=False)  # else a changed one stops checkout
        _git(root, "checkout", "--quiet", "--force", "--detach", head)
        _git(root, "clean", "--quiet", "--force", "-d")
        _copy_changes(source, root)
        parameters.write(raw, root / "params.yaml")
        cache = _run(source, sys.executable, "-m", "dvc", "cache", "dir").stdout.strip()
        local = root / ".dvc" / "config.local"
        local.write_text(f"[cache]\n    dir = {(source / cache).resolve()}\n", encoding="utf-8")
    return Workspace(root, source, name, tuple(overrides))


def _copy_changes(source: Path, root: Path) -> None:
    """Copy uncommitted changes, deletions and new modules of the code from `source` to `root`."""
    changed = _git(source, "diff", "--name-only", "-z", "HEAD").stdout
    # Other new files are data, perhaps large; settings name them by absolute paths.
    code = ("--", "ffn2moe", "tasks", "flows")
    new = _git(source, "ls-files", "--others", "--exclude-standard", "-z", *code).stdout
    for name in filter(None, (changed + new).split("\0")):
        target = root / name
        if (source / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target)
        else:
            remove(target)


@contextmanager
def kept(root: Path, name: str) -> Iterator[None]:
    """Keep exports/NAME whole: the new one if the block ends well, else the old one.

    The stages write the export in parts; between two of them it is neither old nor new. A killed run cannot restore the
    old one: the next call does so first, and DVC then adds the stages that finished.

    Plans that `make plans` brought back are not there while the block runs, so that DVC finds what it wrote. They stay
    in the export afterwards, unless its graphs are new.
    """
    export = root / "exports" / name
    saved = root / ".cache" / "export-before" / name
    if saved.is_dir():
        replace_folder(saved, export)
    remove(saved.with_name(f".{name}.partial"))
    if export.is_dir():
        partial = saved.with_name(f".{name}.partial")
        shutil.copytree(export, partial, symlinks=True, copy_function=_same_file)
        os.replace(partial, saved)
        leave_out(export)
    try:
        yield
    except BaseException:
        if saved.is_dir():
            replace_folder(saved, export)
        raise
    if saved.is_dir():
        complete_as(export, saved)
    remove(saved)


def _same_file(source: str, target: str) -> None:
    """Link instead of copy: stages replace files and never write into them."""
    os.link(source, target, follow_symlinks=False)


def bring_back(workspace: Workspace) -> None:
    """Put the export of an isolated run, with metrics and report, into exports/NAME of its repository.

    Plans that `make plans` brought back stay there, unless the graphs are new.
    """
    partial = workspace.export.with_name(f".{workspace.name}.partial")
    remove(partial)
    try:
        shutil.copytree(workspace.root / "exports" / workspace.name, partial, ignore=_gitignore)
        shutil.copytree(workspace.root / "metrics", partial / "metrics", ignore=_gitignore)
        shutil.copy2(workspace.root / "reports" / "report.html", partial / "report.html")
        complete_as(partial, workspace.export)
        replace_folder(partial, workspace.export)
    finally:
        remove(partial)


def _gitignore(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == ".gitignore"}


def _git(root: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _run(root, "git", *arguments, check=check)


def _run(root: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise FlowError(f"`{' '.join(command)}` failed in {root}: {done.stderr.strip() or done.stdout.strip()}")
    return done
