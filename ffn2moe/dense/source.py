"""Resolve what a user names as a teacher: a folder, a GGUF file, an installed package, or a name on a hub."""

from __future__ import annotations

import re
from importlib import metadata, util
from pathlib import Path

from ffn2moe.dense.sentence_folder import transformer_folder

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what is fetched of a hub name


def resolve_source(source: str) -> tuple[str, Path | None]:
    """Return the kind of a teacher source ("package", "folder", "gguf" or "hub") and its path (None for a hub name).

    `package:NAME` is a model inside an installed Python package; a path that exists is a local folder or a GGUF file;
    any other text is the name of a model on a hub. The path is a folder, or a GGUF file where the folder's or the
    package's only model is one. FileNotFoundError, with the remedy, where there is none.
    """
    if source.startswith("package:"):
        return "package", _packaged_model(source.removeprefix("package:"))
    path = Path(source).expanduser()
    if path.is_file():
        return "gguf", _gguf_file(path)
    if path.is_dir():
        if any(path.glob("*.safetensors")):
            return "folder", _with_config(path)
        found = only_gguf(path)
        return ("gguf", found) if found else ("folder", _with_config(path))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith(".") or source.endswith(".gguf"):
        raise FileNotFoundError(
            f"the teacher {source} does not exist: name a local Hugging Face folder, a GGUF file, a hub name "
            "(owner/model) or a packaged model (package:NAME)"
        )
    return "hub", None


def only_gguf(folder: Path) -> Path | None:
    """Return the GGUF file of a folder, or None where there is none. ValueError where there are several."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"{folder} holds {len(files)} GGUF files ({', '.join(file.name for file in files[:3])}): name the one that "
            "is meant, as a path"
        )
    return files[0] if files else None


def download(source: str, revision: str | None) -> Path:
    """Return the local folder of a hub name, fetched where it is not in the cache of the hub's library."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the library and its dependencies raise a dozen kinds
        raise FileNotFoundError(
            f"{source} is no folder here and cannot be downloaded ({type(error).__name__}): check the name and the "
            "network"
        ) from None


def _with_config(folder: Path) -> Path:
    model = transformer_folder(folder)
    if not any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"the teacher folder {folder} has no config.json: name a Hugging Face folder")
    return folder


def _gguf_file(file: Path) -> Path:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"the teacher {file} is a file, but no GGUF file: name the folder that holds the model")
    return file


def _packaged_model(distribution: str) -> Path:
    """Return the model folder inside an installed package, or its GGUF file where it has no other model."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the teacher package {distribution!r} is not installed: pip install {distribution}"
        ) from None
    roots = sorted({file.parts[0] for file in files if file.name == "__init__.py"})
    specs = [util.find_spec(root) for root in roots]
    folders = [Path(location) for spec in specs if spec for location in spec.submodule_search_locations or []]
    for folder in folders:
        configs = sorted(folder.rglob("config.json"), key=lambda path: (len(path.parts), str(path)))
        for config in configs:
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    for holder in sorted({file.parent for folder in folders for file in folder.rglob("*.gguf")}):
        found = only_gguf(holder)
        if found:
            return found
    raise FileNotFoundError(
        f"the package {distribution!r} holds no model: neither a folder with config.json beside *.safetensors, nor a "
        "GGUF file"
    )
