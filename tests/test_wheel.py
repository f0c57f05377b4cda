"""The wheel runs an export with its own dependencies alone: no torch, no transformers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ffn2moe

PROJECT = Path(__file__).parent.parent
CORE = PROJECT / "ffn2moe"
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # the user installs one of them


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built offline from a copy: a build leaves files beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(CORE, source / "ffn2moe", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*command, "--wheel-dir", "dist"], cwd=source, check=True, capture_output=True, text=True)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """A site-packages folder that holds the wheel, what it requires, and an ONNX Runtime; nothing else."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    (own,) = metadata.distributions(path=[str(site)])
    for name in required(own.requires or [], installed_of(ONNX_RUNTIMES)):
        for entry in top_levels(name):
            if not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return site


def installed_of(names: Iterable[str]) -> str:
    """Return the first of these distributions that is installed."""
    known = {canonicalize_name(one.metadata["Name"]) for one in metadata.distributions()}
    return next(name for name in names if name in known)


def required(requirements: list[str], *further: str) -> set[str]:
    """Return the distributions that these requirements need here without any extra, and what those need in turn."""
    todo, found = [Requirement(text) for text in [*requirements, *further]], set()
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(name)
            todo += [Requirement(text) for text in metadata.requires(name) or []]
    return found


def top_levels(name: str) -> set[Path]:
    """Return the files and folders that a distribution puts directly into site-packages."""
    distribution = metadata.distribution(name)
    root = Path(str(distribution.locate_file("")))
    parts = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
    return {root / part for part in parts}


def run(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that imports from `site` and the standard library alone."""
    start = f"import sys; sys.path.append({str(site)!r})\n"
    command = [sys.executable, "-I", "-S", "-c", start + code, *arguments]
    return subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_core_its_licence_and_its_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ffn2moe", f"ffn2moe-{ffn2moe.__version__}.dist-info"}
    assert "ffn2moe/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(path.relative_to(PROJECT)) for kind in ("py", "cpp", "h") for path in CORE.rglob(f"*.{kind}")}
    assert sources <= set(names) and "ffn2moe/runtime/native/kernels/experts.cpp" in sources


def test_the_wheel_requires_no_torch_and_pins_nothing(wheel):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    own = [Requirement(text) for text in project["dependencies"]]
    assert not {"torch", "transformers", *ONNX_RUNTIMES} & {one.name for one in own}
    assert not [str(one) for one in own if "==" in str(one.specifier)]
    assert {"cpu", "gpu", "convert", "pipeline", "openvino", "dask", "dev", "eval", "sources"} == set(
        project["optional-dependencies"]
    )


def test_an_export_runs_with_the_wheel_and_its_requirements_alone(bare, exported):
    assert run(bare, "import torch").returncode and run(bare, "import transformers").returncode
    text = "sort a list of numbers"
    code = (
        "import json, ffn2moe\n"
        "export = ffn2moe.open_export(sys.argv[1], sys.argv[2])\n"
        "print(json.dumps([ffn2moe.__file__, *export.encode([sys.argv[3]]).tolist()]))\n"
    )
    for plan in ("sorted", "fused"):  # standard operators; one that is tested with `onnx` when it is opened
        done = run(bare, code, str(exported / "models/exported"), plan, text)
        assert not done.returncode, done.stderr
        file, found = json.loads(done.stdout)
        assert Path(file).is_relative_to(bare)
        expected = ffn2moe.open_export(exported / "models/exported", plan).encode([text])[0]
        assert found == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("command", [["info"], ["encode", "sort a list"], ["verify", "--help"]])
def test_the_command_line_runs_with_the_wheel_and_its_requirements_alone(bare, exported, command):
    name, *rest = command
    code = "from ffn2moe.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run(bare, code, name, str(exported / "models/exported"), *rest)
    assert not done.returncode, done.stderr
    assert re.search("experts|\\[|usage", done.stdout)


@pytest.mark.parametrize("command", [["convert", "model", "out"], ["shrink", "export", "a.txt"]])
def test_what_needs_torch_names_the_extra_to_install(bare, command, tmp_path):
    code = "from ffn2moe.cli import main; sys.exit(main(sys.argv[1:]))"
    more = ["--keep", "1", "--method", "drop", "--out", str(tmp_path / "out")] if command[0] == "shrink" else []
    done = run(bare, code, *command, *more)
    assert done.returncode == 2
    assert 'pip install "ffn2moe[convert]"' in done.stderr and "Traceback" not in done.stderr


def test_what_needs_torch_in_python_names_the_extra_to_install(bare):
    done = run(bare, "import ffn2moe; ffn2moe.load('exports/minilm/checkpoint')")
    assert "ffn2moe.load needs PyTorch" in done.stderr and 'pip install "ffn2moe[convert]"' in done.stderr


def test_a_missing_onnx_runtime_names_the_packages_to_install(bare, exported, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for entry in bare.iterdir():
        if not entry.name.startswith("onnxruntime"):
            (site / entry.name).symlink_to(entry)
    code = "import ffn2moe; ffn2moe.open_export(sys.argv[1], 'sorted')"
    done = run(site, code, str(exported / "models/exported"))
    assert "pip install onnxruntime" in done.stderr and "onnxruntime-gpu" in done.stderr
