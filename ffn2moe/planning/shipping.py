"""Write an export with the plans that are used, and bring the others back.

An export of every plan is several times as large as the dense model. What ships is the chosen plans, one portable plan,
which any ONNX runtime opens (`Plan.portable`), and the checkpoint: docs/decisions/0025.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffn2moe.runtime.files import MANIFEST, PLAN_FILE, graph_files, read_manifest, read_plan
from ffn2moe.runtime.plans import PLANS, form_of, is_dense, plan_of

LARGEST = 2.0  # an export over the dense model or over its own checkpoint, the larger of the two, in bytes
_CONTAINER, _GGUF = "container", "gguf"
_UNCOUNTED = (MANIFEST, PLAN_FILE, _CONTAINER, _GGUF)


@dataclass(frozen=True)
class Size:
    """The bytes of an export, of the dense model (its graph and tokenizer), and of what every export has beside graphs.

    The last is mostly the checkpoint. Those of its native container and of its GGUF files are apart.
    """

    export: int
    container: int
    dense: int
    gguf: int = 0
    beside: int = 0

    @property
    def share(self) -> float:
        return self.export / self.dense

    @property
    def fits(self) -> bool:
        """Whether the export is no larger than it should be (`LARGEST`): experts can hold more than the dense model."""
        return self.export <= LARGEST * max(self.dense, self.beside)

    def __str__(self) -> str:
        container = f" and a container of {_mib(self.container)}" if self.container else ""
        gguf = f" and GGUF files of {_mib(self.gguf)}" if self.gguf else ""
        return f"{_mib(self.export)}, {self.share:.1f}x the dense model ({_mib(self.dense)}){container}{gguf}"


class Shipment:
    """What can be shipped of an export in `folder` that holds every plan, the dense model's included."""

    def __init__(self, folder: Path, keeps_quality: Mapping[str, bool]) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._entries: Mapping[str, Any] = self.manifest["plans"]
        self._keeps_quality = keeps_quality
        files = {file for entry in self._entries.values() for file in graph_files(entry)}
        self._bytes_of = {file: (folder / file).stat().st_size for file in files}
        self._dense = self._bytes(["dense"]) + _bytes(folder / "tokenizer")
        self._always = sum(_bytes(path) for path in self._others() if path.name not in _UNCOUNTED)

    def portable(self, chosen: Sequence[str]) -> str:
        """Return the portable plan to ship beside the chosen ones: it keeps the quality, and fits if any does.

        Beside a mixture it is a mixture, too, and of these the one that adds least. A chosen plan adds nothing.
        """
        able = [plan for plan in self._entries if is_portable(plan) and self._keeps_quality.get(plan, False)]
        only_dense = all(map(is_dense, chosen))

        def rank(plan: str) -> tuple[bool, bool, int]:
            graphs = self._bytes([*chosen, plan])
            fits = Size(self._always + graphs, 0, self._dense, beside=self._always).fits
            return not fits, is_dense(plan) and not only_dense, graphs

        return min(able, key=rank)

    def size(self, chosen: Sequence[str]) -> Size:
        """Return how large the export is with these plans and the portable one beside them."""
        graphs = self._bytes([*chosen, self.portable(chosen)])
        container, gguf = (_bytes(self.folder / name) for name in (_CONTAINER, _GGUF))
        return Size(self._always + graphs, container, self._dense, gguf, self._always)

    def fits(self, chosen: Sequence[str]) -> bool:
        """Return whether the export with these plans is no larger than it should be."""
        return self.size(chosen).fits

    def write(self, target: Path, chosen: Sequence[str], details: Mapping[str, Any]) -> dict[str, Any]:
        """Write the export to the empty folder `target`, with `details` in the manifest; return the manifest.

        The manifest has the entries of the other plans under `left_out`. Files are linked where the disk allows it.
        """
        portable = self.portable(chosen)
        shipped = {plan: self._entries[plan] for plan in self._entries if plan in (*chosen, portable)}
        for path in self._others():
            if path.name not in (PLAN_FILE, MANIFEST):
                _link(path, target / path.name)
        link_graphs(self.folder, target, shipped.values())
        left_out = {plan: entry for plan, entry in self._entries.items() if plan not in shipped}
        manifest = self.manifest | {"plans": shipped, "left_out": left_out, "portable": portable} | dict(details)
        _write_json(target / MANIFEST, manifest)
        return manifest

    def _others(self) -> list[Path]:
        """Return everything of the export but its graphs."""
        graphs = {Path(file).parts[0] for file in self._bytes_of}
        return [path for path in sorted(self.folder.iterdir()) if path.name not in graphs]

    def _bytes(self, plans: Iterable[str]) -> int:
        """Return the bytes of the graphs of some plans; plans of several engines may share a file."""
        return sum(self._bytes_of[file] for file in {one for plan in plans for one in graph_files(self._entries[plan])})


