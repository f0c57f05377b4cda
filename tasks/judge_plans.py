"""Judge some plans of an export by everything that judges its model, and say what each of them takes.

    python -m tasks.judge_plans JOB.json JUDGED.json

The stage `evaluate` judges the student in float32. A front compares what is run, so it judges the plans. This is not a
stage of dvc.yaml, because it is about the results of whole runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffn2moe.table import Table
from tasks.job import read_json, run_job
from tasks.measures import HEADLINES, at

Judge = Callable[[Mapping[str, Any], Path, str], dict[str, float]]


def judge(job: Mapping[str, Any], out: Path) -> None:
    """Judge the job's `plans` that `out` does not have yet, and add each to it at once.

    Each gets `judges` (name -> share of the teacher's figure), `bytes` of its files, `memory_mib` of a process that
    runs it, and `flops`, a token's as a share of the teacher's.
    """
    export = Path(job["export"])
    head = read_json(export / "manifest.json")["spec"]["head"]
    found = read_json(out) if out.is_file() else {}
    for plan in job["plans"]:
        if plan in found:
            continue
        found[plan] = {"judges": PLAN_JUDGES[head](job, export, plan), **takes(job, export, plan)}
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, out)
        print(f"{export.name} {plan}: {found[plan]}", flush=True)  # noqa: T201


def by_benchmarks(job: Mapping[str, Any], export: Path, plan: str) -> dict[str, float]:
    """Return the share of the teacher's figure on each benchmark that stage 5 judges embeddings by."""
    import torch

    from ffn2moe import metrics
    from ffn2moe.runtime.export import open_export
    from tasks.benchmark_texts import Benchmarks
    from tasks.judge_embeddings import Judged

    benchmarks = Benchmarks.read(Path(job["benchmarks"]))
    texts = benchmarks.texts()
    opened: Any = open_export(export, plan, job["threads"])
    embeddings_ND = metrics.comparable(torch.from_numpy(opened.encode(texts)), opened.sentence)
    figures = Judged(benchmarks, texts, embeddings_ND, job["seed"]).figures
    teacher = read_json(export / "metrics/evaluate.json")["teacher"]
    return {name: at(figures, path) / at(teacher, path) for name, path in paths_of(teacher)}


def by_headline(job: Mapping[str, Any], export: Path, plan: str) -> dict[str, float]:
    """Return the share of the teacher's headline figure, which the stage `export` measured of each plan."""
    manifest = read_json(export / "manifest.json")
    return {".".join(HEADLINES[manifest["spec"]["head"]].path): float(manifest["plans"][plan]["retention"])}


PLAN_JUDGES: Table[Judge] = Table("head")
PLAN_JUDGES.register("embedding", by_benchmarks)
for _head in ("causal", "seq2seq", "classification", "token_classification"):
    PLAN_JUDGES.register(_head, by_headline)


def paths_of(figures: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield name and path of the figures that judge embeddings: of retrieval, similarity and classification."""
    for path in (("retrieval", "ndcg_at_10"), ("stsb", "spearman")):
        if at(figures, path) is not None:
            yield ".".join(path), path
    for name in sorted(figures.get("classification", {})):
        yield f"classification.{name}.accuracy", ("classification", name, "accuracy")


def takes(job: Mapping[str, Any], export: Path, plan: str) -> dict[str, float]:
    """Return the bytes of a plan's files, the memory of a process that runs it, and its FLOPs over the teacher's."""
    from ffn2moe.planning.memory import memory_of
    from ffn2moe.planning.plan_file import bounds_of
    from ffn2moe.runtime.files import graph_files
    from ffn2moe.runtime.plans import is_dense
    from ffn2moe.runtime.workload import Shape

    batch, sequence = job["shape"]
    entry = read_json(export / "manifest.json")["plans"][plan]
    shapes: Sequence[tuple[int, int]] = [(batch, sequence)]
    return {
        "bytes": sum((export / file).stat().st_size for file in graph_files(entry)),
        "memory_mib": memory_of(export, {plan: shapes}, Shape(batch, sequence, 1.0), job["threads"])[plan],
        "flops": 1.0 if is_dense(plan) else 1 / bounds_of(export, sequence, plan)["flops"],
    }


def main(arguments: Sequence[str]) -> int:
    """Judge what one file describes, write the figures to another, and return the exit code."""
    return run_job(judge, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
