"""Stage 0: write fingerprints of the inputs outside the workspace, so that DVC notices when they change.

A teacher, a corpus or a data folder elsewhere on disk, and packages that are read as data, cannot be dependencies by
path: the path would stand in dvc.lock, which is the same on every machine. This stage always runs. It is quick (no
torch) and writes the same bytes for the same contents, so that the stages after it stay cached.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from tasks import corpus
from tasks.check import require_files
from tasks.params import Params
from tasks.stage import StageRun, main

_TEACHER_SUFFIXES = {".gguf", ".json", ".safetensors", ".txt", ".model"}
_DATA_SUFFIXES = {".csv", ".tsv", ".txt", ".jsonl"}


def run(stage: StageRun) -> None:
    """Write data/inputs.json. FileNotFoundError or ValueError where a named input is missing."""
    params, root = stage.params, stage.root
    require_files(params, root)
    inputs = {
        "teacher": _teacher(params, root),
        "corpus": _corpus(params, root),
        "evaluation": _evaluation(params, root),
        "folder": None if params.data.folder is None else _hashes(root / params.data.folder, _DATA_SUFFIXES),
    }
    stage.write_json("data/inputs.json", inputs)
    stage.say(", ".join(f"{name} {_summary(value)}" for name, value in inputs.items() if value))


def _teacher(params: Params, root: Path) -> dict[str, object]:
    source = params.teacher.source
    if source.startswith("package:"):
        return {"kind": "package", **_versions([source.removeprefix("package:")], "teacher.source")}
    folder = root / Path(source).expanduser()
    if folder.is_dir():
        files = _hashes(folder, _TEACHER_SUFFIXES)
        if not {"config.json", "adapter_config.json"} & {*files} and not any(name.endswith(".gguf") for name in files):
            raise FileNotFoundError(
                f"teacher.source = {source} is a folder without config.json; give one that "
                "model.save_pretrained wrote, with model.safetensors and the tokenizer in it"
            )
        return {"kind": "folder", "files": files} | _base(folder, files)
    if folder.is_file():
        return {"kind": "file", "sha256": _sha256(folder)}
    if folder.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(
            f"teacher.source = {source} is neither a folder nor a GGUF file; check the path, or give package:NAME or a "
            "hub name"
        )
    # `prepare` resolves a hub name once; a revision fixes the version.
    return {"kind": "hub", "name": source, "revision": params.teacher.revision}


def _base(folder: Path, files: dict[str, str]) -> dict[str, object]:
    """Return the fingerprint of the model that an adapter in the folder names, where it is a folder, too."""
    if "adapter_config.json" not in files:
        return {}
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = next((path for path in (folder / str(named), Path(str(named))) if named and path.is_dir()), None)
    return {} if base is None else {"base": _hashes(base, _TEACHER_SUFFIXES)}


def _corpus(params: Params, root: Path) -> dict[str, object]:
    source = params.data.corpus
    if source == "generated":
        return {"kind": "generated"}
    # A corpus with too few pairs is judged on docstrings, so their packages matter for every corpus.
    docstrings = {"python": platform.python_version(), **_versions(corpus.PACKAGES.values(), "data.corpus")}
    if source in corpus.INSTALLED:
        return {"kind": source, **docstrings}
    if source.startswith("datasets:"):
        return {"kind": "datasets", "name": source.removeprefix("datasets:"), "docstrings": docstrings}
    path = root / Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"data.corpus = {source} is not a file; check the path, or use {', '.join(corpus.INSTALLED)} or "
            "datasets:NAME"
        )
    return {"kind": "file", "sha256": _sha256(path), "docstrings": docstrings}


def _evaluation(params: Params, root: Path) -> dict[str, object] | None:
    if params.data.evaluation is None:
        return None
    path = root / Path(params.data.evaluation).expanduser()
    return {"kind": "file", "sha256": _sha256(path)}


def _versions(packages: Iterable[str], key: str) -> dict[str, dict[str, str]]:
    versions = {}
    for package in sorted(packages):
        try:
            versions[package] = metadata.version(package).split("+")[0]  # the build does not change texts
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"{key} needs the package {package}, which is not installed here; "
                f"pip install {package}, or `make setup` for those of constraints.txt"
            ) from None
    return {"packages": versions}


def _hashes(folder: Path, suffixes: set[str]) -> dict[str, str]:
    """Return path inside the folder -> sha256, for the files that can be read from it."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _summary(value: object) -> str:
    assert isinstance(value, dict)
    return str(value.get("kind", f"{len(value)} files"))


if __name__ == "__main__":
    main("inputs", run, torch=False, recorded=False)
