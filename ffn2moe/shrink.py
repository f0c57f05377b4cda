"""Fit a mixture in a folder to one task, with fewer experts, and write it as an export."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ffn2moe.data.batches import Batch, in_order
from ffn2moe.data.corpus import read_corpus
from ffn2moe.data.pairs import encode_pairs, pairs_of, read_pairs
from ffn2moe.decompose.source import skeleton
from ffn2moe.dense.config import takes_token_types
from ffn2moe.dense.cross_encoder import reads_pairs
from ffn2moe.moe import checkpoint
from ffn2moe.numerics import choose_device
from ffn2moe.onnx.write import export_or_checkpoint
from ffn2moe.progress import Say, Track, silent, untracked
from ffn2moe.shrinking.model import require_shrinkable, shrink_model
from ffn2moe.shrinking.usage import see
from ffn2moe.spec import MoESpec

HELD_OUT = 5  # every fifth text is held out to judge by
BATCH_TEXTS = 16


def shrink(
    path: str | Path,
    texts: str | Path,
    out: str | Path,
    *,
    keep: int,
    method: str = "drop",
    text_column: str = "text",
    calibration_tokens: int = 16384,
    device: str = "auto",
    onnx: bool = True,
    say: Say = silent,
    track: Track = untracked,
) -> dict[str, Any]:
    """Fit the mixture in `path` to the task of `texts`, with `keep` experts; write it as an export to `out`.

    `path` is an export or a checkpoint folder; `texts` is a corpus of `ffn2moe.data.corpus.read_corpus`. Returns the
    manifest, whose `shrink` reports every layer. There are no dense plans, because neither folder has the dense model.
    `out` is written whole or not at all. ValueError or FileNotFoundError, with cause and remedy.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or name another folder")
    folder, reader = _folders(Path(path))
    spec = checkpoint.load_spec(folder)
    require_shrinkable(spec, keep, method)
    device = choose_device(device)
    tokenizer = _tokenizer(reader)
    ids, type_ids = _token_ids(str(texts), text_column, tokenizer, spec, skeleton(folder, spec.head))
    model = checkpoint.load(folder)
    apart = set(range(HELD_OUT - 1, len(ids), HELD_OUT)) or {len(ids) - 1}
    learned = [place for place in range(len(ids)) if place not in apart]
    judged = sorted(apart)
    pad_id = tokenizer.pad_token_id or 0

    def batches(places: list[int]) -> list[Batch]:
        types = [type_ids[place] for place in places] if type_ids else None
        rows = [ids[place] for place in places]
        return list(in_order(spec.head, rows, type_ids=types, batch_texts=BATCH_TEXTS, pad_id=pad_id))

    task, held_out = (see(model, batches(part), calibration_tokens, device) for part in (learned, judged))
    say(f"{len(learned)} texts show which experts are used, {len(judged)} what is lost")
    smaller, reports = shrink_model(model, spec, task, held_out, keep=keep, method=method, track=track)
    details = {
        "from": spec.to_dict(),
        "keep": keep,
        "method": method,
        "texts": len(ids),
        "layers": [asdict(report) for report in reports],
    }
    return _write(model, smaller, tokenizer, out, details, onnx=onnx, say=say, track=track)


def _write(
    model: Any,
    spec: MoESpec,
    tokenizer: Any,
    out: Path,
    details: dict[str, Any],
    *,
    onnx: bool,
    say: Say,
    track: Track,
) -> dict[str, Any]:
    """Write the export, whole or not at all, and return its manifest."""
    from ffn2moe.onnx import write as export

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = export_or_checkpoint(model, None, tokenizer, spec, partial, onnx=onnx, say=say, track=track)
        manifest["shrink"] = details
        export.write_manifest(partial, manifest)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _folders(path: Path) -> tuple[Path, Path]:
    """Return the checkpoint folder of an export or checkpoint, and the folder of its tokenizer."""
    from ffn2moe.containers.table import CONTAINERS
    from ffn2moe.runtime.files import MANIFEST

    if (path / MANIFEST).is_file():
        return path / "checkpoint", path / "tokenizer"
    config = path / "config.json"
    if config.is_file() and not (path / checkpoint.SPEC_FILE).is_file():
        model_type = json.loads(config.read_text()).get("model_type")
        if model_type in CONTAINERS:
            raise ValueError(
                f"{path} is a native {model_type} container, which does not hold its partition: name the export or "
                "the checkpoint folder that it was written with"
            )
    checkpoint.load_spec(path)
    readers = [folder for folder in (path, path.parent / "tokenizer") if any(folder.glob("tokenizer*"))]
    if not readers:
        raise FileNotFoundError(f"{path} has no tokenizer: copy the model's into it, or name a whole export")
    return path, readers[0]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no readable tokenizer ({str(error).strip().splitlines()[0]}): experts are counted "
            "on texts, so the model must read text"
        ) from None


def _token_ids(
    texts: str, column: str, tokenizer: Any, spec: MoESpec, model: Any
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Return the texts, or pairs of them where the model reads pairs, as token ids, truncated to the model's length.

    The second is which text of its pair each token belongs to, if the model tells them apart. ValueError for fewer than
    two texts.
    """
    in_pairs = spec.head == "classification" and ("," in column or reads_pairs(model.config))
    rows: Sequence[Any] = read_pairs(texts, column) if in_pairs and "," in column else read_corpus(texts, column)
    if len(rows) < 2:
        raise ValueError(f"{texts} holds one text: give two or more, to see which experts are used and what is lost")
    if in_pairs:
        pairs = rows if "," in column else pairs_of(rows, 0)
        return encode_pairs(tokenizer, pairs, spec.max_length, told_apart=takes_token_types(model))
    found = [spec.prompt + text for text in rows]
    return tokenizer(found, truncation=True, max_length=spec.max_length)["input_ids"], None
