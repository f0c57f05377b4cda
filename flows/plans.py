"""Put the plans that lost back into an export, for example to race all of them on another machine.

    python -m flows.plans [NAME]      the plans of exports/NAME, from models/exported or the cache of DVC

`make run` ships the plans that are used; DVC keeps the others. The plans stay until a run makes other graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ffn2moe.planning.shipping import complete
from ffn2moe.runtime.files import read_manifest
from flows.environment import settle
from flows.errors import report
from flows.share import run_dvc
from flows.workspace import FlowError, check, lock
from tasks.params import load_params
from tasks.stage import remove

ROOT = Path(__file__).resolve().parent.parent


def bring_back(root: Path, name: str) -> list[str]:
    """Put the left out plans of exports/NAME back and return their names; FlowError where DVC has them no more."""
    check(root)
    export = root / "exports" / name
    manifest = read_manifest(export)
    if not manifest.get("left_out"):
        return []
    with lock(root):
        if manifest["exported"] is None:
            return complete(export, root / "models" / "exported")
        # A file of DVC with the hash of every plan, for this command alone: a run with settings has no workspace left.
        # DVC reads none that git ignores, so it is not in exports/.
        pointer, whole = root / f"plans-{name}.dvc", export.with_name(f"{name}.plans")
        try:
            out = {"md5": manifest["exported"], "hash": "md5", "path": whole.relative_to(root).as_posix()}
            pointer.write_text(json.dumps({"outs": [out]}), encoding="utf-8")  # YAML holds JSON
            _fetch(root, pointer, name)
            return complete(export, whole)
        finally:
            remove(pointer)
            remove(whole)


def _fetch(root: Path, pointer: Path, name: str) -> None:
    """Check the folder of a DVC file out of the cache, or out of the remote where there is one."""
    if run_dvc(root, "checkout", "--quiet", str(pointer)).returncode == 0:
        return
    done = run_dvc(root, "pull", "--quiet", str(pointer))
    if done.returncode:
        said = [line.removeprefix("ERROR: ") for line in done.stdout.splitlines() if line.startswith("ERROR: ")]
        raise FlowError(
            f"the cache of DVC does not have the other plans of exports/{name} any more ({said[-1] if said else '?'}); "
            "make them again: the `make run` that made the export"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.plans", description=__doc__.splitlines()[0])
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="the export exports/NAME (default: that of params.yaml)"
    )
    options = parser.parse_args(arguments)
    settle(ROOT)
    try:
        name = options.name or load_params(ROOT / "params.yaml").name
        plans = bring_back(ROOT, name)
        said = f"brought back: {', '.join(plans)}" if plans else "no plan is missing"
        print(f"exports/{name}: {said}; ffn2moe plan exports/{name} races them")  # noqa: T201
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
