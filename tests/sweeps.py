"""Run a sweep whose cells take no time, in a toy repository with files cell.py, compare.py and judge.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.toy import environment

# The flow without Prefect's server, which takes seconds to start and is not what is tested here.
SWEEP = """\
import sys
from concurrent.futures import ThreadPoolExecutor

from flows import sweep, sweep_cells
from prefect.states import Completed, Failed


class Here:
    threads = ThreadPoolExecutor(2)

    def __init__(self, task):
        self.run = task.fn

    def __call__(self, *arguments, return_state=False):
        try:
            self.run(*arguments)
        except Exception as error:
            self.state = Failed(data=error)
        else:
            self.state = Completed()
        return self.state

    def submit(self, *arguments):
        one = Here.__new__(Here)
        one.run = self.run
        one.wait = self.threads.submit(one, *arguments).result
        return one


class Flow:
    def with_options(self, **options):
        return flow.fn


flow = sweep.sweep
sweep.sweep = Flow()
sweep_cells.get_run_logger = lambda: __import__("logging").getLogger()
for module, name in (
    (sweep_cells, "make"), (sweep_cells, "measure"), (sweep, "time_side_by_side"), (sweep, "judge_plans")
):
    setattr(module, name, Here(getattr(module, name)))
sweep_cells.CELL, sweep.COMPARE, sweep.JUDGE = ("cell.py",), ("compare.py",), ("judge.py",)
sys.exit(sweep.main(sys.argv[1:]))
"""


def start(toy: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "sweep.py", *arguments],
        cwd=toy,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
