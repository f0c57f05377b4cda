"""Kill a sweep of eight cells in the middle of a cell, and resume it.

    python -m tests.acceptance.sweep FOLDER --out docs/results/sweep.md

The sweep runs in FOLDER, a copy of this project, with small budgets: a cell takes minutes. The kill comes when two
cells are made and another one has a training checkpoint. Exits with 1 if a finished cell or stage ran twice. If the
sweep in FOLDER has ended, only the page is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.page import about
from flows import guardian
from tasks.params import override, read, write
from tests.toy import commit, copy_project, environment

NAME = "minilm-eight"
GRID = ("decompose.num_experts=4,8", "decompose.num_active=1,2", "distill.steps=20,60")
SETTINGS = (
    "data.max_texts=4000",
    "data.evaluation_pairs=300",
    "data.calibration_texts=128",
    "compute.threads=1",
    "decompose.calibration_tokens=4096",
    "train_router.tokens=8192",
    "train_router.steps=50",
    "train_router.batch_tokens=1024",
    "distill.batch_tokens=1024",
    "distill.checkpoint_every=10",
    "export.engines=[onnxruntime]",
    "export.parity_texts=8",
    "benchmark.shapes=[[1, 16], [8, 128]]",
    "benchmark.rounds=8",
)
MADE_BEFORE = 2  # cells, when the sweep is killed
console = Console(width=None if sys.stdout.isatty() else 150)


def make_repository(folder: Path) -> None:
    """Copy this project and commit the small budgets as its parameters."""
    copy_project(folder)
    write(override(read(folder / "params.yaml"), SETTINGS), folder / "params.yaml")
    commit(folder)


def sweep(repo: Path, log: str) -> subprocess.Popen[bytes]:
    """Start or resume the sweep as a child in its own session; its output goes to a file."""
    with (repo / log).open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.sweep", "run", *GRID, "--name", NAME],
            cwd=repo,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def cells(repo: Path) -> list[dict[str, str]]:
    """Return the history of every cell, as `python -m flows.sweep cells` writes it."""
    command = [sys.executable, "-m", "flows.sweep", "cells", NAME]
    subprocess.run(command, cwd=repo, env=environment(), check=True, capture_output=True)
    with (repo / "sweeps" / NAME / "cells.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def interrupt(repo: Path) -> None:
    """Kill -9 the sweep while a cell trains; RuntimeError if the sweep ended before, or if a process survives."""
    process = sweep(repo, "first.log")
    while not (
        _made(repo / "first.log") >= MADE_BEFORE and list(repo.glob(".workspaces/*/.cache/distill.safetensors"))
    ):
        if process.poll() is not None:
            raise RuntimeError(f"the sweep ended before it could be killed: {(repo / 'first.log').read_text()}")
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = time.time()
    while guardian.carriers(guardian.MARK, str(process.pid)):
        if time.time() > killed + 20:
            raise RuntimeError("processes of the killed sweep survive")
        time.sleep(0.1)
    (repo / "before.json").write_text(json.dumps(cells(repo), indent=2) + "\n", encoding="utf-8")


def _made(log: Path) -> int:
    return log.read_text(encoding="utf-8").count(": made;")


def judge(before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> list[str]:
    """Return one line for each cell or stage that ran twice."""
    found = [f"cell {row['cell']}: {row['state']}" for row in after if row["state"] != "finished"]
    for old, new in zip(before, after, strict=True):
        ended, ran = old["stages"].split(), new["stages"].split()
        found += [f"cell {new['cell']}: {stage} ran twice" for stage in sorted(set(ran)) if ran.count(stage) > 1]
        if "export" in ended and new["made"] != old["made"]:
            found.append(f"cell {new['cell']} was made twice")
    return found


def resumed(repo: Path) -> list[str]:
    """Return the lines of the logs that say that training resumed from a checkpoint."""
    logs = sorted((repo / "sweeps" / NAME).glob("*/log.txt"))
    return [
        f"cell {int(log.parent.name)}: {line.removeprefix('distill: ')}"
        for log in logs
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if "resuming from the checkpoint" in line
    ]


def best(repo: Path, share: str) -> str:
    """Return the answer of `python -m flows.sweep best` to a share of the quality."""
    command = [sys.executable, "-m", "flows.sweep", "best", NAME, "--keeps", share]
    done = subprocess.run(command, cwd=repo, env=environment(), capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip()


def write_page(repo: Path, before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write the page, and the plot beside it."""
    folder = repo / "sweeps" / NAME
    points = json.loads((folder / "results.json").read_text(encoding="utf-8"))["points"]
    shutil.copy2(folder / "front.png", path.with_suffix(".png"))
    answers = {share: best(repo, share) for share in ("0.99", "0.97")}
    problems = "; ".join(judge(before, after)) or "No finished cell was made again, no finished stage ran twice"
    interrupted = ", ".join(row["cell"] for row in after if int(row["made"]) > 1) or "none"
    from_checkpoints = "; ".join(resumed(repo)) or "none was in training"
    load = ", ".join(f"{load:.0f}" for load in psutil.getloadavg())
    path.write_text(
        f"""# A sweep of eight cells, interrupted once

{len(after)} cells of the default teacher with small budgets, two at a time; `kill -9` in the middle of a cell,
then the same command again. {problems}.
Cells that the kill interrupted: {interrupted}; {from_checkpoints}.
{about()}; load average {load}: the times include waiting for other work.

```
python -m tests.acceptance.sweep FOLDER --out {path}
```

It runs these commands in a project with `{" ".join(SETTINGS)}`:

```
python -m flows.sweep run {" ".join(GRID)} --name {NAME}     # killed, then run again
python -m flows.sweep cells {NAME}
python -m flows.sweep best {NAME} --keeps 0.99
```

## Cells

"Made" and "measured" count how often that step began. "Stages" are those that ran to their end for this cell; the
others came from the cache.

{_table(_short(row) for row in after)}

After the kill:

{_table(_short(row) for row in before)}

## The Pareto front

`kept` is the share of the teacher's retrieval nDCG@10. One interleaved session timed the plans of all cells.

{_table(_point(row) for row in points if row["on_front"])}

![Quality against speed]({path.with_suffix(".png").name})

`best {NAME} --keeps 0.99`:

```
{answers["0.99"]}
```

`best {NAME} --keeps 0.97`:

```
{answers["0.97"]}
```
""",
        encoding="utf-8",
    )


