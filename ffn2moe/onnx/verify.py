"""Check graphs against PyTorch: every plan when it is exported, and a whole export whenever a user asks.

Float32 plans must agree to a tolerance. An int8 plan cannot: its quality is judged elsewhere, so here it only has to
point in the same direction. Letters are those of `ffn2moe.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ffn2moe.choices import HEADS
from ffn2moe.moe.variants import Variant
from ffn2moe.onnx.parity import (
    Parity,
    Reference,
    Run,
    Sample,
    agreement,
    parity,
    random_samples,
    reference,
    same_choices,
)
from ffn2moe.runtime.engines import CPU, ENGINES
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import checked_files, no_such_plan, read_manifest
from ffn2moe.runtime.plans import is_dense, plan_of
from ffn2moe.runtime.selftest import self_tests
from ffn2moe.spec import Head, MoESpec

# Largest difference of a float32 plan from PyTorch, as a share of the largest number of a token's or text's vector, or
# of 1 where that is smaller: numbers of unit vectors may differ by this much.
FLOAT_TOLERANCE = 1e-4
TANH_TOLERANCE = 2e-3  # the same where the operator's GELU is the tanh form
# Agreement of a quantised plan's main output with PyTorch's (`parity.agreement`): below, the graph is broken.
INT8_AGREEMENT, INT4_AGREEMENT = 0.9, 0.7
BF16_AGREEMENT = 0.95  # the same for bfloat16, which also moves near ties of the router


class PlanDiffers(ValueError):
    """A plan computes something else than PyTorch; the message says by how much."""


@dataclass(frozen=True)
class Known:
    """PyTorch's outputs for the samples that graphs are compared on."""

    head: Head
    student: list[Reference]
    tanh: list[Reference] | None  # the student with GELU in the tanh form; None where it has no such GELU
    teacher: list[Reference] | None

    @classmethod
    def of(
        cls, spec: MoESpec, student: nn.Module, samples: Sequence[Sample], teacher: nn.Module | None = None
    ) -> Known:
        has_gelu = any(shape.activation == "gelu" and not shape.gated for shape in spec.stacks)
        return cls(
            head=spec.head,
            student=reference(student, samples, spec.head),
            tanh=reference(student, samples, spec.head, tanh=True) if has_gelu else None,
            teacher=reference(teacher, samples, spec.head) if teacher is not None else None,
        )


def plan_parity(
    plan: str,
    run: Run,
    known: Known,
    float_tolerance: float = FLOAT_TOLERANCE,
    tanh_tolerance: float = TANH_TOLERANCE,
) -> tuple[float, Parity]:
    """Return how far a plan is from PyTorch, and the details.

    PlanDiffers for a float32 plan beyond its tolerance, which is a share of the output's own numbers (`Gap.share`).

    The MoE op's GELU is the tanh form on a CPU. A plan that is not `exact` must therefore equal PyTorch with that GELU,
    and its main output must be near the true model's on the rows where the difference moves no token to another expert.
    On other rows another, equally good choice follows, and nothing small is left to compare.
    """
    row = plan_of(plan)
    references = known.teacher if row.dense else known.student
    assert references is not None, "a dense plan is compared with the teacher"
    if row.exact or known.tanh is None:
        found = parity(run, references)
        if not row.is_rounded:
            _require(plan, found, found.widest, float_tolerance)
        return found.max_abs, found
    try:
        exact = parity(run, references)  # on a runtime whose GELU is the erf form
        _require(plan, exact, exact.widest, float_tolerance)
        return exact.max_abs, exact
    except PlanDiffers:
        tanh = parity(run, known.tanh)
        _require(plan, tanh, tanh.widest, float_tolerance)
    found = parity(run, references, only=same_choices(references, known.tanh))
    main = HEADS[known.head].output
    if known.head == "embedding":  # logits follow the other GELU further
        _require(plan, found, main, tanh_tolerance)
    return found.by_output[main], found


def _require(plan: str, found: Parity, output: str, tolerance: float) -> None:
    gap = found.gaps[output]
    if not gap.share <= tolerance:  # nor NaN
        raise PlanDiffers(
            f"the plan {plan} does not compute what PyTorch does: its {output} differs by {gap.difference:.2e} where "
            f"the numbers reach {gap.scale:.3g}, a share of {gap.share:.1e}; {tolerance:.0e} is allowed. A share near "
            "the bound is rounding that this model amplifies: raise export.float_tolerance and judge the plan's "
            f"quality. A larger one is a wrong graph, or a kernel of {plan_of(plan).engine} that is wrong on this "
            "processor: leave its engine out of export.engines, and report it."
        )


# --- a whole export -------------------------------------------------------------------------------------------------


# The dense plans, the layers of the teacher in a plan, or none: plans that compute the same.
Anchor = str | tuple[int, ...]


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    detail: str


