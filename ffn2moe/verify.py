"""Check graphs against PyTorch: every plan when it is exported, and a whole export whenever a user asks.

Float32 plans must agree to a tolerance. An int8 plan cannot; it is judged by what it is for, so here it only has to
point in the same direction. Letters as in `ffn2moe.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ffn2moe import runtime
from ffn2moe.onnx_graph import Parity, Reference, Run, parity, reference, same_choices
from ffn2moe.runtime import CPU, DENSE_PLANS, INT8_PLANS
from ffn2moe.spec import MoESpec

FLOAT_TOLERANCE = 1e-4  # largest difference of a float32 plan
TANH_TOLERANCE = 2e-3  # the same where the operator's GELU is the tanh form
INT8_COSINE = 0.9  # of an int8 plan's embeddings with PyTorch's, on average: below, the graph is broken
LARGEST_BATCH = 8

Batch = tuple[np.ndarray, np.ndarray]  # token ids and mask, int64 [B, L]


def random_batches(ids: Sequence[Sequence[int]], seed: int) -> Iterator[Batch]:
    """Texts, as token ids, in batches of random sizes, each cut to a random length of at least one token."""
    random = np.random.default_rng(seed)
    start = 0
    while start < len(ids):
        size = int(random.integers(1, LARGEST_BATCH + 1))
        longest = int(random.integers(1, max(map(len, ids)) + 1))
        yield runtime.pad([tokens[:longest] for tokens in ids[start : start + size]], 0)
        start += size


@dataclass(frozen=True)
class Known:
    """PyTorch's outputs for the batches that graphs are compared on."""

    student: list[Reference]
    tanh: list[Reference] | None  # the student with GELU in the tanh form; None where it has no GELU
    teacher: list[Reference] | None

    @classmethod
    def of(cls, spec: MoESpec, student: nn.Module, batches: Sequence[Batch], teacher: nn.Module | None = None) -> Known:
        return cls(
            student=reference(student, batches, spec.pooling),
            tanh=reference(student, batches, spec.pooling, tanh=True) if spec.activation == "gelu" else None,
            teacher=reference(teacher, batches, spec.pooling) if teacher is not None else None,
        )


def plan_parity(
    plan: str,
    run: Run,
    known: Known,
    float_tolerance: float = FLOAT_TOLERANCE,
    tanh_tolerance: float = TANH_TOLERANCE,
) -> tuple[float, Parity]:
    """How far a plan is from PyTorch, and the details; ValueError for a float32 plan beyond its tolerance.

    The MoE op's GELU is the tanh form on a CPU. So `fused` must be exact against PyTorch with that GELU, and its
    embeddings near those of the true model, on the texts where the difference moves no token to another expert:
    where it does, what follows is another, equally good choice and nothing small is left to compare.
    """
    references = known.teacher if plan in DENSE_PLANS else known.student
    assert references is not None, "a dense plan is compared with the teacher"
    if plan == "fused" and known.tanh is not None:
        try:
            exact = parity(run, references)  # on a runtime whose GELU is the erf form
            _require(plan, exact.max_abs, float_tolerance)
            return exact.max_abs, exact
        except ValueError:
            _require(plan, parity(run, known.tanh).max_abs, float_tolerance)
        found = parity(run, references, only=same_choices(references, known.tanh))
        _require(plan, found.embedding_max_abs, tanh_tolerance)
        return found.embedding_max_abs, found
    found = parity(run, references)
    if plan not in INT8_PLANS:
        _require(plan, found.max_abs, float_tolerance)
    return found.max_abs, found


def _require(plan: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # nor NaN
        raise ValueError(
            f"the plan {plan} is {difference:.2e} from PyTorch, more than the {tolerance:.0e} allowed: "
            "this onnxruntime computes something else than the one the versions are locked to"
        )


# --- a whole export -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

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
    """Repeats the checks of an export on this machine: files, the MoE op, and each plan against PyTorch.

    The teacher is not in an export, so `dense8` is compared with `dense`, and `dense` must only run. Raises
    FileNotFoundError or ValueError where there is no export, or no such plan.
    """
    from ffn2moe import checkpoint

    path = Path(path)
    manifest = runtime.read_manifest(path)
    chosen = list(plans or manifest["plans"])
    unknown = [plan for plan in chosen if plan not in manifest["plans"]]
    if unknown:
        raise ValueError(f"{path} has no plan {unknown[0]!r}; it has: {', '.join(sorted(manifest['plans']))}")
    sound = []
    for plan in chosen:
        check = _attempt(f"{plan}: file", partial(_file, path, manifest["plans"][plan]))
        sound += [plan] if check.passed else []
        yield check
    if "fused" in sound:
        yield _attempt(
            "fused: self-test of com.microsoft.MoE",
            lambda: f"{runtime.self_test(manifest['spec']['activation'], providers):.1e} from float64 arithmetic",
        )

    spec, student = checkpoint.load_spec(path / "checkpoint"), checkpoint.load(path / "checkpoint")
    same = spec.to_dict() == manifest["spec"]
    yield Check("checkpoint", same, f"{'is' if same else 'is not'} what the manifest describes")
    random = np.random.default_rng(0)
    ids = [
        random.integers(0, student.config.vocab_size, int(random.integers(1, spec.max_length + 1))).tolist()
        for _ in range(texts)
    ]
    batches = list(random_batches(ids, 0))
    known = Known.of(spec, student, batches)
    dense_embeddings: list[np.ndarray] = []
    for plan in sorted(sound, key=lambda plan: plan != "dense"):
        yield _attempt(
            f"{plan}: parity",
            partial(_opened_parity, path, plan, threads, providers, known, batches, dense_embeddings),
        )


def _attempt(name: str, action: Callable[[], str]) -> Check:
    try:
        return Check(name, True, action())
    except (ValueError, OSError, RuntimeError) as error:
        return Check(name, False, str(error))


def _file(path: Path, entry: Mapping[str, Any]) -> str:
    runtime.checked_file(path, entry)
    return f"sha256 {entry['sha256'][:12]}..., as exported"


def _opened_parity(
    path: Path,
    plan: str,
    threads: int | None,
    providers: Sequence[str],
    known: Known,
    batches: Sequence[Batch],
    dense_embeddings: list[np.ndarray],
) -> str:
    run = runtime.open_export(path, plan, threads, providers).run
    if plan not in DENSE_PLANS and plan not in INT8_PLANS:
        largest, found = plan_parity(plan, run, known)
        return f"{largest:.1e} from PyTorch on {found.texts} texts"
    outputs = [run(*batch) for batch in batches]
    if not all(np.isfinite(part).all() for output in outputs for part in output):
        raise ValueError("an output is NaN or infinite")
    embeddings = [embedding_BD for _, embedding_BD in outputs]
    if plan == "dense":
        dense_embeddings += embeddings
        return "runs, and gives finite numbers (the teacher is not in an export)"
    if plan == "dense8" and not dense_embeddings:
        return "runs, and gives finite numbers (nothing to compare it with)"
    expected = dense_embeddings if plan == "dense8" else [one.embedding_BD for one in known.student]
    cosine = float((np.concatenate(embeddings) * np.concatenate(expected)).sum(1).mean())
    of = "dense" if plan == "dense8" else "PyTorch"
    if cosine < INT8_COSINE:
        raise ValueError(f"its embeddings have a mean cosine of {cosine:.3f} with those of {of}, below {INT8_COSINE}")
    return f"mean cosine {cosine:.4f} with {of}, on {sum(map(len, embeddings))} texts"
