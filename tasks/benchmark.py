"""Stage 7: every plan timed beside the dense ones, and the plan that this machine should use.

What is measured in time is in no stage before this one, so that those are the same bytes everywhere.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ffn2moe import runtime, timing
from tasks import corpus
from tasks.stage import StageRun, main

TEXTS = 400  # of the evaluation split, which the batches run through


def run(stage: StageRun) -> None:
    params, root = stage.params, stage.root
    folder = root / "exports" / params.name
    manifest = runtime.read_manifest(folder)
    texts = [row["text"] for row in corpus.read_jsonl(root / "data/corpus/evaluation.jsonl")][:TEXTS]
    settings = params.benchmark

    timings: list[timing.Timing] = []
    for threads in settings.threads:
        exports = {plan: runtime.open_export(folder, plan, threads) for plan in manifest["plans"]}
        for batch, sequence in settings.shapes:
            description = f"{batch} x {sequence}, threads {threads}"

            def track(rounds: range, description: str = description) -> Iterator[int]:
                return stage.track(rounds, len(rounds), description)

            batches = timing.full_batches(exports["dense"], texts, batch, sequence)
            found = timing.interleaved(exports, batches, rounds=settings.rounds, threads=threads, track=track)
            stage.say(f"{description}: " + ", ".join(f"{row.plan} {row.median_ms:.2f} ms" for row in found))
            timings += found

    keeps_quality = {
        plan: float(entry["retention"]) >= params.gate.min_retention for plan, entry in manifest["plans"].items()
    }
    choice = timing.choose(largest_shape(timings), keeps_quality)
    stage.say(choice.reason)
    bounds = bounds_of(folder, max(sequence for _, sequence in settings.shapes))
    by_plan = {plan: [row_of(row) for row in timings if row.plan == plan] for plan in manifest["plans"]}
    stage.write_json(
        f"exports/{params.name}/plan.json",
        {
            "default_plan": choice.plan,
            "best_dense_plan": choice.best_dense,
            "speedup_vs_best_dense": round(choice.speedup_vs_best_dense, 4),
            "reason": choice.reason,
            "keeps_quality": keeps_quality,
            "bounds": bounds,
            "machine": machine(),
            "timings": by_plan,
        },
    )
    stage.write_json(
        "metrics/benchmark.json",
        {
            "default_plan": choice.plan,
            "speedup_vs_best_dense": round(choice.speedup_vs_best_dense, 4),
            "bounds": bounds,
            "largest_shape": {row.plan: row_of(row) for row in largest_shape(timings)},
        },
    )
    stage.write_csv("metrics/plots/benchmark.csv", [{"plan": row.plan, **row_of(row)} for row in timings])


def largest_shape(timings: Sequence[timing.Timing]) -> list[timing.Timing]:
    """The timings that decide: at the most tokens, on the first number of threads of the parameters."""
    most = max(row.batch * row.sequence for row in timings)
    rows = [row for row in timings if row.batch * row.sequence == most]
    return [row for row in rows if (row.batch, row.threads) == (rows[0].batch, rows[0].threads)]


def row_of(row: timing.Timing) -> dict[str, Any]:
    """One timing for a file, without its plan's name and without digits that mean nothing."""
    values = {key: value for key, value in asdict(row).items() if key != "plan"}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def bounds_of(folder: Path, length: int) -> dict[str, float]:
    """How much faster the mixture could be: by its share of the FLOPs, were everything else free or not."""
    from transformers import AutoConfig

    from ffn2moe import checkpoint, metrics

    spec = checkpoint.load_spec(folder / "checkpoint")
    config = AutoConfig.from_pretrained(folder / "checkpoint")
    teacher, student = metrics.flops_per_token(spec, config, length)
    return {
        "flops": round(teacher.total / student.total, 4),
        "amdahl": round(metrics.amdahl_bound(teacher, spec.active_share), 4),
        "ffn_share": round(teacher.ffn / teacher.total, 4),
    }


def machine() -> dict[str, Any]:
    """What was measured on; no name of the host."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime-gpu"),
    }


def cpu_name() -> str:
    """The processor's name, and which of the instructions it has that int8 arithmetic is fast with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set(fields.get("flags", "").split())
    known = [label for label, flag in _INT8_FLAGS.items() if flag in flags]
    return f"{name} ({', '.join(known)})" if known else name


_INT8_FLAGS = {"AVX2": "avx2", "AVX512-VNNI": "avx512_vnni", "AMX-INT8": "amx_int8"}


if __name__ == "__main__":
    main("benchmark", run)