def is_portable(plan: str) -> bool:
    """Return whether a known plan is made of standard ONNX ops alone and runs in ONNX Runtime."""
    return form_of(plan) in PLANS and plan_of(plan).portable


def link_graphs(source: Path, target: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Put the graphs of some plans into another folder, as links where the disk allows it."""
    for file in {file for entry in entries for file in graph_files(entry)}:
        _link(source / file, target / file)


def complete(export: Path, source: Path) -> list[str]:
    """Put the plans that an export was written without back, from the export of every plan; return their names.

    ValueError where `source` has other graphs than those that were left out.
    """
    manifest = read_manifest(export)
    left_out: dict[str, Any] = manifest.get("left_out", {})
    if others := _others(left_out, source):
        raise ValueError(f"{source} has other graphs of {', '.join(others)} than {export} was made with")
    link_graphs(source, export, left_out.values())
    _write_json(export / MANIFEST, manifest | {"plans": manifest["plans"] | left_out, "left_out": {}})
    return list(left_out)


def complete_as(export: Path, before: Path) -> list[str]:
    """Put the plans back that an earlier state of an export had been completed with; return their names.

    [] if it had not been, or if the graphs are others now.
    """
    if not brought_back(before) or _others(read_manifest(export).get("left_out", {}), before):
        return []
    return complete(export, before)


def leave_out(export: Path) -> None:
    """Undo `complete`: the export has the bytes that it was written with."""
    gone = brought_back(export)
    if not gone:
        return
    manifest = read_manifest(export)
    left_out = {plan: manifest["plans"].pop(plan) for plan in gone}
    _write_json(export / MANIFEST, manifest | {"left_out": left_out})
    used = {file for entry in manifest["plans"].values() for file in graph_files(entry)}
    for file in {file for entry in left_out.values() for file in graph_files(entry)} - used:
        (export / file).unlink(missing_ok=True)


def brought_back(export: Path) -> list[str]:
    """Return the plans that an export was completed with; [] if it was not, or is damaged."""
    try:
        manifest, plan = read_manifest(export), read_plan(export)
    except (ValueError, FileNotFoundError):
        return []
    if plan is None or manifest.get("left_out", True):
        return []
    return [name for name in manifest["plans"] if name not in (*plan["plans"], manifest["portable"])]


def _others(left_out: Mapping[str, Any], source: Path) -> list[str]:
    """Return the plans whose graphs in the export `source` are not those that were left out."""
    whole = read_manifest(source)["plans"]
    return [plan for plan, entry in left_out.items() if whole.get(plan, {}).get("sha256") != entry["sha256"]]


def _link(source: Path, target: Path) -> None:
    """Link a file or the files of a folder, and copy them where the disk cannot."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside its place and move it there, so that it is never half written, nor into a link."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _bytes(path: Path) -> int:
    files: Collection[Path] = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _mib(size: int) -> str:
    return f"{size / 2**20:.{0 if size >= 10 * 2**20 else 1}f} MiB"
