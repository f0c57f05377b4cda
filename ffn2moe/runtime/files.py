"""Read the files of an export and check them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MANIFEST, PLAN_FILE = "manifest.json", "plan.json"

# --- the files of an export -----------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the export in folder `path`."""
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not an export: it has no {MANIFEST}; name a folder like exports/minilm (make run writes it)"
        )
    return _read_json(file, ("plans", "spec"))


def read_plan(path: Path) -> dict[str, Any] | None:
    """Return plan.json, which the benchmark writes beside the manifest; None where it has not run."""
    file = path / PLAN_FILE
    return _read_json(file, ("default_plan", "timings")) if file.is_file() else None


def no_such_plan(path: Path, manifest: Mapping[str, Any], plan: str) -> str:
    """Return the message for a plan that an export does not have: why not, or which plans it has."""
    if plan in manifest.get("left_out", {}):
        return f"{path} is shipped without the plan {plan!r}; {manifest['bring_back']} brings it back"
    refused = manifest.get("refused", {}).get(plan)
    because = f": {refused}" if refused else f"; it has: {', '.join(sorted(manifest['plans']))}"
    return f"{path} has no plan {plan!r}{because}"


def checked_files(path: Path, entry: Mapping[str, Any]) -> list[Path]:
    """Return the graph files of one plan: the main one, then its encoder's, if it has one.

    ValueError if a file has other bytes than were exported.
    """
    for name, known in graph_files(entry).items():
        file = path / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: copy the whole folder again, or make the export again")
        if sha256(file) != known:
            raise ValueError(
                f"{file} is damaged (its sha256 is not the one in {MANIFEST}): "
                "copy the folder again, or make the export again"
            )
    return [path / entry[key] for key in ("file", "encoder") if key in entry]


def graph_files(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return every file of a plan's entry in the manifest, with its sha256; the encoder's is among them."""
    return {entry["file"]: entry["sha256"], **entry.get("more", {})}


def sha256(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy it again, or make the export again") from error
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: it is not of this version; make the export again")
    return content


# --- text to batches ------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, max_length: int | None) -> Tokenizer:
    """Return the fast tokenizer saved in `folder`; it truncates texts to `max_length` tokens, if any, and pads none.

    Which end of a text is cut stands in tokenizer_config.json, not in tokenizer.json.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole export again, or make it again")
    tokenizer = Tokenizer.from_file(str(file))
    if max_length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_length, direction=tokenizer_settings(folder).get("truncation_side", "right"))
    tokenizer.no_padding()
    return tokenizer


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json of a saved tokenizer says; nothing where there is none."""
    config = folder / "tokenizer_config.json"
    return _read_json(config, ()) if config.is_file() else {}


def padding_id(folder: Path, tokenizer: Tokenizer) -> int:
    """Return the id of the padding token, or 0 where there is none: masked positions are never read."""
    return token_id(folder, tokenizer, "pad_token") or 0


def token_id(folder: Path, tokenizer: Tokenizer, key: str) -> int | None:
    """Return the id of the token under a key of tokenizer_config.json; None where there is none."""
    token = tokenizer_settings(folder).get(key)
    name = token["content"] if isinstance(token, dict) else token
    found: int | None = tokenizer.token_to_id(name) if name else None
    return found
