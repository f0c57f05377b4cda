"""Stage 6: write the student and its teacher as ONNX graphs, one a plan, and check each before any is kept.

A float32 graph beyond its tolerance from PyTorch fails the stage; within it, the graph has the quality that stage 5
found. A graph that computes something else on purpose (int8, another form of GELU, another budget of an elastic
mixture) is judged again: by the retrieval benchmark, by its perplexity, or by its agreement with the teacher. The share
of the teacher's figure that a plan keeps decides later whether it may be chosen. A language model for a native
container is also written as one.

models/exported has every plan; the stage `benchmark` writes those that are used to exports/NAME.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import HEADS
from tasks.plan_quality import PlanQuality
from tasks.stage import StageRun, main
from tasks.tokens import read_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ffn2moe.onnx.parity import Sample
    from ffn2moe.spec import MoESpec

STUDENT, TEACHER, EXPORTED = "models/distilled", "data/teacher", "models/exported"
PACKAGES = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")
# The largest relative mean difference of a container's logits from the student's: with the container's own gates, and
# with unit gates, which a container can only approximate.
CONTAINER_TOLERANCE, UNIT_TOLERANCE = 1e-4, 1e-2


def run(stage: StageRun) -> None:
    import ffn2moe
    from ffn2moe.dense.load import load_dense
    from ffn2moe.moe import checkpoint
    from ffn2moe.onnx.parity import text_samples, with_token_types
    from ffn2moe.onnx.write import export_model
    from ffn2moe.runtime import files as runtime_files
    from ffn2moe.runtime.engines import distribution

    params, root = stage.params, stage.root
    spec = checkpoint.load_spec(root / STUDENT)
    student = checkpoint.load(root / STUDENT)
    teacher, tokenizer = load_dense(str(root / TEACHER), head=spec.head)
    quality = PlanQuality(stage, spec, teacher, tokenizer)

    with stage.out(EXPORTED) as folder:
        ids = quality.ids[: params.export.parity_texts]
        manifest = export_model(
            student,
            teacher,
            tokenizer,
            spec,
            folder,
            engines=params.export.engines,
            more_plans=params.export.more_plans,
            samples=with_token_types(text_samples(ids, spec.head, params.seed), student, spec.head, params.seed),
            calibration=calibration_samples(stage, spec, tokenizer),
            float_tolerance=params.export.float_tolerance,
            tanh_tolerance=params.export.tanh_tolerance,
            track=stage.track,
        )
        if quality.tokens.pairs:
            manifest["model"]["pairs"] = True
        entries: dict[str, dict[str, Any]] = manifest["plans"]
        for name, entry in stage.track(entries.items(), len(entries), "judging plans"):
            entry |= quality.of(name, entry, manifest, folder)
        for plan, entry in entries.items():
            stage.say(
                f"{plan}: {entry['parity_max_abs']:.1e} from PyTorch, {quality.summary(entry)} "
                f"({100 * entry['retention']:.1f} % of the teacher's)"
            )
        for plan, reason in manifest["refused"].items():
            stage.say(f"no plan {plan}: {reason}")
        if spec.container:
            manifest["container"] = write_container(stage, student, teacher, spec, folder / "container", ids)
            write_card(folder / "container", spec, manifest["container"])
        if params.export.gguf:
            manifest["gguf"] = write_gguf_files(stage, folder, "container" if spec.container else "checkpoint")
        engines = {"onnxruntime"} | {entry["engine"] for entry in entries.values()}
        packages = (*PACKAGES, *(distribution(engine) or engine for engine in sorted(engines)))
        manifest |= {
            "teacher": {"source": spec.teacher, "sha256": runtime_files.sha256(teacher_weights(root / TEACHER))},
            "seed": params.seed,
            "data_sha256": data_sha256(root / "data"),
            "versions": {"ffn2moe": ffn2moe.__version__} | {package: version(package) for package in packages},
        }
        StageRun("export", params, folder).write_json("manifest.json", manifest)


def calibration_samples(stage: StageRun, spec: MoESpec, tokenizer: Any) -> list[Sample]:
    """Return the calibration texts of the run in batches, for plans that round activations in measured ranges."""
    if HEADS[spec.head].generates:  # none of their plans does
        return []
    path = stage.root / "data/corpus/calibration.jsonl"
    tokens = read_tokens(path, spec.head, tokenizer, spec.max_length, prompt=spec.prompt)
    batches = tokens.in_order(stage.params.evaluate.batch_texts)
    return [{name: tensor.numpy() for name, tensor in batch.inputs.items()} for batch in batches]


def write_container(
    stage: StageRun, student: Any, teacher: Any, spec: MoESpec, folder: Path, ids: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Write the student as its native container, audit it, compare its logits, and return what the manifest says."""
    import torch

    from ffn2moe.containers.checks import same_logits
    from ffn2moe.containers.fit import engine_notes
    from ffn2moe.containers.table import CONTAINERS
    from ffn2moe.containers.write import save

    assert spec.container is not None
    container = CONTAINERS[spec.container]
    save(student, spec, folder, assets=stage.root / TEACHER)
    length = max(map(len, ids))
    whole = [list(text) for text in ids if len(text) == length]
    found = same_logits(student, folder, torch.tensor(whole))
    limit = CONTAINER_TOLERANCE if spec.gate == container.gate else UNIT_TOLERANCE
    if not found.mean <= limit:
        raise ValueError(
            f"the logits of the container {container.name} differ from the student's by {found.mean:.1e} of the "
            f"largest, on average, and {limit:.0e} is allowed: this version of transformers computes it in another "
            "way; set decompose.container=none, or install the versions of constraints.txt"
        )
    stage.say(
        f"container {container.name}: audited; its logits in plain transformers differ by {found.mean:.1e}, "
        f"{100 * found.top1:.1f} % of the tokens are the same"
    )
    agreement = {key: rounded(value) for key, value in asdict(found).items()}
    notes = engine_notes(container, teacher.config)
    return {"name": container.name, "folder": "container", "agreement": agreement, "notes": notes}


