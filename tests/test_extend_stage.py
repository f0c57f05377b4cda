"""The example of docs/extend/stage.md works as it stands, in the stage runner and in dvc.yaml."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

from ruamel.yaml import YAML

from tests import imports
from tests.imports import PROJECT
from tests.pages import examples
from tests.texts import PARAMS, write_corpus


def test_the_stage_on_the_page_runs_by_its_command(tmp_path):
    (code,) = examples("extend/stage.md")
    (tmp_path / "lengths.py").write_text(code)
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    # Let `python -m tasks.lengths` find the file, as it would in tasks/.
    program = (
        "import runpy, sys, tasks; tasks.__path__.append('.'); runpy.run_module('tasks.lengths', run_name='__main__')"
    )

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program]
        found = {**os.environ, "PYTHONPATH": str(PROJECT)}
        return subprocess.run(command, cwd=tmp_path, env=found, capture_output=True, text=True, timeout=60)

    write_corpus(tmp_path / "data/corpus/train.jsonl", ["one two three", "four five"])
    done = run()
    assert (done.returncode, done.stdout) == (0, "lengths: 2 texts, 2.5 words on average\n"), done.stderr
    found = json.loads((tmp_path / "metrics/lengths.json").read_text())
    assert found == {"texts": 2, "mean": 2.5, "longest": 3}
    write_corpus(tmp_path / "data/corpus/train.jsonl", [])
    done = run()
    assert done.returncode == 2
    assert done.stderr == "lengths: error: data/corpus/train.jsonl holds no text: run the stage prepare again\n"


def test_the_entry_on_the_page_lists_what_the_stage_reads_and_imports():
    (code,) = examples("extend/stage.md")
    (entry,) = examples("extend/stage.md", "yaml")
    stage = YAML(typ="safe").load(f"stages:\n{entry}")["stages"]["lengths"]
    imported = {path for name in imports.names(ast.parse(code)) for path in imports.closure(name)}
    needed = {"tasks/lengths.py", "data/corpus/train.jsonl", *imported}
    assert {dep for path in needed for dep in stage["deps"] if f"{path}/".startswith(f"{dep}/")} == {*stage["deps"]}
    assert all(any(f"{path}/".startswith(f"{dep}/") for dep in stage["deps"]) for path in needed)
    assert stage["metrics"] == ["metrics/lengths.json"] and stage["cmd"] == "python -m tasks.lengths"
