"""Check what is made: texts to learn from, experts, container, plans."""

from __future__ import annotations

from collections.abc import Iterator

from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.dense.families import positions
from ffn2moe.planning.measure import require_readable
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.doubt import Doubt
from ffn2moe.preflight.texts import image_files
from ffn2moe.runtime.engines import ENGINES, installed_engines
from ffn2moe.runtime.plans import plan_of, plans_on_request
from ffn2moe.runtime.workload import Workload


def corpus(case: Case) -> Iterator[str]:
    """Read the beginning of the corpus."""
    asked = case.request
    if "images" in case.dense.reads:
        yield f"{len(image_files(case.corpus, asked))} images in {case.corpus}"
        return
    if case.corpus == "generated":
        yield "the model writes the texts itself"
        return
    more = asked.texts is not None and (case.sample.count is None or case.sample.count > asked.texts)
    used = f", of which {asked.texts} are used" if more else ""
    yield f"{case.corpus}: {case.sample.number}{used}"
    if asked.corpus == "auto" and case.dense.head == "causal":
        yield f"a model of this size writes too slowly: {asked.call('corpus', 'generated')} makes it write all the same"
    if case.pairs:
        columns = asked.text_column
        yield f"read in pairs: {f'the columns {columns}' if ',' in columns else 'made of the texts of the corpus'}"


def experts(case: Case) -> Iterator[str]:
    """Divide the FFNs."""
    spec = case.spec
    for shape in spec.stacks:
        if shape.layers_kept or shape.teacher_ffn_width:
            yield f"keeping {shape.describe_layers()} and {shape.describe_neurons()} of each FFN"
        if spec.is_dense:
            continue
        shared = f" and {shape.shared_width} shared neurons" if shape.shared_width else ""
        yield (
            f"{shape.num_layers} layers, width {shape.width}: {shape.ffn_width} neurons become {spec.num_experts} "
            f"experts of {shape.expert_width}{shared}; {spec.num_active} are active"
        )
        padding = shape.shared_width + spec.num_experts * shape.expert_width - shape.ffn_width
        if padding and not PARTITIONS[spec.partition].refilled:
            yield f"{padding} zero neurons fill the last experts up, which changes no result"
    if spec.is_dense:
        yield "none: a dense student"
    elif PARTITIONS[spec.partition].refilled:
        yield "experts are for clusters of tokens: a neuron may stand in several of them, or in none"
    elif spec.head == "causal" and all(shape.gated for shape in spec.stacks):
        yield Doubt(
            f"{spec.num_active} of {spec.num_experts} disjoint experts lose more in a gated language model than "
            f"pruning does: {case.request.call('num_active', 1)} gives experts for clusters of tokens, which lose less"
        )
    if case.widths_by_need:
        yield "that is the width on average: each layer gets what it is worth to the model"
    elif spec.head == "causal" and PARTITIONS[spec.partition].refilled and case.reduction is None:
        asked, share = case.request, round(spec.active_share, 2)
        pruned = (asked.call("num_experts", 1), asked.call("ffn_width", share), asked.call("width_per_layer", "budget"))
        yield (
            "a student without experts, with a width for each layer, keeps about as much and is simpler to serve in "
            f"llama.cpp (docs/results/students.md): {' '.join(pruned)}"
        )
    yield f"{100 * spec.active_share:.0f} % of the FFNs is active for a token"


def container(case: Case) -> Iterator[str]:
    """Choose the native architecture."""
    yield case.container_reason


def plans(case: Case) -> Iterator[str]:
    """Find out which plans can be made here.

    Those of an engine that is not installed are left out. ValueError where that is ONNX Runtime, whose plans the others
    are compared with, where no engine is installed, for a plan that is asked for by name and cannot be made, and for
    texts to time plans on that the model cannot read.
    """
    asked, dense = case.request, case.dense
    if not asked.onnx:
        yield "none: without ONNX graphs"
        return
    if asked.engines is not None:
        ENGINES["onnxruntime"].require()
    if not installed_engines():
        raise ValueError(
            "no engine is installed that runs ONNX graphs: pip install onnxruntime, or use `ffn2moe convert --no-onnx`"
        )
    able = plans_on_request(dense.head, without_experts=asked.num_experts == 1)
    for name in asked.more_plans:
        if name not in able:
            raise ValueError(
                f"{asked.call('more_plans', name)}: a model with the head {dense.head} cannot have this plan; it can "
                f"ask for {', '.join(able) or 'none'}"
            )
        ENGINES[plan_of(name).engine].require()
    if asked.timed:
        reads = {"spec": {"head": dense.head, "max_length": case.max_length}}
        try:
            require_readable(
                Workload.of(dict.fromkeys(asked.timed, 1.0)),
                reads | {"model": {"positions": positions(dense.config)}},
                asked.decode_tokens,
            )
        except ValueError as error:
            raise ValueError(f"{asked.call('timed')}: {error}") from None
    yield ", ".join(name for name, reason in case.plans.items() if reason is None)
    for reason in dict.fromkeys(reason for reason in case.plans.values() if reason is not None):
        left_out = ", ".join(name for name, found in case.plans.items() if found == reason)
        yield Doubt(f"left out: {left_out}: {reason}")
