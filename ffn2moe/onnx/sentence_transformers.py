"""Write an export as a folder that other libraries open."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ffn2moe.runtime.files import checked_files, no_such_plan, read_manifest
from ffn2moe.runtime.plans import default_plan

MODULES = ("Transformer", "Pooling", "Normalize")  # the chain of sentence-transformers; the embeddings are unit vectors
_POOLING = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


def sentence_transformers_folder(export: str | Path, out: str | Path, plan: str | None = None) -> Path:
    """Write a folder that ``SentenceTransformer(out, backend="onnx")`` opens without this package, and return it.

    It holds one plan's graph (by default the one that the benchmark chose) as ``onnx/model.onnx``, the tokenizer and
    the pooling; sentence-transformers reads the graph's output `last_hidden_state` and pools it itself. Written beside
    `out` and renamed at the end. ValueError for an export that makes no embeddings, an unknown plan, or a folder that
    is taken; a damaged graph is refused.
    """
    export, out = Path(export), Path(out)
    manifest = read_manifest(export)
    spec = manifest["spec"]
    if spec["pooling"] is None:
        raise ValueError(f"{export} is a {spec['head']} model: sentence-transformers opens embedding models only")
    chosen = plan or default_plan(export, manifest["plans"])
    if chosen not in manifest["plans"]:
        raise ValueError(no_such_plan(export, manifest, chosen))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: remove it, or name another folder")
    graph, *_ = checked_files(export, manifest["plans"][chosen])

    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(export / "tokenizer", partial)
        shutil.copyfile(export / "checkpoint" / "config.json", partial / "config.json")
        (partial / "onnx").mkdir()
        shutil.copyfile(graph, partial / "onnx" / "model.onnx")
        folders = ("", "1_Pooling", "2_Normalize")
        chain = [
            {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{module}"}
            for index, (folder, module) in enumerate(zip(folders, MODULES, strict=True))
        ]
        pooling = {"word_embedding_dimension": spec["stacks"][0]["width"]}
        pooling |= {key: mode == spec["pooling"] for mode, key in _POOLING.items()}
        for name, content in (
            ("modules.json", chain),
            ("sentence_bert_config.json", {"max_seq_length": spec["max_length"], "do_lower_case": False}),
            ("1_Pooling/config.json", pooling),
        ):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
