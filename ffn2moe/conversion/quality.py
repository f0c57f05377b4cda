"""Judge how near a student is to its teacher, on texts that neither calibration nor training has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ffn2moe import metrics
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.layer import output_of
from ffn2moe.dense.sentence import directions, embed
from ffn2moe.progress import Track, untracked
from ffn2moe.spec import MoESpec
from ffn2moe.table import Table

Sums = dict[str, float]
# (teacher, student, batches on their device, spec) -> figures
Measure = Callable[[Any, Any, Iterable[Batch], MoESpec], dict[str, float]]


@torch.no_grad()
def judge(
    teacher: Any,
    student: Any,
    batches: Sequence[Batch],
    spec: MoESpec,
    device: str | torch.device = "cpu",
    track: Track = untracked,
) -> dict[str, float]:
    """Return how near the student is to the teacher. Both models are moved to `device` and left in eval mode.

    Classifiers: `ffn2moe.metrics.fidelity` of their logits. Models that write text: `divergence` in nats and
    `agreement` of the most probable token, both a position; language models also `perplexity` and
    `teacher_perplexity`. Embeddings: their mean `cosine`. Hidden states: the `relative_error`.
    """
    device = torch.device(device)
    teacher, student = teacher.to(device).eval(), student.to(device).eval()
    tracked = track(batches, len(batches), "comparing student and teacher")
    return MEASURES[spec.head](teacher, student, (batch.to(device) for batch in tracked), spec)


def summary(quality: dict[str, float]) -> str:
    """Return the figures of `judge` in words."""
    if metrics.KEPT in quality:
        return _classified(quality)
    if "cosine" in quality:
        return f"cosine {quality['cosine']:.4f} with the embeddings of the dense model"
    if "relative_error" in quality:
        return f"relative error {quality['relative_error']:.3f} of the hidden states"
    near = f"{quality['divergence']:.4f} nats from the dense model, {100 * quality['agreement']:.1f} % agreement"
    if "perplexity" in quality:
        return f"perplexity {quality['perplexity']:.3f} (dense {quality['teacher_perplexity']:.3f}), {near}"
    return near


def _classified(quality: dict[str, float]) -> str:
    parts = [f"concordance {quality[metrics.KEPT]:.3f} with the scores of the dense model"]
    if "agreement" in quality:
        parts.append(f"{100 * quality['agreement']:.1f} % agreement")
    for name, words in (("kappa", "kappa"), ("rank_correlation", "rank correlation")):
        if name in quality:
            parts.append(f"{words} {quality[name]:.3f}")
    return ", ".join(parts)


def _class_figures(teacher: Any, student: Any, batches: Iterable[Batch], spec: MoESpec) -> dict[str, float]:
    found = [_logits(teacher, student, batch) for batch in batches]
    teacher_NC, student_NC = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    return metrics.fidelity(str(spec.problem), teacher_NC, student_NC)


def _of_sums(sums: Callable[[Any, Any, Batch, MoESpec], Sums], figures: Callable[[Sums], dict[str, float]]) -> Measure:
    """Return the measure that makes figures of the sums over all batches."""

    def measure(teacher: Any, student: Any, batches: Iterable[Batch], spec: MoESpec) -> dict[str, float]:
        totals: Sums = {}
        for batch in batches:
            for name, value in sums(teacher, student, batch, spec).items():
                totals[name] = totals.get(name, 0.0) + value
        return figures(totals)

    return measure


def _embedding_sums(teacher: Any, student: Any, batch: Batch, spec: MoESpec) -> Sums:
    mask = batch.mask
    assert mask is not None
    first, second = (
        directions(model, embed(model, model(**batch.inputs).last_hidden_state, mask)) for model in (teacher, student)
    )
    return {"count": len(first), "cosine": (first * second).sum().item()}


def _feature_sums(teacher: Any, student: Any, batch: Batch, spec: MoESpec) -> Sums:
    first, second = (output_of(model, batch).float() for model in (teacher, student))
    return {
        "count": first.double().square().sum().item(),
        "error": (first - second).double().square().sum().item(),
    }


def _logits(teacher: Any, student: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits [N, V] of both models at the positions that count."""
    return (
        output_of(teacher, batch).float().flatten(0, -2),
        output_of(student, batch).float().flatten(0, -2),
    )


def _near(first_NV: Tensor, second_NV: Tensor) -> Sums:
    agreed = (first_NV.argmax(-1) == second_NV.argmax(-1)).sum().item()
    divergence = metrics.divergence(first_NV, second_NV).sum().item()
    return {"count": len(first_NV), "divergence": divergence, "agreement": agreed}


def _logit_sums(teacher: Any, student: Any, batch: Batch, spec: MoESpec) -> Sums:
    return _near(*_logits(teacher, student, batch))


def _causal_sums(teacher: Any, student: Any, batch: Batch, spec: MoESpec) -> Sums:
    first_NV, second_NV = _logits(teacher, student, batch)
    mask_BL = batch.inputs["attention_mask"].bool()
    row_P, place_P = torch.nonzero(mask_BL[:, 1:] & mask_BL[:, :-1], as_tuple=True)
    target_P = batch.inputs["input_ids"][row_P, place_P + 1]
    index_P = mask_BL.flatten().cumsum(0).sub(1).view_as(mask_BL)[row_P, place_P]
    return {
        **_near(first_NV, second_NV),
        "predicted": len(target_P),
        "teacher_nats": metrics.nats(first_NV[index_P], target_P).sum().item(),
        "nats": metrics.nats(second_NV[index_P], target_P).sum().item(),
    }


def _logit_figures(sums: Sums) -> dict[str, float]:
    return {name: sums[name] / sums["count"] for name in ("divergence", "agreement")}


def _causal_figures(sums: Sums) -> dict[str, float]:
    found = _logit_figures(sums)
    for name, nats in (("perplexity", "nats"), ("teacher_perplexity", "teacher_nats")):
        found[name] = float(torch.tensor(sums[nats] / sums["predicted"], dtype=torch.float64).exp())
    return found


MEASURES: Table[Measure] = Table("head")
MEASURES.register("causal", _of_sums(_causal_sums, _causal_figures))
MEASURES.register("classification", _class_figures)
MEASURES.register("token_classification", _class_figures)
MEASURES.register("seq2seq", _of_sums(_logit_sums, _logit_figures))
MEASURES.register("embedding", _of_sums(_embedding_sums, lambda sums: {"cosine": sums["cosine"] / sums["count"]}))
MEASURES.register(
    "features", _of_sums(_feature_sums, lambda sums: {"relative_error": (sums["error"] / sums["count"]) ** 0.5})
)