def write_gguf_files(stage: StageRun, folder: Path, source: str) -> dict[str, Any]:
    """Write the model in the folder `source` as a GGUF file in each wanted type; return what the manifest says."""
    from ffn2moe.containers.gguf.write import write_gguf

    files: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    for kind in stage.params.export.gguf:
        path = folder / "gguf" / f"{kind}.gguf"
        written = write_gguf(folder / source, path, kind, track=stage.track)
        files[kind], notes = f"gguf/{path.name}", written.notes
        stage.say(f"GGUF {kind}: {written.architecture}, {written.bytes / 2**20:.4g} MiB")
    for note in notes:
        stage.say(f"GGUF: {note}")
    return {"files": files, "notes": list(notes)}


def write_card(folder: Path, spec: MoESpec, container: Mapping[str, Any]) -> None:
    """Write what the folder of a container holds, and what its engines need."""
    teacher = Path(spec.teacher).name if Path(spec.teacher).is_absolute() else spec.teacher
    lines = [
        f"# {teacher} as a mixture of experts ({container['name']})",
        "",
        f"ffn2moe decomposed each feed-forward layer of `{teacher}` into {spec.num_experts} experts and distilled "
        f"the mixture from the dense model. A token runs {spec.num_active} experts a layer. transformers loads the "
        f"`{container['name']}` model with `AutoModelForCausalLM`, without further code.",
        "",
        *(f"- {note}" for note in container["notes"]),
    ]
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def rounded(value: float) -> float:
    """Return a difference with three digits."""
    return float(f"{value:.3g}")


def teacher_weights(folder: Path) -> Path:
    """Return the first weight file of the teacher."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{folder} has no *.safetensors file: run the stage prepare again")
    return found[0]


def data_sha256(folder: Path) -> str:
    """Return one sha256 over the corpus and the benchmarks: names and contents of their files."""
    from ffn2moe.runtime.files import sha256

    total = hashlib.sha256()
    for part in ("corpus", "benchmarks"):
        for file in sorted((folder / part).rglob("*.jsonl")):
            total.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


if __name__ == "__main__":
    main("export", run)
