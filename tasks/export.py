"""Stage 6: the student and its teacher as ONNX graphs, one a plan, each checked before any is kept.

A float32 graph that is further from PyTorch than its tolerance fails the stage; within it, the graph has the quality
that stage 5 found. A graph that computes something else on purpose (int8, another form of GELU) is judged by the
retrieval benchmark. What a plan keeps of the teacher's figure decides later whether it may be chosen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.stage import StageRun, main, remove

if TYPE_CHECKING:
    from ffn2moe.runtime import Export

STUDENT, TEACHER = "models/distilled", "data/teacher"
MEASURED = ("dense8", "fused", "sorted8")  # plans that are not what PyTorch computes
PACKAGES = ("onnx", "onnx-ir", "onnxruntime-gpu", "onnxscript", "torch", "transformers")


def run(stage: StageRun) -> None:
    import ffn2moe
    from ffn2moe import checkpoint, runtime
    from ffn2moe.dense import load_dense
    from ffn2moe.export import export_model
    from ffn2moe.parity import text_samples

    params, root = stage.params, stage.root
    spec = checkpoint.load_spec(root / STUDENT)
    student = checkpoint.load(root / STUDENT)
    teacher, tokenizer = load_dense(str(root / TEACHER))
    pairs = corpus.read_jsonl(root / "data/benchmarks/retrieval.jsonl")
    evaluated = json.loads((root / "metrics/evaluate.json").read_text(encoding="utf-8"))
    known_ndcg = {name: float(evaluated[name]["retrieval"]["ndcg_at_10"]) for name in ("teacher", "student")}

    folder = root / "exports" / params.name
    partial = folder.parent / f".{params.name}.partial"
    remove(partial)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        texts = [row["text"] for row in corpus.read_jsonl(root / "data/corpus/evaluation.jsonl")]
        ids = tokenizer(texts[: params.export.parity_texts], truncation=True, max_length=spec.max_length)["input_ids"]
        manifest = export_model(
            student,
            teacher,
            tokenizer,
            spec,
            partial,
            samples=list(text_samples(ids, spec.head, params.seed)),
            float_tolerance=params.export.float_tolerance,
            tanh_tolerance=params.export.tanh_tolerance,
            track=lambda plans, what: stage.track(plans, len(plans), what),
        )
        entries: dict[str, dict[str, Any]] = manifest["plans"]

        for name, entry in entries.items():
            if name in MEASURED:
                graphs = [
                    runtime.session(file, threads=params.compute.threads)
                    for file in runtime.checked_files(partial, entry)
                ]
                ndcg = retrieval_ndcg(runtime.opened(partial, name, manifest, graphs), pairs)
            else:
                ndcg = known_ndcg["teacher" if name in runtime.DENSE_PLANS else "student"]
            entry["retrieval_ndcg_at_10"] = round(ndcg, 6)
            entry["retention"] = round(ndcg / known_ndcg["teacher"], 6) if known_ndcg["teacher"] else 0.0
        for plan, entry in entries.items():
            stage.say(
                f"{plan}: {entry['parity_max_abs']:.1e} from PyTorch, nDCG@10 {entry['retrieval_ndcg_at_10']:.4f} "
                f"({100 * entry['retention']:.1f} % of the teacher's)"
            )
        manifest |= {
            "teacher": {"source": spec.teacher, "sha256": runtime.sha256(teacher_weights(root / TEACHER))},
            "seed": params.seed,
            "data_sha256": data_sha256(root / "data"),
            "versions": {"ffn2moe": ffn2moe.__version__} | {package: version(package) for package in PACKAGES},
        }
        StageRun("export", params, partial).write_json("manifest.json", manifest)
        keep(partial, folder)
    finally:
        remove(partial)


def keep(partial: Path, folder: Path) -> None:
    """Moves what was made into the export's folder, where the benchmark's plan.json may lie from before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").unlink(missing_ok=True)  # it speaks of other graphs
    for made in sorted(partial.iterdir()):
        remove(folder / made.name)
        os.replace(made, folder / made.name)


def retrieval_ndcg(export: Export, pairs: Sequence[dict[str, str]]) -> float:
    """nDCG@10 of a plan on the retrieval benchmark."""
    import torch

    from ffn2moe.metrics import retrieval

    query_ND = export.encode([row["query"] for row in pairs])
    document_ND = export.encode([row["document"] for row in pairs])
    return retrieval(torch.from_numpy(query_ND), torch.from_numpy(document_ND))["ndcg_at_10"]


def teacher_weights(folder: Path) -> Path:
    """The first weight file of the teacher."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{folder} has no *.safetensors file: run the stage prepare again")
    return found[0]


def data_sha256(folder: Path) -> str:
    """One sha256 over the corpus and the benchmarks: names and contents of their files."""
    from ffn2moe.runtime import sha256

    total = hashlib.sha256()
    for part in ("corpus", "benchmarks"):
        for file in sorted((folder / part).rglob("*.jsonl")):
            total.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


if __name__ == "__main__":
    main("export", run)
