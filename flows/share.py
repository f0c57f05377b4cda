"""Share results with other machines through the DVC remote, so that no machine computes them again.

python -m flows.share push      results of this workspace and their inputs, to the remote
python -m flows.share pull      the results that dvc.lock names, from the remote
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from flows.environment import settle
from flows.errors import report
from flows.workspace import FlowError, check, lock
from tasks.store import without_password

ROOT = Path(__file__).resolve().parent.parent
Verb = Literal["push", "pull"]

# Pattern of DVC's output, its cause, and the remedy.
_CAUSES = (
    (
        r"requires '(?P<package>[\w-]+)' to be installed",
        "this kind of remote needs another package",
        "pip install {package}, in the environment that runs this",
    ),
    (
        r"Permission denied|Operation not permitted|Read-only file system|Forbidden|AccessDenied|Unauthorized",
        "this user has no rights there",
        "ask its owner for rights, or give other credentials: dvc remote modify --local {remote} user NAME",
    ),
    (
        r"Cannot connect|Connection refused|Name or service not known|timed out|No route to host|Could not connect",
        "no server answers there",
        "start it, or correct its address: dvc remote modify --local {remote} url ADDRESS",
    ),
    (
        r"Not a directory|No such file or directory: '(?!.*\.dvc/cache)",
        "the folder cannot be made",
        "correct its address: dvc remote modify --local {remote} url ADDRESS",
    ),
    (
        r"error\.dvc\.org/missing-files|missing cache files|Checkout failed",
        "it does not give all that dvc.lock names",
        "make push on the machine that has it, correct the address, or compute it here: make run",
    ),
)


def share(root: Path, verb: Verb) -> str:
    """Push or pull; return the last line of DVC.

    FlowError with cause and remedy: nothing here is lost, and the next call resumes the transfer.
    """
    check(root)
    name, address = _remote(root)
    with lock(root):
        done = run_dvc(root, verb, "--run-cache")
    if done.returncode:
        raise FlowError(_reason(verb, name, address, done.stdout))
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return f"{verb}: {lines[-1] if lines else 'done'} ({address})"


def _remote(root: Path) -> tuple[str, str]:
    """Return name and address of the remote in use."""
    name = run_dvc(root, "config", "core.remote").stdout.strip()
    if not name:
        raise FlowError(
            "no DVC remote is set; name a shared folder or an address: "
            "dvc remote add --local --default store /srv/ffn2moe (docs/operations.md)"
        )
    return name, without_password(run_dvc(root, "config", f"remote.{name}.url").stdout.strip())


def _reason(verb: Verb, name: str, address: str, said: str) -> str:
    what = f"could not {verb} {'to' if verb == 'push' else 'from'} the remote {name} ({address})"
    for pattern, cause, remedy in _CAUSES:
        if found := re.search(pattern, said):
            line = next(line for line in said.splitlines() if re.search(pattern, line)).removeprefix("ERROR: ").strip()
            remedy = remedy.format(remote=name, **found.groupdict())
            return f"{what}: {cause} ({line[-200:]}); {remedy}; nothing here is lost"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return f"{what}: {errors[-1] if errors else said.strip()[-300:]}; nothing here is lost"


def run_dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of DVC in a workspace; return its exit code, and what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.share", description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("push", "pull"))
    options = parser.parse_args(arguments)
    settle(ROOT)
    try:
        print(share(ROOT, options.verb))  # noqa: T201
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
