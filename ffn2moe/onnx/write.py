"""Write a mixture as an export: a folder that `ffn2moe.runtime.export` opens, whatever the model's head.

onnx/PLAN.onnx          the graph of a plan, or of several (`ov-dense` runs that of `dense`); the decoder of a seq2seq
                        model
onnx/PLAN.encoder.onnx  the encoder of a seq2seq model
onnx/*.onnx.data        the weights of a graph of more than 2 GB
tokenizer/              tokenizer or processor of the teacher
checkpoint/             the student for PyTorch (`ffn2moe.load`)
manifest.json           spec, facts of the model, and for each plan its files, their sha256 and its parity
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffn2moe.choices import HEADS
from ffn2moe.dense.config import takes_token_types
from ffn2moe.dense.families import positions
from ffn2moe.dense.locate import family_of
from ffn2moe.moe import checkpoint
from ffn2moe.moe.variants import Variant, variants_of
from ffn2moe.onnx.decoder import canonical_graphs
from ffn2moe.onnx.graph import save_graph
from ffn2moe.onnx.lower import PlanRefused, lower
from ffn2moe.onnx.parity import Parity, Sample, agreement, random_samples
from ffn2moe.onnx.static import measure_ranges
from ffn2moe.onnx.verify import FLOAT_TOLERANCE, TANH_TOLERANCE, Known, PlanDiffers, plan_parity
from ffn2moe.progress import Say, Track, untracked
from ffn2moe.runtime import export as runtime
from ffn2moe.runtime import files
from ffn2moe.runtime.at_once import TOKEN_TYPES
from ffn2moe.runtime.engines import ENGINES, EngineRefused, installed_engines
from ffn2moe.runtime.plans import (
    UNMEASURED_PLANS,
    Plan,
    decodes,
    form_of,
    graph_of,
    is_dense,
    obstacle,
    plan_of,
    plans_of,
    plans_on_request,
    precision_of,
)
from ffn2moe.spec import MoESpec

GRAPHS = "onnx"
CHECKED_ROWS = 16  # random samples where the caller has none of its own


def export_model(
    student: Any,
    teacher: Any | None,
    tokenizer: Any,
    spec: MoESpec,
    folder: str | Path,
    *,
    plans: Iterable[str] | None = None,
    more_plans: Iterable[str] = (),
    engines: Sequence[str] | None = None,
    samples: Sequence[Sample] | None = None,
    calibration: Sequence[Sample] = (),
    float_tolerance: float = FLOAT_TOLERANCE,
    tanh_tolerance: float = TANH_TOLERANCE,
    track: Track = untracked,
) -> dict[str, Any]:
    """Write every plan of a model, for any head, and check each against PyTorch; return the manifest.

    `student` and `teacher` are transformers models with the head of the spec; without a teacher there are no dense
    plans. `plans` None takes all default plans of the head in these `engines` (None: the installed ones); `more_plans`
    are added (`ffn2moe.runtime.plans.plans_on_request`). Each is compared with PyTorch on `samples`
    (`ffn2moe.onnx.parity`; None: random ones). `calibration` has real texts, on which the ranges of activations are
    measured; without any, plans that need ranges (`Plan.calibrated`) are refused.

    A plan has the experts of the spec. It is repeated for every variant that may be worth it (`ffn2moe.moe.variants`):
    another budget of an elastic mixture (`sorted-k1`, whose entry says `num_active`), and layers that stay dense
    (`sorted-d0`, `dense_layers`). Graphs, files, parity and quality are those of the variant.

    The manifest has `spec`, `model` (facts that the runtime needs), `plans` and `refused`, the reason for each plan
    that cannot hold the model, or whose engine is not installed or operator not built. An entry of `plans` has
    `engine`, `precision`, `file`, `sha256`, `encoder` and `more` files where there are any, `parity_max_abs`, `parity`,
    and `agreement` with PyTorch where the plan rounds more than float32 does. A plan that runs in bfloat16 has the
    parity of its graph in float32.
    The caller may add to the manifest, and writes it with `write_manifest`: before that the folder is no export.

    ValueError for an unknown plan or engine, a graph of standard operators beyond its tolerance, or a model that cannot
    be exported; EngineMissing for a plan that is asked for by name and whose engine is not installed.
    """
    folder = Path(folder)
    (folder / GRAPHS).mkdir(parents=True, exist_ok=True)
    wanted = _wanted(spec, plans, more_plans, engines, with_teacher=teacher is not None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    # Without experts the checkpoint is an ordinary folder of transformers, which has its tokenizer inside.
    checkpoint.save(student, tokenizer if spec.is_dense else None, spec, folder / "checkpoint")
    manifest = bare_manifest(student, spec, tokenizer)
    models = _Models(student, teacher, spec, calibration)
    variant_of = {plan: Variant() for plan in wanted}
    for other in variants_of(spec, with_teacher=teacher is not None):
        variant_of |= {other.name(plan): other for plan in wanted if not is_dense(plan)}
    _write_plans(models, variant_of, folder, manifest, track)

    if samples is None:
        samples = random_samples(student, spec, CHECKED_ROWS)
    _check_plans(models, variant_of, folder, manifest, samples, (float_tolerance, tanh_tolerance), track)
    return manifest


def _check_plans(
    models: _Models,
    variant_of: Mapping[str, Variant],
    folder: Path,
    manifest: dict[str, Any],
    samples: Sequence[Sample],
    tolerances: tuple[float, float],
    track: Track,
) -> None:
    """Compare each plan with PyTorch and complete its entry; move one that its engine cannot run to `refused`.

    A plan on an engine's own operator that computes something else is moved there, too: the others do without it. Any
    other plan that does is an error in a graph that the others share.
    """
    references: dict[Variant, Known] = {}
    entries: dict[str, dict[str, Any]] = manifest["plans"]
    for plan in track(tuple(entries), len(entries), "checking plans"):
        variant = variant_of[plan]
        if variant not in references:
            references[variant] = models.references(variant, samples)
        try:
            entries[plan] |= _check(plan, folder, manifest, references[variant], *tolerances)
        except (EngineRefused, PlanDiffers) as error:
            if isinstance(error, PlanDiffers) and plan_of(plan).exact:
                raise
            manifest["refused"][plan] = f"{plan}: {error}"
            _leave_out(plan, entries, folder)
            if not entries:
                raise


def _leave_out(plan: str, entries: dict[str, dict[str, Any]], folder: Path) -> None:
    """Remove the entry of a plan, and those of its files that no other plan uses."""
    gone = set(files.graph_files(entries.pop(plan)))
    for file in gone.difference(*map(files.graph_files, entries.values())):
        (folder / file).unlink()


def _wanted(
    spec: MoESpec,
    plans: Iterable[str] | None,
    more_plans: Iterable[str],
    engines: Sequence[str] | None,
    *,
    with_teacher: bool,
) -> tuple[str, ...]:
    """Return the plans to write, each once. ValueError for one that does not exist or cannot be asked for."""
    head = spec.head
    if engines is not None:
        engines = [ENGINES.require(engine) for engine in engines]
    named = plans is not None
    wanted = (
        plans_of(head, engines or installed_engines(), without_experts=spec.is_dense) if plans is None else tuple(plans)
    )
    more = tuple(more_plans)
    can_ask_for = plans_on_request(head, without_experts=spec.is_dense)
    for plan in more:
        plan_of(plan)
        if plan not in can_ask_for:
            raise ValueError(
                f"the plan {plan!r} cannot be asked for with the head {head!r}: {', '.join(can_ask_for) or 'none'} can"
            )
    wanted = tuple(dict.fromkeys((*wanted, *more)))
    for plan in wanted if named else more:
        ENGINES[plan_of(plan).engine].require()
    return tuple(plan for plan in wanted if with_teacher or not is_dense(plan))


class _Models:
    """The student and its teacher, as canonical graphs and as PyTorch's outputs, for one variant after the other."""

    def __init__(self, student: Any, teacher: Any | None, spec: MoESpec, calibration: Sequence[Sample]) -> None:
        self.student, self.teacher, self.spec, self.calibration = student, teacher, spec, calibration
        self._dense: dict[str, Any] | None = None
        self._mixtures: dict[Variant, dict[str, Any]] = {}

    def canonical(self, plan: Plan, variant: Variant) -> dict[str, Any]:
        """Return the canonical graphs that a plan starts from; those of one variant are in memory at a time."""
        spec = self.spec
        if plan.dense:
            if self._dense is None:
                self._dense = canonical_graphs(self.teacher, spec.head)
            return self._dense
        if variant not in self._mixtures:
            with variant.of_model(self.student, spec, self.teacher):
                self._mixtures = {variant: canonical_graphs(self.student, spec.head)}
        return self._mixtures[variant]

    def references(self, variant: Variant, samples: Sequence[Sample]) -> Known:
        """Return PyTorch's outputs for the samples; the teacher's beside those of the spec itself."""
        with variant.of_model(self.student, self.spec, self.teacher):
            compared = self.teacher if self._dense is not None and variant == Variant() else None
            return Known.of(self.spec, self.student, samples, compared)