def _short(row: Mapping[str, str]) -> dict[str, str]:
    """Return a cell without the sections of its keys and the day of its times."""
    settings = " ".join(setting.partition(".")[2] or setting for setting in row["settings"].split())
    times = {key: row[key].partition("T")[2].removesuffix("+00:00") for key in ("began", "ended")}
    return {**row, "settings": settings, **times}


def _point(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "cell": str(row["cell"]),
        "settings": " ".join(setting.partition(".")[2] for setting in row["settings"].split()),
        "plan": row["plan"],
        "kept": f"{100 * row['kept']:.1f} %",
        "over best dense": f"{row['vs_best_dense']:.2f}x",
        "over dense float32": f"{row['vs_dense']:.2f}x",
        "ms": f"{row['median_ms']:.1f}",
    }


def _table(rows: Any) -> str:
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="copy of the project; an earlier sweep in it is resumed")
    parser.add_argument("--out", type=Path, help="also write a page, for example docs/results/sweep.md")
    given = parser.parse_args()
    repo = given.folder.resolve()
    if not (repo / "params.yaml").is_file():
        make_repository(repo)
    if not (repo / "before.json").is_file():
        interrupt(repo)
    if not (repo / "sweeps" / NAME / "results.json").is_file() and sweep(repo, "second.log").wait():
        console.print((repo / "second.log").read_text(encoding="utf-8"), highlight=False, markup=False)
        return 1
    before, after = json.loads((repo / "before.json").read_text(encoding="utf-8")), cells(repo)
    problems = judge(before, after)
    console.print(
        "\n".join(problems) or "no finished cell and no finished stage ran twice", highlight=False, markup=False
    )
    console.print("\n".join(resumed(repo)), highlight=False, markup=False)
    if given.out:
        write_page(repo, before, after, given.out)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
