"""An export opens in other libraries; `python -m tests.acceptance.clients` runs the library itself on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ffn2moe.onnx.sentence_transformers import sentence_transformers_folder


def test_a_folder_is_written_without_torch(exported: Path, tmp_path: Path):
    code = (
        "import sys; from ffn2moe.clients import sentence_transformers_folder as write; "
        "write(sys.argv[1], sys.argv[2], 'sorted'); assert not {'torch', 'sentence_transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code, exported / "models/exported", tmp_path / "model"], check=True)
    modules = json.loads((tmp_path / "model/modules.json").read_text())
    assert [module["type"].rsplit(".", 1)[-1] for module in modules] == ["Transformer", "Pooling", "Normalize"]


def test_a_folder_that_is_taken_and_an_unknown_plan_are_refused(exported: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        sentence_transformers_folder(exported / "models/exported", tmp_path / "taken")
    with pytest.raises(ValueError, match="no plan 'fast'; it has"):
        sentence_transformers_folder(exported / "models/exported", tmp_path / "new", "fast")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