def _write_plans(
    models: _Models,
    variant_of: Mapping[str, Variant],
    folder: Path,
    manifest: dict[str, Any],
    track: Track,
) -> None:
    """Write the graph of each plan, and enter it in the manifest under `plans`, or with the reason under `refused`."""
    written: dict[str, dict[str, Any]] = {}  # files of each graph
    for name in track(tuple(variant_of), len(variant_of), "writing plans"):
        plan, variant, graph = plan_of(name), variant_of[name], graph_of(name)
        if form_of(name) in manifest["refused"]:
            continue
        reason = obstacle(plan, models.spec.head, models.student.config)
        if reason is not None:
            manifest["refused"][name] = f"{name}: {reason}"
            continue
        if graph not in written:
            canonical = models.canonical(plan, variant)
            try:
                if plan.calibrated and models.calibration:
                    measure_ranges(canonical["main"], models.calibration, lower(canonical["main"], "sorted"))
                graphs = {part: lower(one, form_of(graph)) for part, one in canonical.items()}
            except PlanRefused as refusal:
                manifest["refused"][name] = str(refusal)
                continue
            written[graph] = _write(graphs, graph, folder)
        manifest["plans"][name] = {"engine": plan.engine} | written[graph] | variant.metadata()


def _check(
    name: str,
    folder: Path,
    manifest: Mapping[str, Any],
    known: Known,
    float_tolerance: float,
    tanh_tolerance: float,
) -> dict[str, Any]:
    """Compare a plan with PyTorch; return `parity_max_abs`, `parity`, `precision` and, where it rounds, `agreement`."""
    plan, paths = plan_of(name), files.checked_files(folder, manifest["plans"][name])
    graphs = runtime.open_graphs(paths, name, threads=1, precision="float32")
    opened = runtime.opened(folder, name, manifest, graphs)
    largest, found = plan_parity(name, opened.outputs, known, float_tolerance, tanh_tolerance)
    if ENGINES[plan.engine].precision() != "float32":
        graphs = runtime.open_graphs(paths, name, threads=1)
        opened = runtime.opened(folder, name, manifest, graphs)
    precision = precision_of(name, graphs[0].precision)
    checked = {"parity_max_abs": _rounded(largest), "parity": _details(found), "precision": precision}
    if precision != "float32":
        references = known.teacher if plan.dense else known.student
        assert references is not None
        checked["agreement"] = _rounded(agreement(opened.outputs, references, HEADS[known.head].output))
    return checked


