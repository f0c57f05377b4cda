"""Stage 7: time every plan of every engine beside the dense ones, choose the plans for this machine, and ship them.

Plans are chosen for the shapes of the workload, and one for lists of texts.

No earlier stage measures time, so that their outs are the same bytes everywhere. exports/NAME has the chosen plans, one
portable plan and the checkpoint (`ffn2moe.planning.shipping`); the other plans stay in models/exported and in the cache
of DVC.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ffn2moe.planning import lists, measure, plan_file, timing
from ffn2moe.planning.shipping import LARGEST, Shipment
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import read_manifest
from ffn2moe.runtime.workload import Workload
from tasks import corpus
from tasks.lock import locked_outs
from tasks.stage import StageRun, main
from tasks.workload import shapes_of

TEXTS = 400  # of the evaluation split, which the batches run through


def run(stage: StageRun) -> None:
    params, root = stage.params, stage.root
    folder = root / "models/exported"
    manifest = read_manifest(folder)
    texts = [row["text"] for row in corpus.read_jsonl(root / "data/corpus/evaluation.jsonl")][:TEXTS]
    settings, workload = params.benchmark, workload_of(shapes_of(params.benchmark, manifest))
    keeps_quality = measure.quality_of(manifest, params.gate.min_retention)

    def track(label: str, rounds: range) -> Iterator[int]:
        return stage.track(rounds, len(rounds), label)

    measured = measure.measure(
        measure.Setting(
            folder, workload, settings.threads, keeps_quality, settings.decode_tokens, measure.retention_of(manifest)
        ),
        texts,
        rounds=settings.rounds,
        track=track,
        report=lambda rows: say_times(stage, rows),
    )
    measured = lists.with_lists(
        measured, texts, rounds=settings.rounds, track=track, report=lambda rows: say_times(stage, rows)
    )
    for plan, reason in measured.left_out.items():
        stage.say(f"{plan} does not run here: {reason}")

    shipment = Shipment(folder, keeps_quality)
    planned = partial(
        plan_file.planned, measured, min_retention=params.gate.min_retention, texts=texts, shipment=shipment
    )
    content = planned()
    if manifest["spec"]["head"] == "embedding" and len(content["plans"]) > 1:
        mixed = mixed_retention(root, folder, content["plans"], manifest, settings.threads[0])
        stage.say(f"queries on one plan and documents on another keep {100 * mixed:.1f} % of the teacher's at least")
        if mixed < params.gate.min_retention:
            stage.say("that is less than gate.min_retention: choosing one plan for every batch")
            content = planned(max_plans=1)
        content["mixed_retention"] = round(mixed, 6)
    for reason in (content["reason"], *(row["reason"] for row in content["lists"])):
        stage.say(reason)
    content["bounds"] = plan_file.bounds_of(folder, workload.longest, content["default_plan"])
    ship(stage, shipment, content)
    stage.write_json(
        "metrics/benchmark.json",
        {
            **{key: content[key] for key in ("default_plan", "speedup_vs_best_dense", "bounds")},
            "memory_mib": content["memory_mib"],
            "largest_shape": {row.plan: plan_file.row_of(row) for row in largest_shape(measured.timings)},
        },
    )
    stage.write_csv(
        "metrics/plots/benchmark.csv", [{"plan": row.plan, **plan_file.row_of(row)} for row in measured.timings]
    )


def ship(stage: StageRun, shipment: Shipment, content: Mapping[str, Any]) -> None:
    """Write exports/NAME: the chosen plans, the portable one, and what says how to get the others back."""
    name = stage.params.name
    size = shipment.size(content["plans"])
    details = {
        "bring_back": f"make plans NAME={name}",
        "exported": locked_outs(stage.root, "export").get("models/exported"),  # by this hash DVC finds all plans
        "bytes": asdict(size),
    }
    with stage.out(f"exports/{name}") as target:
        manifest = shipment.write(target, content["plans"], details)
        StageRun("benchmark", stage.params, target).write_json("plan.json", content)
    shipped, left_out = " and ".join(manifest["plans"]), ", ".join(manifest["left_out"])
    stage.say(f"exports/{name} has {shipped}; {manifest['portable']} opens in any ONNX runtime")
    if left_out:
        stage.say(f"not in it: {left_out}; {manifest['bring_back']} brings them back")
    stage.say(f"exports/{name}: {size}")
    if not size.fits:
        stage.say(f"that is more than {LARGEST:g}x: no smaller portable plan keeps gate.min_retention of the quality")


def workload_of(shapes: Sequence[tuple[int | float, ...]]) -> Workload:
    """Return the workload; a shape without a weight comes as often as the others."""
    return Workload.of(
        {(int(batch), int(sequence)): float(*weight or [1]) for batch, sequence, *weight in shapes},
        "params.yaml",
    )


def say_times(stage: StageRun, rows: Sequence[timing.Timing]) -> None:
    first = rows[0]
    what = f"lists of {first.batch} texts" if first.phase == "list" else f"{first.batch} x {first.sequence}"
    for phase in dict.fromkeys(row.phase for row in rows):
        times = ", ".join(f"{row.plan} {row.median_ms:.2f} ms" for row in rows if row.phase == phase)
        shown = "" if phase in ("whole", "list") else f", {phase}"
        stage.say(f"{what}, threads {first.threads}{shown}: {times}")


def largest_shape(timings: Sequence[timing.Timing]) -> list[timing.Timing]:
    """Return the timings of whole batches or requests at the most tokens, on the first number of threads."""
    whole = [row for row in timings if row.phase in timing.DECISIVE]
    most = max(whole, key=lambda row: row.batch * row.sequence)
    return [row for row in whole if (row.batch, row.sequence, row.threads) == (most.batch, most.sequence, most.threads)]


def mixed_retention(root: Path, folder: Path, plans: Sequence[str], manifest: dict[str, Any], threads: int) -> float:
    """Return what the worst pair of plans keeps of the teacher's retrieval: queries on one, documents on the other.

    A query comes alone and documents come many at once, as a batch or a list, so the two may run on different plans.
    """
    import torch

    from ffn2moe import metrics

    pairs = corpus.read_jsonl(root / "data/benchmarks/retrieval.jsonl")
    queries, documents = {}, {}
    for plan in plans:
        export = open_export(folder, plan, threads)
        queries[plan] = torch.from_numpy(export.encode([row["query"] for row in pairs]))
        documents[plan] = torch.from_numpy(export.encode([row["document"] for row in pairs]))
    entry = manifest["plans"][plans[0]]
    teacher = entry["retrieval_ndcg_at_10"] / entry["retention"]
    return min(
        metrics.retrieval(queries[one], documents[other])["ndcg_at_10"] / teacher
        for one in plans
        for other in plans
        if one != other
    )


if __name__ == "__main__":
    main("benchmark", run)
