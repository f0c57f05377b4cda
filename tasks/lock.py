"""Read dvc.lock: the hashes of what the stages read and wrote."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML


def locked_outs(root: Path, stage: str) -> dict[str, str]:
    """Return path -> hash of the outs of a stage; {} where DVC has not run it."""
    return _locked(root, stage, "outs")


def locked_deps(root: Path, stage: str) -> dict[str, str]:
    """Return path -> hash of what a stage read; {} where DVC has not run it."""
    return _locked(root, stage, "deps")


def _locked(root: Path, stage: str, key: str) -> dict[str, str]:
    file = root / "dvc.lock"
    if not file.is_file():
        return {}
    stages = (YAML(typ="safe").load(file.read_text(encoding="utf-8")) or {}).get("stages", {})
    return {entry["path"]: entry["md5"] for entry in stages.get(stage, {}).get(key, [])}