def verify(
    path: str | Path,
    *,
    plans: Sequence[str] | None = None,
    texts: int = 16,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
) -> Iterator[Check]:
    """Repeat the checks of an export on this machine: files, operators, and each plan against PyTorch.

    An export does not hold the teacher, so `dense8` and `dense4` are compared with `dense`, and `dense` must only run.
    The same holds for plans in which layers stay dense: a plan that rounds is compared with the first that does not.
    Language models read half of each text at once and the rest token by token, through the cache. Raises
    FileNotFoundError or ValueError where there is no export, or no such plan.
    """
    from ffn2moe.moe import checkpoint

    path = Path(path)
    manifest = read_manifest(path)
    chosen = list(plans or manifest["plans"])
    for plan in chosen:
        if plan not in manifest["plans"]:
            raise ValueError(no_such_plan(path, manifest, plan))
    sound = []
    for plan in chosen:
        check = _attempt(f"{plan}: file", partial(_file, path, plan, manifest["plans"][plan]))
        sound += [plan] if check.passed else []
        yield check
    for plan in sound:
        operator = plan_of(plan).operator
        if operator is not None:
            yield _attempt(
                f"{plan}: self-test of {operator.name}", partial(_self_tests, plan, manifest["spec"], providers)
            )

    spec, student = checkpoint.load_spec(path / "checkpoint"), checkpoint.load(path / "checkpoint")
    same = spec == MoESpec.from_dict(manifest["spec"])
    yield Check("checkpoint", same, f"{'is' if same else 'is not'} what the manifest describes")
    samples = random_samples(student, spec, texts)
    budgets = {plan: manifest["plans"][plan].get("num_active") for plan in sound}
    known = {}
    for num_active in dict.fromkeys(budgets.values()):
        with Variant(num_active).of_model(student, spec, None):
            known[num_active] = Known.of(spec, student, samples)
    anchors: dict[Anchor, tuple[str, list[Reference]]] = {}

    def inexact(plan: str) -> tuple[bool, bool]:  # plans in float32 come first: others are compared with them
        row = plan_of(plan)
        return row.is_rounded or not row.exact, row.engine != "onnxruntime"

    for plan in sorted(sound, key=inexact):
        teachers = "dense" if is_dense(plan) else tuple(manifest["plans"][plan].get("dense_layers", ()))
        of_budget = known[budgets[plan]]
        yield _attempt(
            f"{plan}: parity", partial(_opened_parity, path, plan, threads, providers, of_budget, teachers, anchors)
        )


def _attempt(name: str, action: Callable[[], str]) -> Check:
    try:
        return Check(name, True, action())
    except (ValueError, OSError, RuntimeError) as error:
        return Check(name, False, str(error))


def _file(path: Path, plan: str, entry: Mapping[str, Any]) -> str:
    plan_of(plan)  # of a later version where the table lacks it
    checked_files(path, entry)
    return f"sha256 {entry['sha256'][:12]}..., as exported"


def _self_tests(plan: str, spec: Mapping[str, Any], providers: Sequence[str]) -> str:
    return f"{self_tests(plan, spec, providers):.1e} from float64 arithmetic"


def _opened_parity(
    path: Path,
    plan: str,
    threads: int | None,
    providers: Sequence[str],
    known: Known,
    teachers: Anchor,
    anchors: dict[Anchor, tuple[str, list[Reference]]],
) -> str:
    row, rows = plan_of(plan), sum(len(one.margin_B) for one in known.student)
    details = []
    if not row.is_rounded and not teachers:  # its graph is float32, whatever it runs in
        run = open_export(path, plan, threads, providers, "float32").outputs
        largest, found = plan_parity(plan, run, known)
        details.append(f"{largest:.1e} from PyTorch on {found.rows} texts")
        if ENGINES[row.engine].precision() == "float32":
            return details[0]
        details[0] += " in float32"
    run = open_export(path, plan, threads, providers).outputs
    output = HEADS[known.head].output
    if teachers and teachers not in anchors:
        outputs = [Reference(one.sample, run(one.sample), one.margin_B, ()) for one in known.student]
        agreement(run, outputs, output)  # raises where an output is not finite
        if row.is_rounded:
            return "runs, and gives finite numbers (nothing to compare it with)"
        anchors[teachers] = plan, outputs
        return "runs, and gives finite numbers (the teacher is not in an export)"
    name, references = anchors[teachers] if teachers else ("PyTorch", known.student)
    found_agreement = agreement(run, references, output)
    measure = "mean cosine" if output == "sentence_embedding" else "correlation"
    least = INT4_AGREEMENT if row.bits < 8 else INT8_AGREEMENT if row.is_quantised else BF16_AGREEMENT
    if not found_agreement >= least:
        raise ValueError(f"its {output} has a {measure} of {found_agreement:.3f} with that of {name}, below {least}")
    details.append(f"{measure} {found_agreement:.4f} with {name}, on {rows} texts")
    return "; as it runs, ".join(details)
