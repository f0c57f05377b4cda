"""Write a factorised model as an export: a folder that `ffn2moe.runtime.export` opens, whatever the model's head.

onnx/PLAN.onnx          the graph of a plan, or of several (`ov-dense` runs that of `dense`); of a seq2seq model,
                        its decoder
onnx/PLAN.encoder.onnx  the encoder of a seq2seq model
onnx/*.onnx.data        the weights of a graph of more than 2 GB
tokenizer/              tokenizer or processor of the teacher
checkpoint/             the student for PyTorch (`ffn2moe.load`)
manifest.json           spec, facts of the model, and of each plan its files, their sha256 and its parity
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffn2moe.dense.families import positions
from ffn2moe.dense.locate import family_of
from ffn2moe.moe import checkpoint
from ffn2moe.moe.variants import Variant, variants_of
from ffn2moe.onnx.decoder import canonical_graphs
from ffn2moe.onnx.graph import LARGEST_FILE, save_graph
from ffn2moe.onnx.lower import PlanRefused, lower
from ffn2moe.onnx.parity import MAIN_OUTPUT, Parity, Sample, agreement, random_samples
from ffn2moe.onnx.verify import FLOAT_TOLERANCE, TANH_TOLERANCE, Known, plan_parity
from ffn2moe.runtime import export as runtime
from ffn2moe.runtime import files, native
from ffn2moe.runtime.engines import Engine, has_openvino, openvino, openvino_precision
from ffn2moe.runtime.files import checked_files
from ffn2moe.runtime.plans import (
    DENSE_PLANS,
    NATIVE_PLANS,
    Plan,
    engine_of,
    form_of,
    graph_of,
    plans_of,
    plans_on_request,
    precision_of,
)
from ffn2moe.spec import MoESpec

GRAPHS = "onnx"
CHECKED_ROWS = 16  # where the caller has no samples of its own


def export_model(
    student: Any,
    teacher: Any | None,
    tokenizer: Any,
    spec: MoESpec,
    folder: str | Path,
    *,
    plans: Iterable[Plan] | None = None,
    more_plans: Iterable[Plan] = (),
    engines: Sequence[Engine] | None = None,
    samples: Sequence[Sample] | None = None,
    float_tolerance: float = FLOAT_TOLERANCE,
    tanh_tolerance: float = TANH_TOLERANCE,
    largest_file: int = LARGEST_FILE,
    track: Callable[[Sequence[str], str], Iterable[str]] = lambda plans, _: plans,
) -> dict[str, Any]:
    """Write every plan of a model, for any head, and check each against PyTorch; gives the manifest.

    `student` and `teacher` are transformers models with the head of the spec; without a teacher there are no dense
    plans. `plans` None means all that the head has in these `engines` (`runtime.plans_of`; None: those that are
    installed); `more_plans` are wanted besides (`runtime.plans_on_request`). They are compared on `samples`
    (`ffn2moe.onnx.parity`; None: random ones). Weights of more than `largest_file` bytes go into a file of their own.
    `track` wraps the plans while they are worked through: (plans, what is done) -> plans.

    A plan has the experts of the spec. Each is there again for every variant that may be worth it
    (`ffn2moe.moe.variants`): the other budgets of an elastic mixture (`sorted-k1`, whose entry says `num_active`), and
    layers that stay dense (`sorted-d0`, `dense_layers`). Graphs, files, parity and quality are those of the variant.

    The manifest has `spec`, `model` (facts the runtime needs), `plans` (of each: `engine`, `precision`, `file`,
    `sha256`, `encoder` and `more` files where there are any, `parity_max_abs`, `parity`, and `agreement`, how well its
    main output points in PyTorch's direction, where it rounds more than float32 does) and `refused`: the reason for
    each plan whose operators cannot hold the model, or are not built. A plan that runs in bfloat16 has the parity of
    its graph in float32. The caller may add to it, and writes it with `write_manifest`: until then the folder is no
    export. ValueError for a graph beyond its tolerance, or a model that cannot be exported; EngineMissing for an engine
    that was asked for and is not installed.
    """
    folder = Path(folder)
    (folder / GRAPHS).mkdir(parents=True, exist_ok=True)
    installed: tuple[Engine, ...] = ("onnxruntime", "openvino") if has_openvino() else ("onnxruntime",)
    wanted = tuple(plans_of(spec.head, engines or installed) if plans is None else plans)
    wanted = tuple(dict.fromkeys((*wanted, *more_plans)))
    unknown = [plan for plan in more_plans if plan not in plans_on_request(spec.head)]
    if unknown:
        raise ValueError(
            f"the plan {unknown[0]!r} cannot be asked for with the head {spec.head!r}: "
            f"{', '.join(plans_on_request(spec.head)) or 'none'} can"
        )
    if any(engine_of(plan) == "openvino" for plan in wanted):
        openvino()
    if teacher is None:
        wanted = tuple(plan for plan in wanted if plan not in DENSE_PLANS)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    checkpoint.save(student, None, spec, folder / "checkpoint")
    manifest: dict[str, Any] = {"spec": spec.to_dict(), "model": facts(student, spec), "plans": {}, "refused": {}}
    entries: dict[str, dict[str, Any]] = manifest["plans"]

    variant_of: dict[str, Variant] = {plan: Variant() for plan in wanted}
    for other in variants_of(spec, with_teacher=teacher is not None):
        variant_of |= {other.name(plan): other for plan in wanted if plan not in DENSE_PLANS}
    needs_dense = teacher is not None and any(plan in DENSE_PLANS for plan in wanted)
    dense = canonical_graphs(teacher, spec.head, spec.pooling) if needs_dense else {}
    mixtures: dict[Variant, dict[str, Any]] = {}
    written: dict[str, dict[str, Any]] = {}  # files of each graph
    for plan in track(tuple(variant_of), "writing plans"):
        form, variant, name = form_of(plan), variant_of[plan], graph_of(plan)
        if form in manifest["refused"]:
            continue
        if engine_of(plan) == "openvino" and (lacking := _openvino_lacks(student, spec)):
            manifest["refused"][plan] = f"{plan}: {lacking}"
            continue
        if form in NATIVE_PLANS and not native.is_built():  # what cannot be checked is not shipped
            manifest["refused"][plan] = f"{plan}: its operator is not built here; {native.REMEDY}"
            continue
        if name not in written:
            if form not in DENSE_PLANS and variant not in mixtures:
                with variant.of_model(student, spec, teacher):  # one variant's graphs in memory at a time
                    mixtures = {variant: canonical_graphs(student, spec.head, spec.pooling)}
            canonical = dense if form in DENSE_PLANS else mixtures[variant]
            try:
                graphs = {part: lower(graph, form_of(name)) for part, graph in canonical.items()}  # type: ignore[arg-type]
            except PlanRefused as reason:
                manifest["refused"][plan] = str(reason)
                continue
            written[name] = _write(graphs, name, folder, largest_file)
        entries[plan] = {"engine": engine_of(plan)} | written[name] | variant.told()

    if samples is None:
        samples = random_samples(student, spec, CHECKED_ROWS)
    known: dict[Variant, Known] = {}
    for plan in track(tuple(entries), "checking plans"):
        form, variant = form_of(plan), variant_of[plan]
        if variant not in known:
            with variant.of_model(student, spec, teacher):
                compared = teacher if needs_dense and variant == Variant() else None
                known[variant] = Known.of(spec, student, samples, compared)
        files = checked_files(folder, entries[plan])
        sessions = runtime.open_graphs(files, plan, threads=1, precision="float32")
        opened = runtime.opened(folder, plan, manifest, sessions)
        largest, found = plan_parity(plan, opened.outputs, known[variant], float_tolerance, tanh_tolerance)
        entries[plan] |= {"parity_max_abs": _rounded(largest), "parity": _details(found)}
        if engine_of(plan) == "openvino" and openvino_precision() != "float32":
            sessions = runtime.open_graphs(files, plan, threads=1)
            opened = runtime.opened(folder, plan, manifest, sessions)
        entries[plan]["precision"] = precision_of(plan, sessions[0])
        if entries[plan]["precision"] != "float32":
            references = known[variant].teacher if form in DENSE_PLANS else known[variant].student
            assert references is not None
            entries[plan]["agreement"] = _rounded(agreement(opened.outputs, references, MAIN_OUTPUT[spec.head]))
    return manifest


def _openvino_lacks(model: Any, spec: MoESpec) -> str | None:
    """Why the plans of OpenVINO cannot run this model, if they cannot."""
    if spec.head == "seq2seq":
        return "plans of OpenVINO are not for models of an encoder and a decoder"
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        # It takes such attention apart as it reads the graph, and keys that heads share no longer fit.
        return "OpenVINO has no attention with a soft cap on its scores; plans without ov- have it"
    return None


def _write(graphs: Mapping[str, Any], name: str, folder: Path, largest_file: int) -> dict[str, Any]:
    """Writes the graphs of a plan, its main one and an encoder's; gives what the manifest says of the files."""
    files: dict[str, str] = {}
    for part, graph in graphs.items():
        saved = save_graph(graph, folder / _file(name, part), largest_file)
        files |= {f"{GRAPHS}/{file}": digest for file, digest in saved.items()}
    main = _file(name, "main")
    entry: dict[str, Any] = {"file": main, "sha256": files.pop(main)}
    if "encoder" in graphs:
        entry["encoder"] = _file(name, "encoder")
    if files:
        entry["more"] = files
    return entry


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Makes the folder an export: its manifest, in the same bytes for the same content."""
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (Path(folder) / files.MANIFEST).write_text(text, encoding="utf-8")


def _file(plan: str, part: str) -> str:
    return f"{GRAPHS}/{plan}.onnx" if part == "main" else f"{GRAPHS}/{plan}.{part}.onnx"


def facts(model: Any, spec: MoESpec) -> dict[str, Any]:
    """What the runtime has to know of a model beside its spec."""
    facts: dict[str, Any] = {"reads": family_of(model).reads}
    if spec.head in ("causal", "seq2seq"):
        generation = model.generation_config

        def token(name: str) -> Any:
            value = getattr(generation, name, None)
            return getattr(model.config, name, None) if value is None else value

        ends = token("eos_token_id")
        facts |= {
            "positions": positions(model.config),
            "vocabulary": model.config.get_text_config(decoder=True).vocab_size,
            "bos_token_id": token("bos_token_id"),
            "eos_token_ids": [] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        }
    if spec.head == "seq2seq":
        facts["decoder_start_token_id"] = token("decoder_start_token_id")
    return facts


def _details(found: Parity) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in found.by_output.items()} | {
        "texts": found.rows,
        "near_ties": found.near_ties,
    }


def _rounded(value: float) -> float:
    """Three digits: what a difference is worth telling."""
    return float(f"{value:.3g}")