def _write(graphs: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Write the graphs of a plan, its main one and an encoder's; return what the manifest says of the files."""
    digests: dict[str, str] = {}
    for part, graph in graphs.items():
        saved = save_graph(graph, folder / _file(name, part))
        digests |= {f"{GRAPHS}/{file}": digest for file, digest in saved.items()}
    main = _file(name, "main")
    entry: dict[str, Any] = {"file": main, "sha256": digests.pop(main)}
    if "encoder" in graphs:
        entry["encoder"] = _file(name, "encoder")
    if digests:
        entry["more"] = digests
    return entry


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, which makes the folder an export: the same content gives the same bytes."""
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (Path(folder) / files.MANIFEST).write_text(text, encoding="utf-8")


def _file(plan: str, part: str) -> str:
    return f"{GRAPHS}/{plan}.onnx" if part == "main" else f"{GRAPHS}/{plan}.{part}.onnx"


def facts(model: Any, spec: MoESpec, reader: Any) -> dict[str, Any]:
    """Return the facts of a model that the runtime needs beside its spec; `reader` is its tokenizer, if it has one."""
    facts: dict[str, Any] = {"reads": family_of(model).reads}
    if HEADS[spec.head].classifies:
        facts["labels"] = [model.config.id2label[index] for index in range(model.config.num_labels)]
        facts["token_types"] = takes_token_types(model) and TOKEN_TYPES in getattr(reader, "model_input_names", ())
    if decodes(spec.head):
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
    if spec.head == "causal":
        facts["chats"] = getattr(reader, "chat_template", None) is not None
    if spec.head == "seq2seq":
        facts["decoder_start_token_id"] = token("decoder_start_token_id")
    return facts


def _details(found: Parity) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in found.by_output.items()} | {
        "texts": found.rows,
        "near_ties": found.near_ties,
    }


def _rounded(value: float) -> float:
    """Return a difference with three digits."""
    return float(f"{value:.3g}")


def export_or_checkpoint(
    model: Any,
    teacher: Any | None,
    reader: Any,
    spec: MoESpec,
    folder: Path,
    *,
    onnx: bool,
    every_plan: bool = False,
    calibration: Sequence[Sample] = (),
    say: Say,
    track: Track,
) -> dict[str, Any]:
    """Write a mixture to the empty `folder` as an export, and return the manifest, whose file is not written.

    It has one portable plan (`UNMEASURED_PLANS`), or every plan, the teacher's included (`calibration`: see
    `export_model`). Without `onnx`, and where no graphs can be made (`say` tells why), it has the checkpoint and
    tokenizer alone.
    """
    if onnx:
        try:
            plans = None if every_plan else (UNMEASURED_PLANS[spec.is_dense],)
            return export_model(model, teacher, reader, spec, folder, plans=plans, calibration=calibration, track=track)
        except ValueError as error:
            say(f"no ONNX graphs: {error}")
            shutil.rmtree(folder)
            folder.mkdir()
    reader.save_pretrained(folder / "tokenizer")
    checkpoint.save(model, reader if spec.is_dense else None, spec, folder / "checkpoint")
    return bare_manifest(model, spec, reader)


def bare_manifest(model: Any, spec: MoESpec, reader: Any) -> dict[str, Any]:
    """Return the manifest of an export without plans."""
    return {"spec": spec.to_dict(), "model": facts(model, spec, reader), "plans": {}, "refused": {}}
