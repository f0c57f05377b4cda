"""Run a language model and compute its logits at the judged positions alone.

P counts the judged positions of a batch. All logits of a batch, [B, L, V], are never made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe import metrics

MOST_LOGITS = 2**25  # numbers in one batch's logits: 128 MiB in float32
MOST_DOUBLES = 2**22  # numbers that are worked on in float64 at once


def logits_at(model: Any, judged_BL: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """Return the logits, [P, V], at the positions of a batch that are judged, and all that the model returns."""

    def choose(head: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (given[0][judged_BL].unsqueeze(0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    return output.logits[0], output


def log_probabilities(logits_PV: Tensor, target_P: Tensor) -> Tensor:
    """Return the logarithm of the probability of each target, [P] float64 on the CPU."""
    parts = zip(_rows(logits_PV), target_P.split(_step(logits_PV)), strict=True)
    return torch.cat([-metrics.nats(logits, target) for logits, target in parts]).cpu()


def divergences(teacher_PV: Tensor, student_PV: Tensor) -> Tensor:
    """Return KL(teacher || student) at each position in nats, [P] float64 on the CPU."""
    parts = zip(_rows(teacher_PV), _rows(student_PV), strict=True)
    return torch.cat([metrics.divergence(*both) for both in parts]).cpu()


def _step(logits_PV: Tensor) -> int:
    return max(1, MOST_DOUBLES // logits_PV.shape[1])


def _rows(logits_PV: Tensor) -> tuple[Tensor, ...]:
    return logits_PV.split(_step(logits_PV))
