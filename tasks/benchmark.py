"""Stage 7: every plan timed beside the dense ones, and the plan that this machine should use.

What is measured in time is in no stage before this one, so that those are the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ffn2moe import runtime, timing
from tasks import corpus
from tasks.params import Params
from tasks.stage import StageRun, main

TEXTS = 400  # of the evaluation split, which the batches run through


def run(stage: StageRun) -> None:
    params, root = stage.params, stage.root
    folder = root / "exports" / params.name
    manifest = runtime.read_manifest(folder)
    texts = [row["text"] for row in corpus.read_jsonl(root / "data/corpus/evaluation.jsonl")][:TEXTS]
    settings = params.benchmark
    require_room(manifest, params)

    def track(label: str, rounds: range) -> Iterator[int]:
        return stage.track(rounds, len(rounds), label)

    timings: list[timing.Timing] = []
    for rows in timing.time_export(
        folder,
        texts,
        shapes=settings.shapes,
        threads=settings.threads,
        rounds=settings.rounds,
        decode_tokens=settings.decode_tokens,
        track=track,
    ):
        what = f"{rows[0].batch} x {rows[0].sequence}, threads {rows[0].threads}"
        for phase in dict.fromkeys(row.phase for row in rows):
            told = ", ".join(f"{row.plan} {row.median_ms:.2f} ms" for row in rows if row.phase == phase)
            stage.say(f"{what}{'' if phase == 'whole' else f', {phase}'}: {told}")
        timings += rows

    keeps_quality = {
        plan: float(entry["retention"]) >= params.gate.min_retention for plan, entry in manifest["plans"].items()
    }
    choice = timing.choose(timing.largest_shape(timings), keeps_quality)
    stage.say(choice.reason)
    budget = manifest["plans"][choice.plan].get("num_active")
    bounds = bounds_of(folder, max(sequence for _, sequence in settings.shapes), budget)
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
            "machine": timing.machine(),
            "timings": by_plan,
        },
    )
    stage.write_json(
        "metrics/benchmark.json",
        {
            "default_plan": choice.plan,
            "speedup_vs_best_dense": round(choice.speedup_vs_best_dense, 4),
            "bounds": bounds,
            "largest_shape": {row.plan: row_of(row) for row in timing.largest_shape(timings)},
        },
    )
    stage.write_csv("metrics/plots/benchmark.csv", [{"plan": row.plan, **row_of(row)} for row in timings])


def require_room(manifest: Mapping[str, Any], params: Params) -> None:
    """ValueError where a prompt of the shapes, with what is decoded after it, is more than the model can hold."""
    held = manifest.get("model", {}).get("positions") if manifest["spec"]["head"] == "causal" else None
    longest = max(sequence for _, sequence in params.benchmark.shapes)
    if held is not None and longest + params.benchmark.decode_tokens > held:
        raise ValueError(
            f"benchmark.shapes have prompts of {longest} tokens, and with benchmark.decode_tokens = "
            f"{params.benchmark.decode_tokens} after them that is more than the {held} that the model can hold: "
            "lower one"
        )


def row_of(row: timing.Timing) -> dict[str, Any]:
    """One timing for a file, without its plan's name and without digits that mean nothing."""
    values = {key: value for key, value in asdict(row).items() if key != "plan"}
    values["tokens_per_second"] = row.tokens_per_second
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def bounds_of(folder: Path, length: int, num_active: int | None = None) -> dict[str, float]:
    """How much faster the mixture could be end to end: by its FLOPs, and by Amdahl's law (routing for free).

    `num_active` is the budget of an elastic mixture; None is its own.
    """
    from transformers import AutoConfig

    from ffn2moe import checkpoint, metrics

    spec = checkpoint.load_spec(folder / "checkpoint", num_active)
    config = AutoConfig.from_pretrained(folder / "checkpoint")
    teacher, student = metrics.flops_per_token(spec, config, length)
    return {
        "flops": round(teacher.total / student.total, 4),
        "amdahl": round(metrics.amdahl_bound(teacher, spec.active_share), 4),
        "ffn_share": round(teacher.ffn / teacher.total, 4),
    }


if __name__ == "__main__":
    main("benchmark", run)
